"""LTG-BERT out of plain torch operations, from the paper's equations: what one writes without a kernel.

Two forms of its attention, equal in exact arithmetic:
    gathered  both relative terms are products with the 2B - 1 rows of the table, gathered into the scores
    einsum    the table's rows are gathered to (seqlen, seqlen, heads, head_dim), then multiplied: the equation as it
              stands, and how the paper's own code goes about it; its memory and work grow with seqlen^2 * head_dim

Every sequence has the same length, as in the paper's code. What is as good as it can be in plain torch: the buckets are
computed once, only labelled rows pass the head, the loss is torch's cross-entropy. Parameters have our LtgBert's names,
so its weights are loaded and its gradients compared. Source: arXiv 2303.09859, sections 3 and 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.models import LtgBertConfig

Bias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def bucket_rows(seqlen: int, bucket_size: int, max_position: int, device: str) -> Tensor:
    """Row of the relative table for query i and key j, int64 (seqlen, seqlen)."""
    places = torch.arange(seqlen, dtype=torch.float64)
    distance = places[:, None] - places
    mid = bucket_size // 2
    far = (mid - 1) * torch.log(distance.abs().clamp(min=mid) / mid) / math.log((max_position - 1) / mid)
    # a logarithm that should be whole must not be rounded up by its last bit
    bucket = torch.where(distance.abs() <= mid, distance.abs(), torch.ceil(far - 1e-9) + mid)
    limited = bucket.clamp(max=bucket_size - 1) * distance.sign()
    return (limited.long() + bucket_size - 1).to(device)


def gathered_bias(q: Tensor, k: Tensor, q_rel: Tensor, k_rel: Tensor, rows: Tensor) -> Tensor:
    """q_i . k_rel[b] + k_j . q_rel[b]; q, k (batch, heads, seqlen, head_dim), tables (heads, buckets, head_dim)."""
    index = rows.expand(*q.shape[:2], -1, -1)
    content_to_place = (q @ k_rel.mT).gather(-1, index)
    place_to_content = (k @ q_rel.mT).gather(-1, index.mT).mT
    return content_to_place + place_to_content


def einsum_bias(q: Tensor, k: Tensor, q_rel: Tensor, k_rel: Tensor, rows: Tensor) -> Tensor:
    """The same with the tables' rows gathered for every pair of places."""
    keys, queries = (table.transpose(0, 1)[rows] for table in (k_rel, q_rel))  # (seqlen, seqlen, heads, head_dim)
    return torch.einsum("bhid,ijhd->bhij", q, keys) + torch.einsum("bhjd,ijhd->bhij", k, queries)


FORMS: dict[str, Bias] = {"gathered": gathered_bias, "einsum": einsum_bias}


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rel: Tensor,
    k_rel: Tensor,
    rows: Tensor,
    *,
    causal: bool,
    form: str,
    dropout_p: float = 0.0,
) -> Tensor:
    """q, k, v (batch, heads, seqlen, head_dim), tables (heads, 2B - 1, head_dim), `bucket_rows`, to q's shape."""
    seqlen, head_dim = q.shape[-2:]
    scores = (q @ k.mT + FORMS[form](q, k, q_rel, k_rel, rows)) * (3 * head_dim) ** -0.5
    if causal:
        future = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    probabilities = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return F.dropout(probabilities, dropout_p) @ v


class EagerLtgBert(nn.Module):
    """`form`: "gathered" or "einsum". forward gives the loss's mean over the labelled positions."""

    def __init__(self, config: LtgBertConfig, form: str) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.hidden_dropout)
        size = config.hidden_size
        self.embedding = nn.ModuleDict({"table": nn.Embedding(config.vocab_size, size)})
        self.relative = nn.ModuleDict(
            {
                "table": nn.Embedding(2 * config.position_bucket_size - 1, size),
                "norm": nn.LayerNorm(size, eps=config.layer_norm_eps),
            }
        )
        self.layers = nn.ModuleList(_Layer(config, form) for _ in range(config.num_hidden_layers))
        self.head = nn.ModuleDict({"dense": nn.Linear(size, size)})
        self.head.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)))

    def bucket_rows(self, seqlen: int, device: str) -> Tensor:
        return bucket_rows(seqlen, self.config.position_bucket_size, self.config.max_position_embeddings, device)

    def forward(self, ids: Tensor, labelled: Tensor, targets: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
        """ids (batch, seqlen); labelled positions among all of them; their targets; `bucket_rows` of the length."""
        x = self.dropout(self._plain_norm(self.embedding["table"](ids)))
        relative = self.dropout(self.relative["norm"](self.relative["table"].weight))
        for layer in self.layers:
            x = layer(x, relative, rows, causal)
        read = x.flatten(0, 1).index_select(0, labelled)
        features = self.dropout(self._plain_norm(F.gelu(self.head["dense"](self._plain_norm(read)))))
        logits = F.linear(features, self.embedding["table"].weight, self.head.bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def _plain_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)


class _Layer(nn.Module):
    def __init__(self, config: LtgBertConfig, form: str) -> None:
        super().__init__()
        self.attention = _Attention(config, form)
        self.feed_forward = _FeedForward(config)

    def forward(self, x: Tensor, relative: Tensor, rows: Tensor, causal: bool) -> Tensor:
        x = x + self.attention(x, relative, rows, causal)
        return x + self.feed_forward(x)


class _Attention(nn.Module):
    def __init__(self, config: LtgBertConfig, form: str) -> None:
        super().__init__()
        self.config = config
        self.form = form
        size = config.hidden_size
        self.heads = nn.ModuleDict({"query_key": nn.Linear(size, 2 * size)})
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)
        self.out_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, relative: Tensor, rows: Tensor, causal: bool) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)
        q, k = self.heads["query_key"](y).chunk(2, dim=-1)
        q_rel, k_rel = self.heads["query_key"](relative).chunk(2, dim=-1)
        # (..., heads, length, head_dim)
        q, k, v, q_rel, k_rel = (
            each.unflatten(-1, (-1, self.config.head_dim)).transpose(-2, -3)
            for each in (q, k, self.value(y), q_rel, k_rel)
        )
        context = disentangled_attention(
            q,
            k,
            v,
            q_rel,
            k_rel,
            rows,
            causal=causal,
            form=self.form,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
        )
        return self.dropout(self.out_norm(self.out(context.transpose(-2, -3).flatten(-2))))


class _FeedForward(nn.Module):
    def __init__(self, config: LtgBertConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.wide = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(F.layer_norm(x, x.shape[-1:], eps=self.eps)).chunk(2, dim=-1)
        inner = value * F.gelu(gate, approximate="tanh")
        return self.dropout(self.narrow(F.layer_norm(inner, inner.shape[-1:], eps=self.eps)))
