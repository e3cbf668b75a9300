"""GPT-BERT (arXiv 2410.24159): LTG-BERT with gated attention and learned sums of all earlier outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.models.disentangled_parts import (
    DisentangledConfig,
    DisentangledHeads,
    DisentangledModel,
    FeedForward,
    plain_layer_norm,
    projections,
)
from antlm_fast.models.language_model import Packing
from antlm_fast.models.layer_parts import Linear, Pending, WantedRows, active, normed, wanted_rows


@dataclass(frozen=True, kw_only=True)
class GptBertConfig(DisentangledConfig):
    """Sizes of a GPT-BERT. The defaults are GPT-BERT small (arXiv 2410.24159, 29.9M parameters)."""

    architecture: Literal["gpt_bert"] = "gpt_bert"
    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int = 1280
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    layer_norm_eps: float = 1e-5


class GptBert(DisentangledModel):
    """GPT-BERT whose every forward says what each sequence may see.

    Sublayers (attention and feed-forward in turn) are numbered n = 1, 2, ...; x_0 = X_0 is the embedding's output.
    X_n = x_(n-1) + Sublayer_n(x_(n-1)); x_n = sum over m <= n of w_nm X_m; at init w_nn = 1 and the others are 0.

    Embeddings, relative table, feed-forward, head, init and the places of dropout are LTG-BERT's. What the paper leaves
    open is chosen so: the sums are DenseFormer's own, over what sublayers gave before they were weighted (X, not x);
    the gate's GELU is exact; value, gate and output projections have biases; the normalisation before the output
    projection is over all heads together.

    With `rows`, the last layer computes queries, gate, output projection, feed-forward and sums for them alone.

    Source: arXiv 2410.24159, section 2; DenseFormer, arXiv 2402.02622, section 3. Written from their equations.
    """

    config: GptBertConfig

    def __init__(self, config: GptBertConfig) -> None:
        super().__init__(config, (_Layer(config, i) for i in range(config.num_hidden_layers)))

    def encode(self, tokens: Tensor, packing: Packing, rows: Tensor | None) -> Tensor:
        x, relative = self.embedding(tokens, packing.layer_impl), self.relative(packing.layer_impl)
        wanted = WantedRows.of(rows, packing)
        outputs = [x]
        for layer in self.layers[:-1]:
            x, outputs = layer(x, outputs, relative, packing, None)
        x, _ = self.layers[-1](x, outputs, relative, packing, wanted)
        return x


class _Layer(nn.Module):
    def __init__(self, config: GptBertConfig, number: int) -> None:
        super().__init__()
        self.attention = _GatedAttention(config)
        self.attention_sum = _WeightedSum(2 * number + 2)
        self.feed_forward = FeedForward(config)
        self.feed_forward_sum = _WeightedSum(2 * number + 3)

    def forward(
        self, x: Tensor, outputs: list[Tensor], relative: Tensor, packing: Packing, wanted: WantedRows | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(x, outputs with this layer's two); with wanted, both at those rows alone."""
        impl = packing.layer_impl
        attended = self.attention(normed(x, self.attention.norm, impl), relative, packing, wanted)
        outputs = [wanted_rows(output, wanted) for output in outputs]
        outputs.append(attended.added_to(wanted_rows(x, wanted), impl))
        x = self.attention_sum(outputs)
        outputs.append(self.feed_forward(normed(x, self.feed_forward.norm, impl), impl).added_to(x, impl))
        return self.feed_forward_sum(outputs), outputs


class _GatedAttention(nn.Module):
    """dropout(W_o LN0(heads * gelu(G)) + b) of y = LN0(x), where [V|G] = W_vg y + b"""

    def __init__(self, config: GptBertConfig) -> None:
        super().__init__()
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.heads = DisentangledHeads(config)
        self.value_gate = Linear(config.hidden_size, 2 * config.hidden_size)
        self.inner_norm = plain_layer_norm(config.hidden_size, config)
        self.out = Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, y: Tensor, relative: Tensor, packing: Packing, wanted: WantedRows | None) -> Pending:
        impl, at_wanted = packing.layer_impl, (True, False, False, True)
        q, k, v, gate = projections(y, (self.heads.query_key, self.value_gate), at_wanted, wanted, impl)
        heads = self.heads(q, k, v, relative, packing, wanted)
        return Pending(self.out(normed(heads * F.gelu(gate), self.inner_norm, impl), impl), active(self.dropout))


class _WeightedSum(nn.Module):
    """sum over m of weight[m] * outputs[m]; at init the last output as it is."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_outputs))
        with torch.no_grad():
            self.weight[-1] = 1.0

    def forward(self, outputs: list[Tensor]) -> Tensor:
        # one output at a time: stacking them would copy all of them, and keep the copies for backward
        weights = self.weight.unbind()
        total = weights[-1] * outputs[-1]
        for weight, output in zip(weights[:-1], outputs[:-1], strict=True):
            total = torch.addcmul(total, weight, output)
        return total
