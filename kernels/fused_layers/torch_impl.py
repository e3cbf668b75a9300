"""The fused layers out of torch's own operations: for any device, and for torch.compile to fuse."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from antlm_fast.kernels.fused_layers.contract import LayerOptions, accumulated
from antlm_fast.kernels.philox import keep_elements


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: LayerOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in reference."""
    total = add_dropout(x, residual, options)
    return total, layer_norm(total, weight, bias, options)


def add_dropout(x: torch.Tensor, residual: torch.Tensor | None, options: LayerOptions) -> torch.Tensor:
    """Arguments as in reference. Without a seed torch drops, one pass instead of the many that Philox is made of."""
    if not options.dropout_p:
        return x if residual is None else residual + x
    dropped = _dropped(x.to(accumulated(x, residual)), options)
    return dropped.to(x.dtype) if residual is None else (residual + dropped).to(residual.dtype)


def _dropped(x: torch.Tensor, options: LayerOptions) -> torch.Tensor:
    if options.dropout_seed is None:
        return F.dropout(x, options.dropout_p)
    kept = keep_elements(options.dropout_seed, x.shape[0], x.shape[1], options.dropout_p)
    return torch.where(kept, x * (1.0 / (1.0 - options.dropout_p)), 0.0)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, options: LayerOptions
) -> torch.Tensor:
    """Arguments as in reference."""
    dtype, size = accumulated(x), x.shape[-1:]
    weight, bias = (None if each is None else each.to(dtype) for each in (weight, bias))
    if options.layer:
        normed = F.layer_norm(x.to(dtype), size, weight, bias, options.eps)
    else:
        normed = F.rms_norm(x.to(dtype), size, weight, options.eps)
        normed = normed if bias is None else normed + bias
    return normed.to(options.out_dtype)


def gated_unit(x: torch.Tensor, activation: str, gate_first: bool, options: LayerOptions) -> torch.Tensor:
    """Arguments as in reference."""
    first, second = x.to(accumulated(x)).chunk(2, -1)
    gate, value = (first, second) if gate_first else (second, first)
    if activation == "silu":
        product = F.silu(gate) * value
    else:
        product = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * value
    return layer_norm(product, None, None, options) if options.eps else product.to(options.out_dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Arguments as in reference."""
    (first, second), (cos_first, cos_second), (sin_first, sin_second) = (each.chunk(2, -1) for each in (x, cos, sin))
    turned = (first * cos_first - second * sin_first, second * cos_second + first * sin_second)
    return torch.cat(turned, -1).to(x.dtype)


def rotary_qkv(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as in reference."""
    q, k, v = x.split([heads, kv_heads, kv_heads], 1)
    # v in rows of its own, as q and k: the Triton kernels are compiled ahead of time for such strides
    return rotary(q, cos, sin), rotary(k, cos, sin), v.clone(memory_format=torch.contiguous_format)
