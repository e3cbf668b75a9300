"""One product for all weights, out of torch's own operations; on a CPU with kept copies of the weights."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from antlm_fast.kernels.mixed_linear.kept_product import kept_product
from antlm_fast.kernels.working_copies import may_keep


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (n, in_features), rounded with weights and biases to `dtype`, times the weights below one another."""
    if weights[0].dtype != dtype and may_keep(weights):
        return kept_product(x, weights, biases, dtype, _gradients)
    bias = None
    if any(bias is not None for bias in biases):
        pairs = zip(weights, biases, strict=True)
        bias = _joined([weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in pairs], dtype)
    return F.linear(x.to(dtype), _joined(weights, dtype), bias)


def _joined(tensors: tuple[torch.Tensor, ...] | list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    narrow = [tensor.to(dtype) for tensor in tensors]
    return narrow[0] if len(narrow) == 1 else torch.cat(narrow)


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, _: torch.dtype, wants_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return dy.t() @ x, dy.sum(0, dtype=torch.float32) if wants_sums else None
