"""Rotary positions by the C++ kernels, as differentiable ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antlm_fast.kernels.native.library import library
from antlm_fast.kernels.native.ops import differentiable, opaque


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Arguments as in reference."""
    turned: Tensor = _rotary(x, cos, sin)
    return turned


def rotary_qkv(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as in reference."""
    # a traced op may not give back its input's memory
    overwrite = overwrite and x.stride(-1) == 1 and not torch.compiler.is_compiling()
    q, k, v = _rotary_qkv(x, cos, sin, heads, kv_heads, overwrite)
    return q, k, v


def _turn(x: Tensor, out: Tensor, cos: Tensor | None, sin: Tensor | None, *, back: bool) -> None:
    """Writes x, turned by the tables (None: as it is), into out, which may be a part of a larger tensor."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    library().call(
        "rotary", x, out, cos, sin, *x.shape, *x.stride()[:2], *out.stride()[:2], x.dtype == torch.bfloat16, back
    )


def _rotary_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _turn(x, out, cos.contiguous(), sin.contiguous(), back=False)
    return out


def _rotary_gradient(d_out: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    d_x = d_out.new_empty(d_out.shape)
    _turn(d_out, d_x, cos.contiguous(), sin.contiguous(), back=True)
    return [d_x]


_rotary_gradient_of = opaque(
    "native_rotary_backward", _rotary_gradient, lambda d_out, cos, sin: [d_out.new_empty(d_out.shape)]
)


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _rotary_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    (d_x,) = _rotary_gradient_of(d_out, *ctx.saved_tensors)
    return d_x, None, None


_rotary = differentiable(
    "native_rotary",
    _rotary_forward,
    public="rotary",
    fake=lambda x, cos, sin: x.new_empty(x.shape),
    save=_save_rotary,
    backward=_rotary_backward,
)


def _rotary_qkv_forward(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    parts = x.split([heads, kv_heads, kv_heads], 1)
    q, k, v = [_same_memory(part) for part in parts] if overwrite else _new_qkv(x, heads, kv_heads)
    tables = (cos.contiguous(), sin.contiguous())
    _turn(parts[0], q, *tables, back=False)
    _turn(parts[1], k, *tables, back=False)
    if overwrite:
        torch.autograd.graph.increment_version(x)
    else:
        _turn(parts[2], v, None, None, back=False)
    return q, k, v


def _same_memory(x: Tensor) -> Tensor:
    """Not a view that autograd knows of: x is used up."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _new_qkv(x: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, head_dim = x.shape
    q, k, v = (x.new_empty((tokens, each, head_dim)) for each in (heads, kv_heads, kv_heads))
    return q, k, v


def _rotary_qkv_gradient(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    d_x = _new_joined(d_q, d_k, d_v)
    tables = (cos.contiguous(), sin.contiguous())
    parts = d_x.split([each.shape[1] for each in (d_q, d_k, d_v)], 1)
    for part, d_part, turn in zip((d_q, d_k, d_v), parts, (tables, tables, (None, None)), strict=True):
        _turn(part, d_part, *turn, back=True)
    return [d_x]


def _new_joined(*parts: Tensor) -> Tensor:
    tokens, _, head_dim = parts[0].shape
    return parts[0].new_empty((tokens, sum(part.shape[1] for part in parts), head_dim))


_rotary_qkv_gradient_of = opaque(
    "native_rotary_qkv_backward", _rotary_qkv_gradient, lambda d_q, d_k, d_v, cos, sin: [_new_joined(d_q, d_k, d_v)]
)


def _rotary_qkv_backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
    (d_x,) = _rotary_qkv_gradient_of(d_q, d_k, d_v, *ctx.saved_tensors)
    return d_x, *[None] * 5


_rotary_qkv = differentiable(
    "native_rotary_qkv",
    _rotary_qkv_forward,
    public="rotary_qkv",
    fake=lambda x, cos, sin, heads, kv_heads, overwrite: _new_qkv(x, heads, kv_heads),
    save=_save_rotary,
    backward=_rotary_qkv_backward,
)
