"""The fused layers: their contracts and the tables of implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from antlm_fast.kernels.dispatch import Implementation, Table, choose
from antlm_fast.kernels.fused_layers import native_impl, reference, torch_impl
from antlm_fast.kernels.fused_layers.contract import LayerOptions
from antlm_fast.kernels.fused_layers.validation import (
    check_gated,
    check_norm,
    check_rotary,
    check_rows,
    checked_seed,
)
from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.kernels.tracing import check_dense, transform


@dataclass(frozen=True)
class FusedLayerCall:
    """What the choice of an implementation may depend on.

    Args:
        device_type: of the tensors.
        dtypes: x's, the sum's and the result's.
        transform: what tracing.transform said of the tensors.
    """

    device_type: str
    dtypes: tuple[torch.dtype, ...]
    transform: str | None = None


def _serves_everything(call: FusedLayerCall) -> str | None:
    return None


def _native_unsupported_reason(call: FusedLayerCall) -> str | None:
    if call.transform is not None:
        return f"the C++ kernels do not follow {call.transform}"
    reasons = (unavailable_reason(call.device_type, dtype) for dtype in call.dtypes)
    return next((reason for reason in reasons if reason is not None), None)


def _table(name: str) -> Table[FusedLayerCall]:
    # the order is the preference of impl="auto"
    return {
        "native": Implementation(_native_unsupported_reason, getattr(native_impl, name)),
        "torch": Implementation(_serves_everything, getattr(torch_impl, name)),
        "reference": Implementation(_serves_everything, getattr(reference, name)),
    }


OPS: dict[str, Table[FusedLayerCall]] = {
    name: _table(name) for name in ("add_norm", "add_dropout", "layer_norm", "gated_unit", "rotary", "rotary_qkv")
}


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float,
    kind: str = "rms",
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sublayer's output is added to the residual stream, and the sum normalised for the next sublayer.

    total = residual + dropout(x); normed = norm(total) * weight + bias, where over the last axis
    norm(t) = t / sqrt(mean(t**2) + eps) ("rms"), or (t - mean(t)) / sqrt(mean((t - mean(t))**2) + eps) ("layer").

    Args:
        x: (..., columns); float16, bfloat16, float32 or float64.
        residual: of x's shape, float32 or of x's dtype; None is 0.
        weight, bias: (columns,), floating, float64 where x is; None is 1 and 0. A bias needs a weight.
        eps: above 0.
        kind: "rms" or "layer".
        dropout_p: the probability, in [0, 1), of dropping an element of x; what is kept is scaled by
            1 / (1 - dropout_p).
        dropout_seed: an int or an int64 tensor () on x's device: the mask is then a function of (seed, row, column)
            (kernels/philox.py: keep_elements). None draws from torch's default generator of x's device: a seed, or
            (impl="torch") torch's own mask.
        out_dtype: of normed; None is total's.
        impl: "auto" or the implementation to use.

    Returns:
        (total, normed), of x's shape. total has residual's dtype (x's where there is none) and is rounded to it before
        it is normalised. All arithmetic is float32 (float64 for float64).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or value is wrong.
        UnsupportedError: the implementation named by `impl` cannot serve the call.

    Gradients and determinism:
        Gradients reach x, residual, weight and bias, in the dtype of each; the last two are summed in float32.
        Deterministic; the native implementation's results do not depend on the number of threads. torch.autocast
        changes nothing here.

    Source:
        RMSNorm: Zhang and Sennrich, arXiv 1910.07467; layer norm: Ba et al., arXiv 1607.06450.
    """
    check_dense(x=x, residual=residual, weight=weight, bias=bias)
    check_rows(x, residual, out_dtype)
    check_norm(x, weight, bias, kind, eps)
    seed = checked_seed(dropout_p, dropout_seed, x.device)
    total_dtype = x.dtype if residual is None else residual.dtype
    options = LayerOptions(out_dtype or total_dtype, kind == "layer", float(eps), float(dropout_p), seed)
    if residual is None and not dropout_p:
        return x, _norm("add_norm", x, weight, bias, options, impl)
    forward = _chosen("add_norm", impl, (x, residual, weight, bias, dropout_seed), total_dtype, options.out_dtype)
    total, normed = forward(_as_rows(x), None if residual is None else _as_rows(residual), weight, bias, options)
    return _shaped(total, x.shape), _shaped(normed, x.shape)


