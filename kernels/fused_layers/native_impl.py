"""The fused layers by the C++ kernels (kernels/native/fused_layers.cpp), as differentiable ops that torch.compile does
not look into. Norms and rotary positions have their own files; the gated unit is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antlm_fast.kernels.fused_layers.contract import LayerOptions
from antlm_fast.kernels.fused_layers.native_norm import add_dropout, add_norm, layer_norm
from antlm_fast.kernels.fused_layers.native_rotary import rotary, rotary_qkv
from antlm_fast.kernels.native.library import library
from antlm_fast.kernels.native.ops import differentiable, opaque

__all__ = ["add_dropout", "add_norm", "gated_unit", "layer_norm", "rotary", "rotary_qkv"]

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def gated_unit(x: Tensor, activation: str, gate_first: bool, options: LayerOptions) -> Tensor:
    """Arguments as in reference."""
    out, _ = _gated_unit(x, _ACTIVATIONS[activation], gate_first, options.eps, options.out_dtype)
    return out


def _gated_unit_forward(
    x: Tensor, activation: int, gate_first: bool, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, float32 (rows, 2): the product's mean and 1 / standard deviation; (0, 2) without a norm)."""
    out, stats = _new_gated_unit(x, eps, out_dtype)
    x = x.contiguous()
    gate, value = _halves(x, gate_first)
    library().call(
        "gated_unit_forward",
        *(gate, value, out, stats if eps else None, *out.shape, x.shape[1], activation),
        *(x.dtype == torch.bfloat16, out.dtype == torch.bfloat16, eps),
    )
    return out, stats


def _halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, value)"""
    first, second = x.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _new_gated_unit(x: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    stats = x.new_empty((rows if eps else 0, 2), dtype=torch.float32)
    return x.new_empty((rows, columns // 2), dtype=out_dtype), stats


def _gated_unit_gradient(
    d_out: Tensor, x: Tensor, stats: Tensor, activation: int, gate_first: bool, normed: bool
) -> list[Tensor]:
    x, d_out = x.contiguous(), d_out.contiguous()
    d_x = torch.empty_like(x)
    library().call(
        "gated_unit_backward",
        *(*_halves(x, gate_first), d_out, stats if normed else None, *_halves(d_x, gate_first)),
        *(*d_out.shape, x.shape[1], x.shape[1], activation, x.dtype == torch.bfloat16, d_out.dtype == torch.bfloat16),
    )
    return [d_x]


_gated_unit_gradient_of = opaque(
    "native_gated_unit_backward", _gated_unit_gradient, lambda d_out, x, *rest: [x.new_empty(x.shape)]
)


def _save_gated_unit(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, activation, gate_first, eps, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])
    ctx.settings = (activation, gate_first, eps > 0.0)


def _gated_unit_backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (d_x,) = _gated_unit_gradient_of(d_out, *ctx.saved_tensors, *ctx.settings)
    return d_x, None, None, None, None


_gated_unit = differentiable(
    "native_gated_unit",
    _gated_unit_forward,
    public="gated_unit",
    fake=lambda x, activation, gate_first, eps, out_dtype: _new_gated_unit(x, eps, out_dtype),
    save=_save_gated_unit,
    backward=_gated_unit_backward,
)
