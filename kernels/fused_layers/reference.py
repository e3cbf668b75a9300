"""What stands between the products of a layer, as it is defined. The specification, not the way to run."""

from __future__ import annotations

import math

import torch

from antlm_fast.kernels.fused_layers.contract import LayerOptions, accumulated, seed_of
from antlm_fast.kernels.philox import keep_elements


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: LayerOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, its norm), of (rows, columns)."""
    total = add_dropout(x, residual, options)
    return total, layer_norm(total, weight, bias, options)


def add_dropout(x: torch.Tensor, residual: torch.Tensor | None, options: LayerOptions) -> torch.Tensor:
    """residual + dropout(x), of (rows, columns), in residual's dtype."""
    total = x.to(accumulated(x, residual))
    if options.dropout_p:
        kept = keep_elements(seed_of(options, x), x.shape[0], x.shape[1], options.dropout_p)
        total = torch.where(kept, total / (1.0 - options.dropout_p), 0.0)
    if residual is None:
        return total.to(x.dtype)
    return (residual + total).to(residual.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, options: LayerOptions
) -> torch.Tensor:
    """The norm of each row of (rows, columns)."""
    unit = x.to(accumulated(x))
    if options.layer:
        unit = unit - unit.mean(-1, keepdim=True)
    unit = unit * torch.rsqrt(unit.square().mean(-1, keepdim=True) + options.eps)
    if weight is not None:
        unit = unit * weight
    if bias is not None:
        unit = unit + bias
    return unit.to(options.out_dtype)


def gated_unit(x: torch.Tensor, activation: str, gate_first: bool, options: LayerOptions) -> torch.Tensor:
    """activation(gate) * value of (rows, 2 * columns), and its norm where options say so."""
    first, second = x.to(accumulated(x)).chunk(2, -1)
    gate, value = (first, second) if gate_first else (second, first)
    product = _ACTIVATIONS[activation](gate) * value
    if options.eps:
        return layer_norm(product, None, None, options)
    return product.to(options.out_dtype)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2.0


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))) / 2.0


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu}


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim), turned."""
    first, second = x.to(accumulated(x)).chunk(2, -1)
    return (torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def rotary_qkv(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v) out of (tokens, heads + 2 kv_heads, head_dim); v is as it was."""
    q, k, v = x.split([heads, kv_heads, kv_heads], 1)
    return rotary(q, cos, sin), rotary(k, cos, sin), v
