# SPDX-License-Identifier: Apache-2.0
# Not type-checked: what it takes and gives is typed by transformers' classes around it.
# mypy: ignore-errors
"""The layers of LTG-BERT and GPT-BERT for transformers; lies beside modeling_antlm_bert.py in every exported folder.

Needs torch and the file of the config alone. LN0 is layer normalisation without affine parameters.
Sources: LTG-BERT, arXiv 2303.09859; GPT-BERT, arXiv 2410.24159.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_antlm_bert import AntlmBertConfig


@lru_cache
def _last_distances(bucket_size: int, max_position: int) -> tuple[int, ...]:
    """The largest distance of each bucket, from bucket 0 on; whole numbers decide, so no logarithm is rounded."""
    mid, furthest = bucket_size // 2, max_position - 1
    near = tuple(range(min(mid, furthest) + 1))
    if furthest <= mid:
        return near
    far = []
    for n in range(1, mid):
        low, high = mid, furthest  # the largest r with (mid - 1) ln(r / mid) <= n ln(furthest / mid)
        while low < high:
            r = (low + high + 1) // 2
            low, high = (r, high) if r ** (mid - 1) * mid**n <= furthest**n * mid ** (mid - 1) else (low, r - 1)
        far.append(low)
    return (*near, *far)


def relative_rows(length: int, config: AntlmBertConfig, device: torch.device) -> Tensor:
    """Row of the relative table for query i and key j, int64 (length, length): bucket(i - j) + B - 1."""
    ends = _last_distances(config.position_bucket_size, config.max_position_embeddings)
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    bucket = torch.bucketize(distance.abs(), torch.tensor(ends[:-1], device=device))
    return torch.sign(distance) * bucket + config.position_bucket_size - 1


def layer_norm(size: int, config: AntlmBertConfig) -> nn.LayerNorm:
    """LN0."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


class Embedding(nn.Module):
    """dropout(LN(table rows))"""

    def __init__(self, num_rows: int, norm: nn.LayerNorm, config: AntlmBertConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(num_rows, config.hidden_size)
        self.norm = norm
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, index: Tensor | None = None) -> Tensor:
        return self.dropout(self.norm(self.table.weight if index is None else self.table(index)))


class _Heads(nn.Module):
    """score(i, j) = (Q_i.K_j + Q_i.Kr_b + K_j.Qr_b) / sqrt(3 head_dim), b = bucket(i - j); softmax; times V."""

    def __init__(self, config: AntlmBertConfig) -> None:
        super().__init__()
        self.query_key = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def _split(self, x: Tensor) -> Tensor:
        """(..., length, hidden_size) to (..., heads, length, head_dim)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def forward(self, y: Tensor, v: Tensor, relative: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        q, k = (self._split(x) for x in self.query_key(y).chunk(2, dim=-1))
        q_rel, k_rel = (self._split(x) for x in self.query_key(relative).chunk(2, dim=-1))
        index = rows.expand(*q.shape[:2], -1, -1)  # (batch, heads, length, length)
        scores = q @ k.transpose(-2, -1)
        scores = scores + (q @ k_rel.transpose(-2, -1)).gather(-1, index)
        scores = scores + (k @ q_rel.transpose(-2, -1)).gather(-1, index.transpose(-2, -1)).transpose(-2, -1)
        scores = scores.float() / math.sqrt(3 * self.head_dim)
        # a row that sees nothing gives 0
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1) * visible
        return (self.dropout(weights.to(v.dtype)) @ self._split(v)).transpose(-3, -2).flatten(-2)


class _Attention(nn.Module):
    """LTG-BERT: LN(W_o heads + b). GPT-BERT: W_o LN0(heads * gelu(G)) + b."""

    def __init__(self, config: AntlmBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.gated = config.architecture == "gpt_bert"
        self.norm = layer_norm(size, config)
        self.heads = _Heads(config)
        if self.gated:
            self.value_gate = nn.Linear(size, 2 * size)
            self.inner_norm = layer_norm(size, config)
        else:
            self.value = nn.Linear(size, size)
            self.out_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.out = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, relative: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        y = self.norm(x)
        if not self.gated:
            return self.dropout(self.out_norm(self.out(self.heads(y, self.value(y), relative, rows, visible))))
        v, gate = self.value_gate(y).chunk(2, dim=-1)
        return self.dropout(self.out(self.inner_norm(self.heads(y, v, relative, rows, visible) * F.gelu(gate))))


class _FeedForward(nn.Module):
    """W_out LN0(a * gelu_tanh(g)) with [a|g] = W_in LN0(x)"""

    def __init__(self, config: AntlmBertConfig, layer: int) -> None:
        super().__init__()
        self.norm = layer_norm(config.hidden_size, config)
        self.wide = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.inner_norm = layer_norm(config.intermediate_size, config)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)
        for part in (self.wide, self.narrow):
            part.init_scale = math.sqrt(1 / (2 * (1 + layer)))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(self.norm(x)).chunk(2, dim=-1)
        return self.dropout(self.narrow(self.inner_norm(value * F.gelu(gate, approximate="tanh"))))


class WeightedSum(nn.Module):
    """GPT-BERT: a learned sum of all outputs so far, taken before they were summed"""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs))

    def forward(self, outputs: list[Tensor]) -> Tensor:
        total = self.weight[-1] * outputs[-1]
        for weight, output in zip(self.weight[:-1].unbind(), outputs[:-1], strict=True):
            total = torch.addcmul(total, weight, output)
        return total


class Layer(nn.Module):
    def __init__(self, config: AntlmBertConfig, number: int) -> None:
        super().__init__()
        self.gpt = config.architecture == "gpt_bert"
        self.attention = _Attention(config)
        self.feed_forward = _FeedForward(config, number)
        if self.gpt:
            self.attention_sum = WeightedSum(2 * number + 2)
            self.feed_forward_sum = WeightedSum(2 * number + 3)

    def forward(self, x: Tensor, outputs: list[Tensor], relative: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        """Appends both sublayers' outputs to `outputs`, where the architecture reads them again."""
        x = x + self.attention(x, relative, rows, visible)
        if self.gpt:
            outputs.append(x)
            x = self.attention_sum(outputs)
        x = x + self.feed_forward(x)
        if self.gpt:
            outputs.append(x)
            x = self.feed_forward_sum(outputs)
        return x


class Head(nn.Module):
    def __init__(self, config: AntlmBertConfig, num_outputs: int) -> None:
        super().__init__()
        self.norm = layer_norm(config.hidden_size, config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_norm = layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.decoder = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.dropout(self.inner_norm(F.gelu(self.dense(self.norm(hidden))))))
