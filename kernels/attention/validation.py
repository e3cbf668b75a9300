"""What an attention call must look like. Nothing here stalls a device: values are read on the CPU alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BIDIRECTIONAL = 2**31 - 1
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def in_one_dtype(*tensors: torch.Tensor | None) -> list[Any]:
    """Under autocast, tensors of float32 and one narrower dtype in the narrower; else as they are.

    Autocast's products are narrow, and rotary positions or a norm leave float32 beside them.
    """
    dtypes = {x.dtype for x in tensors if x is not None}
    device = next(x.device.type for x in tensors if x is not None)
    if len(dtypes) == 2 and torch.float32 in dtypes and torch.is_autocast_enabled(device):
        (narrow,) = dtypes - {torch.float32}
        if narrow in (torch.bfloat16, torch.float16):
            return [None if x is None else x.to(narrow) for x in tensors]
    return list(tensors)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, leading: tuple[str, ...]) -> None:
    for name, x, heads in (("q", q, "heads"), ("k", k, "kv_heads"), ("v", v, "kv_heads")):
        if x.dim() != len(leading) + 2:
            raise ValueError(f"{name} must have shape ({', '.join(leading)}, {heads}, head_dim); got {tuple(x.shape)}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64; got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {x.device}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1] or not k.shape[-1]:
        raise ValueError(f"k must have q's head_dim {q.shape[-1]}, at least 1; got {k.shape[-1]}")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2] or not q.shape[-2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[-2]} heads, at least 1; got {q.shape[-2]}")


def check_cu_seqlens(
    q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int
) -> int:
    """The number of sequences. Values are looked at on the CPU alone."""
    for side, x, cu, longest in (("q", q, cu_q, max_q), ("k", k, cu_k, max_k)):
        name = f"cu_seqlens_{side}"
        if cu.dtype != torch.int32:
            raise TypeError(f"{name} must be int32; got {cu.dtype}")
        if cu.dim() != 1 or not cu.numel():
            raise ValueError(f"{name} must have shape (num_seqs + 1,); got {tuple(cu.shape)}")
        if cu.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {cu.device}")
        if not isinstance(longest, int) or isinstance(longest, bool):
            raise TypeError(f"max_seqlen_{side} must be an int; got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"max_seqlen_{side} must be at least 0; got {longest}")
        # torch.compile cannot trace a choice by a tensor's values
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_starts(name, cu.tolist(), x.shape[0], longest)
    if cu_q.numel() != cu_k.numel():
        raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's length {cu_q.numel()}; got {cu_k.numel()}")
    return cu_q.numel() - 1


def _check_starts(name: str, starts: list[int], total: int, longest: int) -> None:
    if starts[0] != 0:
        raise ValueError(f"{name} must begin with 0; got {starts[0]}")
    if starts[-1] > total:
        raise ValueError(f"{name} must end at or before row {total}; got {starts[-1]}")
    lengths = [stop - start for start, stop in pairwise(starts)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"{name} must never decrease; got a step of {min(lengths)}")
    if lengths and max(lengths) > longest:
        side = name[-1]
        raise ValueError(f"max_seqlen_{side} must be at least the longest sequence, {max(lengths)}; got {longest}")


def visibility(
    causal: bool | torch.Tensor | None, prefix_len: torch.Tensor | None, num_seqs: int, device: torch.device
) -> int | torch.Tensor:
    """One prefix length for all sequences (int), or one for each (int32 (num_seqs,), on the device)."""
    if (causal is None) == (prefix_len is None):
        got = "neither" if causal is None else "both"
        raise ValueError(f"causal or prefix_len must be given, and not both; got {got}")
    if isinstance(causal, bool):
        return 0 if causal else _BIDIRECTIONAL
    name, flag, dtype = ("prefix_len", prefix_len, torch.int32) if causal is None else ("causal", causal, torch.bool)
    if not isinstance(flag, torch.Tensor) or flag.dtype != dtype:
        rule = "an int32 tensor" if causal is None else "a bool or a bool tensor"
        got = str(flag.dtype) if isinstance(flag, torch.Tensor) else type(flag).__name__
        raise TypeError(f"{name} must be {rule}; got {got}")
    if flag.shape != (num_seqs,) and (causal is None or flag.dim()):
        shapes = f"shape ({num_seqs},)" if causal is None else f"shape () or ({num_seqs},)"
        raise ValueError(f"{name} must have {shapes}; got {tuple(flag.shape)}")
    if flag.device != device:
        raise ValueError(f"{name} must be on q's device {device}; got {flag.device}")
    if causal is None:
        return flag
    return torch.where(flag, 0, _BIDIRECTIONAL).to(torch.int32).expand(num_seqs)


def options(
    q: torch.Tensor,
    softmax_scale: float | None,
    dropout_p: float,
    dropout_seed: int | torch.Tensor | None,
    return_lse: bool,
) -> dict[str, Any]:
    """The keyword arguments of every implementation; dropout_seed is an int64 tensor () on the device, or None."""
    if isinstance(softmax_scale, torch.Tensor):
        raise TypeError("softmax_scale must be a float, which has no gradient; got a tensor (multiply q by it)")
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[-1])
    elif not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite; got {softmax_scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1; got {dropout_p}")
    return {
        "softmax_scale": float(softmax_scale),
        "dropout_p": float(dropout_p),
        "dropout_seed": _seed(dropout_seed, q.device) if dropout_p else None,
        "return_lse": return_lse,
    }


def with_positive_scale(softmax_scale: float, *queries: torch.Tensor | None) -> tuple[float, list[Any]]:
    """A scale above 0, and queries that have the same scores with it: kernels scale the largest product, not each.

    Args:
        softmax_scale: finite.
        queries: what each product of the scores has one of: q, and the relative queries if there are any.
    """
    if softmax_scale > 0.0:
        return softmax_scale, list(queries)
    if softmax_scale < 0.0:
        return -softmax_scale, [None if x is None else -x for x in queries]
    # every score is 0, and so is every gradient through it
    return 1.0, [None if x is None else x * 0.0 for x in queries]


def _seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if seed is None:
        return torch.randint(_INT64_MAX, (), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        if not _INT64_MIN <= seed <= _INT64_MAX:
            raise ValueError(f"dropout_seed must fit 64 bits; got {seed}")
        # a fill runs on the device; building the tensor from the host's value would copy, and a copy can stall
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
        got = str(seed.dtype) if isinstance(seed, torch.Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int or an int64 tensor; got {got}")
    if seed.dim():
        raise ValueError(f"dropout_seed must have shape (); got {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"dropout_seed must be on q's device {device}; got {seed.device}")
    return seed
