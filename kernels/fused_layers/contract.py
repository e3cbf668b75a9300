"""What every implementation of the fused layers is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is computed.

    Args:
        out_dtype: of the norm, or of a gated unit.
        layer: normalise by mean and standard deviation; False: by the root mean square alone.
        eps: is added to the mean square; 0 is no norm at all.
        dropout_p: the probability of dropping an element.
        dropout_seed: int64 (), or None: an implementation draws from torch's default generator as it likes.
    """

    out_dtype: torch.dtype
    layer: bool = True
    eps: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None


def accumulated(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 where a tensor is."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def seed_of(options: LayerOptions, x: torch.Tensor) -> torch.Tensor:
    """The call's seed, or a new one out of torch's default generator of x's device."""
    if options.dropout_seed is not None:
        return options.dropout_seed
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
