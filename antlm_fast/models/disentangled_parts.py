"""What LTG-BERT and GPT-BERT are both made of: sizes, embeddings, the attention core, the feed-forward and the head.

LN0 is layer normalisation without affine parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.kernels.fused_layers import add_dropout, gated_unit, layer_norm
from antlm_fast.kernels.mixed_linear import mixed_linear
from antlm_fast.models.language_model import LanguageModel, Packing, check_architecture, layer_impl
from antlm_fast.models.layer_parts import (
    Linear,
    Pending,
    WantedRows,
    active,
    joint_product,
    linear_impl,
    normed,
    wanted_rows,
)


@dataclass(frozen=True, kw_only=True)
class DisentangledConfig:
    """Sizes of a transformer with disentangled attention.

    Args:
        intermediate_size: width F of the feed-forward, after its gate.
        max_position_embeddings: the longest sequence, and P of the buckets: distances of P - 1 and more share one.
        position_bucket_size: B; the relative table has 2 B - 1 rows.
        hidden_dropout: of embeddings, relative table, attention output, feed-forward output and head.
        attention_dropout: of the softmax's probabilities.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    position_bucket_size: int = 32
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float

    def __post_init__(self) -> None:
        check_architecture(self)
        least = {"max_position_embeddings": 2, "position_bucket_size": 2}
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "position_bucket_size",
        ):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}; got {getattr(self, name)}")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be above 0; got {self.layer_norm_eps}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}); "
                f"got {self.hidden_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def plain_layer_norm(size: int, config: DisentangledConfig) -> nn.LayerNorm:
    """LN0."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


def projections(
    y: Tensor, layers: Sequence[nn.Linear], at_wanted: Sequence[bool], wanted: WantedRows | None, impl: str
) -> Sequence[Tensor]:
    """What linear layers make of y, in parts of y's width: one product for all rows, and one for wanted rows alone.

    Args:
        y: (total_tokens, hidden_size).
        layers: their outputs, one after the other, are the parts.
        at_wanted: for each part, whether it is needed at the wanted rows alone.
    """
    size = y.shape[-1]
    if wanted is None:
        return joint_product(y, layers, impl).split(size, -1)
    weights = [part for layer in layers for part in layer.weight.split(size)]
    biases = [part for layer in layers for part in layer.bias.split(size)]
    parts: list[Tensor] = [y] * len(weights)
    for few, rows in ((True, wanted_rows(y, wanted)), (False, y)):
        places = [place for place, each in enumerate(at_wanted) if each == few]
        held = ([tensors[place] for place in places] for tensors in (weights, biases))
        for place, part in zip(places, mixed_linear(rows, *held, impl=linear_impl(impl)).split(size, -1), strict=True):
            parts[place] = part
    return parts


class WordEmbedding(nn.Module):
    """dropout(LN0(E[tokens]))"""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens: Tensor, impl: str) -> Tensor:
        # the residual stream begins here: its dtype is the table's
        x = layer_norm(self.table(tokens), eps=self.norm.eps, impl=impl)
        return add_dropout(x, dropout_p=active(self.dropout), impl=impl)


class RelativeEmbedding(nn.Module):
    """dropout(LN(R)), (2 B - 1, hidden_size): computed once per forward, read by every layer's product."""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * config.position_bucket_size - 1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, impl: str) -> Tensor:
        x = normed(self.table.weight, self.norm, impl)
        return add_dropout(x, dropout_p=active(self.dropout), impl=impl)


class DisentangledHeads(nn.Module):
    """softmax(scores) V of all heads, side by side.

    [Q|K] = W_qk y + b; [Qr|Kr] = the same of the relative embedding;
    score(i, j) = (Q_i.K_j + Q_i.Kr_b + K_j.Qr_b) / sqrt(3 head_dim), b = bucket(i - j).
    """

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.query_key = Linear(config.hidden_size, 2 * config.hidden_size)
        self.head_dim = config.head_dim
        self.max_position = config.max_position_embeddings
        self.dropout_p = config.attention_dropout

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, relative: Tensor, packing: Packing, wanted: WantedRows | None
    ) -> Tensor:
        """(n, hidden_size) of q (n, hidden_size), k and v (total_tokens, hidden_size): products of y, as said above."""
        q_rel, k_rel = self.query_key(relative, packing.layer_impl).chunk(2, dim=-1)
        q, k, v, q_rel, k_rel = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v, q_rel, k_rel))
        out = disentangled_attention_varlen(
            q,
            k,
            v,
            q_rel,
            k_rel,
            packing.cu_seqlens if wanted is None else wanted.cu_seqlens,
            packing.cu_seqlens,
            packing.max_seqlen,
            packing.max_seqlen,
            max_position=self.max_position,
            causal=packing.causal,
            prefix_len=packing.prefix_len,
            positions_q=None if wanted is None else wanted.positions,
            dropout_p=self.dropout_p if self.training else 0.0,
            impl=packing.impl,
        )
        return out.flatten(-2)


class FeedForward(nn.Module):
    """dropout(W_out LN0(a * gelu_tanh(g))) with [a|g] = W_in y, y = LN0(x)"""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.wide = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.inner_norm = plain_layer_norm(config.intermediate_size, config)
        self.narrow = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, y: Tensor, impl: str) -> Pending:
        inner = gated_unit(
            self.wide(y, impl), activation="gelu_tanh", gate_first=False, norm_eps=self.inner_norm.eps, impl=impl
        )
        return Pending(self.narrow(inner, impl), active(self.dropout))


class Head(nn.Module):
    """dropout(LN0(gelu(W LN0(x) + b))); the output projection after it is the word embedding, with this bias."""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.inner_norm = plain_layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, impl: str = "auto") -> Tensor:
        inner = F.gelu(self.dense(normed(hidden, self.norm, impl), impl))
        return add_dropout(normed(inner, self.inner_norm, impl), dropout_p=active(self.dropout), impl=impl)


class DisentangledModel(LanguageModel):
    """Embeddings, layers and a head tied to the word embedding; how the layers are joined is the model's.

    Init: matrices and tables from a normal distribution of standard deviation sqrt(2 / (5 hidden_size)), cut at two of
    them; biases 0; both matrices of layer i's feed-forward times sqrt(1 / (2 (1 + i))).
    """

    config: DisentangledConfig

    def __init__(self, config: DisentangledConfig, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = WordEmbedding(config)
        self.relative = RelativeEmbedding(config)
        self.layers = nn.ModuleList(layers)
        self.head = Head(config)
        self.apply(self._initialise)
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                for part in layer.modules():
                    if isinstance(part, FeedForward):
                        part.wide.weight.mul_(math.sqrt(1 / (2 * (1 + i))))
                        part.narrow.weight.mul_(math.sqrt(1 / (2 * (1 + i))))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            std = math.sqrt(2 / (5 * self.config.hidden_size))
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.table.weight

    @property
    def head_bias(self) -> Tensor:
        return self.head.bias

    def head_features(self, hidden: Tensor, impl: str = "auto") -> Tensor:
        features: Tensor = self.head(hidden, layer_impl(impl))
        return features
