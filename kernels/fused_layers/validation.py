"""What a call of a fused layer must look like. No tensor's values are read."""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def check_rows(x: torch.Tensor, residual: torch.Tensor | None, out_dtype: torch.dtype | None) -> None:
    """x (..., columns), and residual of its shape."""
    _check_dtype("x", x.dtype)
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"x must have shape (..., columns), at least one column; got {tuple(x.shape)}")
    if residual is not None:
        if residual.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64) != (
            residual.dtype == torch.float64
        ):
            raise TypeError(f"residual must be float32 or of x's dtype {x.dtype}; got {residual.dtype}")
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}; got {residual.device}")
    if out_dtype is not None:
        _check_dtype("out_dtype", out_dtype)


def check_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, kind: str, eps: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    check_eps("eps", eps)
    if bias is not None and weight is None:
        raise ValueError("bias must be None without a weight; got a tensor")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.dtype not in DTYPES or (vector.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(f"{name} must be floating, and float64 where x is; got {vector.dtype}")
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},); got {tuple(vector.shape)}")
        if vector.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {vector.device}")


def check_eps(name: str, eps: float) -> None:
    if not (math.isfinite(eps) and eps > 0.0):
        raise ValueError(f"{name} must be finite and above 0; got {eps}")


def checked_seed(dropout_p: float, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """int64 () on the device; None where nothing is dropped, or where none was given."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1; got {dropout_p}")
    if seed is None or not dropout_p:
        return None
    if isinstance(seed, int):
        if not _INT64_MIN <= seed <= _INT64_MAX:
            raise ValueError(f"dropout_seed must fit 64 bits; got {seed}")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
        got = str(seed.dtype) if isinstance(seed, torch.Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int or an int64 tensor; got {got}")
    if seed.dim():
        raise ValueError(f"dropout_seed must have shape (); got {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"dropout_seed must be on x's device {device}; got {seed.device}")
    return seed


def check_gated(x: torch.Tensor, activation: str, norm_eps: float | None, out_dtype: torch.dtype | None) -> None:
    """x (..., 2 * columns)."""
    check_rows(x, None, out_dtype)
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of columns, gate and value; got {x.shape[-1]}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
    if norm_eps is not None:
        check_eps("norm_eps", norm_eps)


def check_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _check_dtype("x", x.dtype)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (tokens, heads, head_dim); got {tuple(x.shape)}")
    if x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"x must have an even head_dim; got {x.shape[-1]}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {table.dtype}")
        if table.shape != (x.shape[0], 1, x.shape[-1]):
            raise ValueError(f"{name} must have shape ({x.shape[0]}, 1, {x.shape[-1]}); got {tuple(table.shape)}")
        if table.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {table.device}")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}")
