"""LTG-BERT (arXiv 2303.09859): disentangled attention, normalisation around every sublayer, a GEGLU feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from antlm_fast.models.disentangled_parts import (
    DisentangledConfig,
    DisentangledHeads,
    DisentangledModel,
    FeedForward,
    plain_layer_norm,
    projections,
)
from antlm_fast.models.language_model import Packing
from antlm_fast.models.layer_parts import Linear, Pending, WantedRows, active, continued, normed, wanted_rows


@dataclass(frozen=True, kw_only=True)
class LtgBertConfig(DisentangledConfig):
    """Sizes of an LTG-BERT. The defaults are LTG-BERT base (arXiv 2303.09859, 98.2M parameters)."""

    architecture: Literal["ltg_bert"] = "ltg_bert"
    vocab_size: int = 16384
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-7


class LtgBert(DisentangledModel):
    """LTG-BERT whose every forward says what each sequence may see.

    x = dropout(LN0(E[tokens])); for each layer x <- x + Attention(x), x <- x + FeedForward(x); head.

    With `rows`, the last layer computes queries, output projection and feed-forward for them alone.

    Source: arXiv 2303.09859, sections 3 and 4. Written from its equations.
    """

    config: LtgBertConfig

    def __init__(self, config: LtgBertConfig) -> None:
        super().__init__(config, (_Layer(config) for _ in range(config.num_hidden_layers)))

    def encode(self, tokens: Tensor, packing: Packing, rows: Tensor | None) -> Tensor:
        x, relative = self.embedding(tokens, packing.layer_impl), self.relative(packing.layer_impl)
        wanted, pending = WantedRows.of(rows, packing), None
        for layer in self.layers[:-1]:
            x, pending = layer(x, pending, relative, packing, None)
        x, pending = self.layers[-1](x, pending, relative, packing, wanted)
        return pending.added_to(x, packing.layer_impl)


class _Layer(nn.Module):
    def __init__(self, config: LtgBertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, pending: Pending | None, relative: Tensor, packing: Packing, wanted: WantedRows | None
    ) -> tuple[Tensor, Pending]:
        """(residual stream, what is still to be added to it); with wanted, both at those rows alone."""
        impl = packing.layer_impl
        x, y = continued(x, pending, self.attention.norm, impl)
        attended = self.attention(y, relative, packing, wanted)
        x, y = continued(wanted_rows(x, wanted), attended, self.feed_forward.norm, impl)
        return x, self.feed_forward(y, impl)


class _Attention(nn.Module):
    """dropout(LN(W_o heads + b)) of y = LN0(x), where V = W_v y + b"""

    def __init__(self, config: LtgBertConfig) -> None:
        super().__init__()
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.heads = DisentangledHeads(config)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.out = Linear(config.hidden_size, config.hidden_size)
        self.out_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, y: Tensor, relative: Tensor, packing: Packing, wanted: WantedRows | None) -> Pending:
        impl = packing.layer_impl
        q, k, v = projections(y, (self.heads.query_key, self.value), (True, False, False), wanted, impl)
        out = self.out(self.heads(q, k, v, relative, packing, wanted), impl)
        return Pending(normed(out, self.out_norm, impl), active(self.dropout))
