"""The norm by the C++ kernels, with a sum and dropout before it and without, as differentiable ops.

A forward keeps what its gradient cannot form again: the sum that was normalised with two numbers a row, and a seed in
place of a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antlm_fast.kernels.fused_layers.contract import LayerOptions, seed_of
from antlm_fast.kernels.native.library import library
from antlm_fast.kernels.native.ops import differentiable, opaque
from antlm_fast.kernels.philox import drop_threshold

# a sum over rows is one of so many sums over blocks of them, whatever the number of threads
_MOST_BLOCKS, _ROWS_OF_A_BLOCK = 64, 16


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: LayerOptions
) -> tuple[Tensor, Tensor]:
    """Arguments as in reference."""
    seed = _seed(options, x)
    total, normed, _ = _add_norm(
        x, residual, weight, bias, seed, options.dropout_p, options.eps, options.layer, options.out_dtype
    )
    return total, normed


def add_dropout(x: Tensor, residual: Tensor | None, options: LayerOptions) -> Tensor:
    """Arguments as in reference."""
    total: Tensor = _add_dropout(x, residual, _seed(options, x), options.dropout_p)
    return total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: LayerOptions) -> Tensor:
    """Arguments as in reference."""
    normed, _ = _layer_norm(x, weight, bias, options.eps, options.layer, options.out_dtype)
    return normed


def _seed(options: LayerOptions, x: Tensor) -> Tensor | None:
    return seed_of(options, x) if options.dropout_p else None


def _add_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    layer: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, normed, float32 (rows, 2): mean and 1 / standard deviation of each row)."""
    total, normed, stats = _new_total(x, residual), *_new_norm(x, out_dtype)
    _run_norm(x, residual, weight, bias, total, normed, stats, eps, layer, _dropout(seed, dropout_p))
    return total, normed, stats


def _layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    normed, stats = _new_norm(x, out_dtype)
    _run_norm(x, None, weight, bias, None, normed, stats, eps, layer, _dropout(None, 0.0))
    return normed, stats


def _add_dropout_forward(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    total = _new_total(x, residual)
    _run_norm(x, residual, None, None, total, None, None, 0.0, False, _dropout(seed, dropout_p))
    return total


def _run_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    normed: Tensor | None,
    stats: Tensor | None,
    eps: float,
    layer: bool,
    dropout: tuple[float, ...],
) -> None:
    held = (x.contiguous(), _contiguous(residual), _vector(weight), _vector(bias))
    library().call(
        "add_norm_forward",
        *(*held, total, normed, stats, *x.shape),
        *(_is_bf16(x), _is_bf16(x if total is None else total), _is_bf16(normed), layer, eps, *dropout),
    )


