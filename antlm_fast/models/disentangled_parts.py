"""What LTG-BERT and GPT-BERT are both made of: sizes, embeddings, the attention core, the feed-forward and the head.

LN0 is layer normalisation without affine parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.models.language_model import LanguageModel, Packing, check_architecture


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


def plain_layer_norm(size: int, config: DisentangledConfig) -> nn.LayerNorm:
    """LN0."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


def linear_halves(linear: nn.Linear, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer's first half of outputs at `first`, its second at `second`; one product where they are one."""
    if first is second:
        a, b = linear(first).chunk(2, dim=-1)
        return a, b
    weights, biases = linear.weight.chunk(2), linear.bias.chunk(2)
    return F.linear(first, weights[0], biases[0]), F.linear(second, weights[1], biases[1])


class WordEmbedding(nn.Module):
    """dropout(LN0(E[tokens]))"""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.norm(self.table(tokens)))


class RelativeEmbedding(nn.Module):
    """dropout(LN(R)), (2 B - 1, hidden_size): computed once per forward, read by every layer."""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * config.position_bucket_size - 1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self) -> Tensor:
        return self.dropout(self.norm(self.table.weight))


class DisentangledHeads(nn.Module):
    """softmax(scores) V of all heads, side by side.

    [Q|K] = W_qk y + b; [Qr|Kr] = the same of the relative embedding;
    score(i, j) = (Q_i.K_j + Q_i.Kr_b + K_j.Qr_b) / sqrt(3 head_dim), b = bucket(i - j).
    """

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.query_key = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.head_dim = config.head_dim
        self.max_position = config.max_position_embeddings
        self.dropout_p = config.attention_dropout

    def forward(self, y: Tensor, v: Tensor, relative: Tensor, packing: Packing, wanted: WantedRows | None) -> Tensor:
        """(n, hidden_size) of y and v, (total_tokens, hidden_size)."""
        q, k = linear_halves(self.query_key, wanted_rows(y, wanted), y)
        q_rel, k_rel = linear_halves(self.query_key, relative, relative)
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
    """dropout(W_out LN0(a * gelu_tanh(g))) with [a|g] = W_in LN0(x)"""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.wide = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.inner_norm = plain_layer_norm(config.intermediate_size, config)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(self.norm(x)).chunk(2, dim=-1)
        return self.dropout(self.narrow(self.inner_norm(value * F.gelu(gate, approximate="tanh"))))


class Head(nn.Module):
    """dropout(LN0(gelu(W LN0(x) + b))); the output projection after it is the word embedding, with this bias."""

    def __init__(self, config: DisentangledConfig) -> None:
        super().__init__()
        self.norm = plain_layer_norm(config.hidden_size, config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_norm = plain_layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.inner_norm(F.gelu(self.dense(self.norm(hidden)))))


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

    def head_features(self, hidden: Tensor) -> Tensor:
        features: Tensor = self.head(hidden)
        return features