def layer_norm(
    x: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The norm alone: normed of `add_norm` for total = x.

    Args, Raises, Gradients and determinism, Source:
        as for `add_norm`; out_dtype None is x's.

    Returns:
        (..., columns), x's shape.
    """
    check_dense(x=x, weight=weight, bias=bias)
    check_rows(x, None, out_dtype)
    check_norm(x, weight, bias, kind, eps)
    return _norm("layer_norm", x, weight, bias, LayerOptions(out_dtype or x.dtype, kind == "layer", float(eps)), impl)


def add_dropout(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float,
    dropout_seed: int | torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Dropout, and the sum with a residual if there is one: total of `add_norm`.

    Args, Raises, Gradients and determinism:
        as for `add_norm`.

    Returns:
        (..., columns), x's shape, in residual's dtype, or x's where there is none.
    """
    check_dense(x=x, residual=residual)
    check_rows(x, residual, None)
    seed = checked_seed(dropout_p, dropout_seed, x.device)
    if not dropout_p:
        return x if residual is None else residual + x
    total_dtype = x.dtype if residual is None else residual.dtype
    options = LayerOptions(total_dtype, dropout_p=float(dropout_p), dropout_seed=seed)
    forward = _chosen("add_dropout", impl, (x, residual, dropout_seed), total_dtype)
    return _shaped(forward(_as_rows(x), None if residual is None else _as_rows(residual), options), x.shape)


def gated_unit(
    x: torch.Tensor,
    *,
    activation: str,
    gate_first: bool,
    norm_eps: float | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """A gated linear unit's middle: activation(gate) * value, and its layer norm if wanted.

    Args:
        x: (..., 2 * columns): gate and value side by side; float16, bfloat16, float32 or float64.
        activation: "silu", x / (1 + e^-x); "gelu", x times the normal distribution's value at x; "gelu_tanh", the same
            by tanh.
        gate_first: whether the gate is x's first half.
        norm_eps: eps of a layer norm without weights that follows; None: none follows.
        out_dtype: None is x's.
        impl: "auto" or the implementation to use.

    Returns:
        (..., columns). All arithmetic is float32 (float64 for float64); the product is not rounded before its norm.

    Raises, Gradients and determinism:
        as for `add_norm`; the gradient reaches x.

    Source:
        Shazeer, arXiv 2002.05202; Hendrycks and Gimpel, arXiv 1606.08415; the norm: LTG-BERT, arXiv 2303.09859.
    """
    check_dense(x=x)
    check_gated(x, activation, norm_eps, out_dtype)
    options = LayerOptions(out_dtype or x.dtype, eps=float(norm_eps or 0.0))
    forward = _chosen("gated_unit", impl, (x,), options.out_dtype)
    out = forward(_as_rows(x), activation, gate_first, options)
    return _shaped(out, (*x.shape[:-1], x.shape[-1] // 2))


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Rotary positions: the two halves of head_dim are the coordinates that turn.

    out = x * cos + (-second half of x, first half of x) * sin.

    Args:
        x: (tokens, heads, head_dim), head_dim even; float16, bfloat16, float32 or float64. A view, such as the queries'
            part of one projection, is read where it lies.
        cos, sin: float32 (tokens, 1, head_dim).
        impl: "auto" or the implementation to use.

    Returns:
        x's shape and dtype, contiguous. The arithmetic is float32 (float64 for float64).

    Raises, Gradients and determinism:
        as for `add_norm`; the gradient reaches x.

    Source:
        Su et al., arXiv 2104.09864, in the layout of Hugging Face's Llama.
    """
    check_dense(x=x, cos=cos, sin=sin)
    check_rotary(x, cos, sin)
    forward = _chosen("rotary", impl, (x, cos, sin))
    turned: torch.Tensor = forward(x, cos, sin)
    return turned


def rotary_qkv(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    overwrite: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One projection's queries, keys and values, the first two with rotary positions; their gradient is one tensor.

    Args:
        x: (tokens, heads + 2 * kv_heads, head_dim): queries' heads, keys', values'.
        cos, sin, impl: as for `rotary`.
        heads, kv_heads: how many; heads may be 0.
        overwrite: x is used up: the results may lie in its memory. A graph that still needs x's values says so in its
            backward.

    Returns:
        (q, k, v): rotary(q), rotary(k), and v as it was, each (tokens, its heads, head_dim) in x's dtype. They may be
        parts of one tensor.

    Raises, Gradients and determinism, Source:
        as for `rotary`.
    """
    check_dense(x=x, cos=cos, sin=sin)
    check_rotary(x, cos, sin)
    if heads < 0 or kv_heads < 0 or x.shape[1] != heads + 2 * kv_heads:
        raise ValueError(f"x must have heads + 2 * kv_heads = {heads} + 2 * {kv_heads} heads; got {x.shape[1]}")
    forward = _chosen("rotary_qkv", impl, (x, cos, sin))
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = forward(x, cos, sin, heads, kv_heads, overwrite)
    return parts


def _norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: LayerOptions,
    impl: str,
) -> torch.Tensor:
    call = FusedLayerCall(x.device.type, (x.dtype, options.out_dtype), transform(x, weight, bias))
    chosen = choose(op, OPS["layer_norm"], impl, call)
    return _shaped(chosen.forward(_as_rows(x), weight, bias, options), x.shape)


def _chosen(op: str, impl: str, tensors: tuple[Any, ...], *dtypes: torch.dtype) -> Any:
    x = tensors[0]
    return choose(op, OPS[op], impl, FusedLayerCall(x.device.type, (x.dtype, *dtypes), transform(*tensors))).forward


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return rows if rows.shape == shape else rows.reshape(shape)