def _new_total(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


def _new_norm(x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((x.shape[0], 2), dtype=torch.float32)


def _norm_gradients(
    total: Tensor,
    d_total: Tensor | None,
    d_normed: Tensor | None,
    stats: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    layer: bool,
    x_dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    """Those of x, residual, weight (float32) and bias (float32), of which only what is wanted is there."""
    gradients = _new_norm_gradients(total, x_dtype, wanted)
    rest = iter(gradients)
    d_x, d_residual, d_weight, d_bias = (next(rest) if each else None for each in wanted)
    rows, columns = total.shape
    blocks = max(1, min(_MOST_BLOCKS, -(-rows // _ROWS_OF_A_BLOCK)))
    partials = total.new_empty((blocks, 2, columns), dtype=torch.float32) if wanted[2] or wanted[3] else None
    held = (_contiguous(d_total), _contiguous(d_normed), total.contiguous(), stats, _vector(weight))
    library().call(
        "add_norm_backward",
        *(*held, d_x, d_residual, d_weight, d_bias, partials, rows, columns, blocks),
        *(x_dtype == torch.bfloat16, _is_bf16(total), _is_bf16(d_normed), layer, *_dropout(seed, dropout_p)),
    )
    return gradients


def _new_norm_gradients(total: Tensor, x_dtype: torch.dtype, wanted: list[bool]) -> list[Tensor]:
    kinds = ((total.shape, x_dtype), (total.shape, total.dtype), *[(total.shape[1:], torch.float32)] * 2)
    return [total.new_empty(shape, dtype=dtype) for (shape, dtype), each in zip(kinds, wanted, strict=True) if each]


_norm_gradients_of = opaque(
    "native_norm_backward",
    _norm_gradients,
    lambda total, d_total, d_normed, stats, weight, seed, dropout_p, layer, x_dtype, wanted: _new_norm_gradients(
        total, x_dtype, wanted
    ),
)


def _all_norm_gradients(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    saved: tuple[Tensor | None, ...],
    settings: tuple[float, bool, torch.dtype],
    wanted: list[bool],
    vector_dtypes: tuple[torch.dtype | None, ...] = (None, None),
) -> list[Tensor | None]:
    """The same, with None for what is not wanted and weight's and bias's gradients in their dtypes."""
    if d_total is None and d_normed is None:
        return [None] * 4
    total, *rest_of_saved = saved
    assert total is not None
    # without dropout both summands have one gradient, if they have one dtype
    shared = rest_of_saved[2] is None and settings[2] == total.dtype and wanted[0] and wanted[1]
    computed = [wanted[0], wanted[1] and not shared, *wanted[2:]]
    rest = iter(_norm_gradients_of(total, d_total, d_normed, *rest_of_saved, *settings, computed))
    found: list[Tensor | None] = [next(rest) if each else None for each in computed]
    if shared:
        found[1] = found[0]
    found[2:] = [each if each is None else each.to(dtype) for each, dtype in zip(found[2:], vector_dtypes, strict=True)]
    return found


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, seed, dropout_p, _, layer, _ = inputs
    total, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(total, stats, weight, seed)
    ctx.settings = (dropout_p, layer, x.dtype)
    ctx.vector_dtypes = tuple(None if each is None else each.dtype for each in (weight, bias))


def _add_norm_backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wanted = _wants(ctx, 0, 1, 2, 3)
    found = _all_norm_gradients(d_total, d_normed, ctx.saved_tensors, ctx.settings, wanted, ctx.vector_dtypes)
    return *found, *[None] * 5


_add_norm = differentiable(
    "native_add_norm",
    _add_norm_forward,
    public="add_norm",
    fake=lambda x, residual, weight, bias, seed, dropout_p, eps, layer, out_dtype: (
        _new_total(x, residual),
        *_new_norm(x, out_dtype),
    ),
    save=_save_add_norm,
    backward=_add_norm_backward,
)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, layer, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight)
    ctx.settings = (0.0, layer, x.dtype)
    ctx.vector_dtypes = tuple(None if each is None else each.dtype for each in (weight, bias))


def _layer_norm_backward(ctx: Any, d_normed: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wants_x, *wanted = _wants(ctx, 0, 1, 2)
    saved = (*ctx.saved_tensors, None)
    found = _all_norm_gradients(None, d_normed, saved, ctx.settings, [wants_x, False, *wanted], ctx.vector_dtypes)
    return found[0], found[2], found[3], None, None, None


_layer_norm = differentiable(
    "native_layer_norm",
    _layer_norm_forward,
    public="layer_norm",
    fake=lambda x, weight, bias, eps, layer, out_dtype: _new_norm(x, out_dtype),
    save=_save_layer_norm,
    backward=_layer_norm_backward,
)


def _save_add_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, seed, dropout_p = inputs
    ctx.save_for_backward(seed)
    ctx.settings = (dropout_p, False, x.dtype)


def _add_dropout_backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
    # a residual's gradient is d_total itself
    saved = (d_total, None, None, *ctx.saved_tensors)
    found = _all_norm_gradients(d_total, None, saved, ctx.settings, [*_wants(ctx, 0), False, False, False])
    return found[0], d_total if ctx.needs_input_grad[1] else None, None, None


_add_dropout = differentiable(
    "native_add_dropout",
    _add_dropout_forward,
    public="add_dropout",
    fake=lambda x, residual, seed, dropout_p: _new_total(x, residual),
    save=_save_add_dropout,
    backward=_add_dropout_backward,
)


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[float, ...]:
    """The kernels' arguments: whether, seed, threshold, scale."""
    if seed is None:
        return False, 0, 0, 1.0
    return True, int(seed), drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def _wants(ctx: Any, *places: int) -> list[bool]:
    return [ctx.needs_input_grad[place] for place in places]


def _is_bf16(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.bfloat16


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
