"""The specification: each weight's own linear layer, side by side."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (n, in_features), rounded with weights and biases to `dtype`, times every weight."""
    parts = [
        F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(parts, dim=-1)
