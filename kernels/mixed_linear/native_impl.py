"""One product for all weights, with kept copies of them; the parameters' gradients are the C++ kernel's."""

from __future__ import annotations

import torch

from antlm_fast.kernels.mixed_linear.kept_product import kept_product
from antlm_fast.kernels.native.weight_gradient import weight_gradient


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (n, in_features), rounded with weights and biases to `dtype`, times the weights below one another."""
    return kept_product(x, weights, biases, dtype, _gradients)


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, wants_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    sums = dy.new_empty(dy.shape[1], dtype=torch.float32) if wants_sums else None
    return weight_gradient(dy, x, dtype=dtype if dtype == torch.float32 else x.dtype, column_sums=sums), sums
