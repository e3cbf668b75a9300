"""What every model's layers are made of: products of mixed precision, norms that carry the residual sum, wanted rows.

Under autocast the residual stream stays float32, and whatever a product reads is written in autocast's dtype by the
operation before it, so that nothing is cast on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from antlm_fast.kernels.fused_layers import add_dropout, add_norm, layer_norm
from antlm_fast.kernels.mixed_linear import mixed_linear
from antlm_fast.models.language_model import Packing


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product reads: autocast's dtype, which leaves float64 alone, or x's own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Linear(nn.Linear):
    """torch.nn.Linear, whose rounded weight under autocast is kept from step to step (kernels/mixed_linear)."""

    def forward(self, x: Tensor, impl: str = "auto") -> Tensor:
        return mixed_linear(x, (self.weight,), (self.bias,), impl=linear_impl(impl))


def joint_product(x: Tensor, layers: Sequence[nn.Linear], impl: str) -> Tensor:
    """The outputs of linear layers of one input, side by side: one product."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return mixed_linear(x, weights, biases, impl=linear_impl(impl))


def linear_impl(impl: str) -> str:
    """Products are torch's own for every implementation but the reference."""
    return impl if impl in ("reference", "torch") else "auto"


def normed(x: Tensor, norm: nn.RMSNorm | nn.LayerNorm, impl: str) -> Tensor:
    """norm(x), for a product to read."""
    return layer_norm(x, **_norm_options(norm), out_dtype=product_dtype(x), impl=impl)


@dataclass(frozen=True)
class Pending:
    """A sublayer's output that the residual stream does not have yet: the next norm adds it in passing.

    Args:
        value: (n, hidden_size).
        dropout_p: of its dropout, which is part of the addition.
    """

    value: Tensor
    dropout_p: float = 0.0

    def added_to(self, x: Tensor, impl: str) -> Tensor:
        """x + dropout(value)"""
        return add_dropout(self.value, x, dropout_p=self.dropout_p, impl=impl)

    def added_and_normed(self, x: Tensor, norm: nn.RMSNorm | nn.LayerNorm, impl: str) -> tuple[Tensor, Tensor]:
        """(x + dropout(value), its norm for a product to read)"""
        options = _norm_options(norm)
        return add_norm(self.value, x, **options, dropout_p=self.dropout_p, out_dtype=product_dtype(x), impl=impl)


def continued(x: Tensor, pending: Pending | None, norm: nn.RMSNorm | nn.LayerNorm, impl: str) -> tuple[Tensor, Tensor]:
    """(the residual stream, its norm) at the begin of a sublayer; before the first nothing is pending."""
    if pending is None:
        return x, normed(x, norm, impl)
    return pending.added_and_normed(x, norm, impl)


def active(dropout: nn.Dropout) -> float:
    """The probability of dropping, which is 0 outside of training."""
    return dropout.p if dropout.training else 0.0


def _norm_options(norm: nn.RMSNorm | nn.LayerNorm) -> dict[str, Any]:
    if isinstance(norm, nn.RMSNorm):
        assert norm.eps is not None
        return {"weight": norm.weight, "eps": norm.eps, "kind": "rms"}
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "kind": "layer"}


@dataclass(frozen=True, kw_only=True)
class WantedRows:
    """The rows the last layer computes; keys and values are still those of every token.

    Args:
        index: int64 (n,) ascending packed positions.
        cu_seqlens: int32 (num_seqs + 1,), counts them by sequence.
        positions: int32 (n,), position of each within its own sequence.
    """

    index: Tensor
    cu_seqlens: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: Tensor | None, packing: Packing) -> WantedRows | None:
        """From the rows of `LanguageModel.hidden_states`; nothing is read from the device. None stays None."""
        if rows is None:
            return None
        # as many rows lie before a sequence as are smaller than its start
        starts = torch.searchsorted(rows, packing.cu_seqlens.to(rows.dtype), out_int32=True)
        return cls(index=rows, cu_seqlens=starts, positions=packing.positions(rows).to(torch.int32))


def wanted_rows(x: Tensor, wanted: WantedRows | None) -> Tensor:
    return x if wanted is None else x.index_select(0, wanted.index)
