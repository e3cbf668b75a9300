# SPDX-License-Identifier: Apache-2.0
# Not type-checked: releases of transformers type the classes that are subclassed here in different ways.
# mypy: ignore-errors
"""LTG-BERT and GPT-BERT as antlm_fast trains them, for transformers: every exported model folder holds a copy.

Needs torch and transformers alone. One set of weights, two classes that differ in what a token sees:
AntlmBertForMaskedLM (the whole sequence) and AntlmBertForCausalLM (its past). A call's is_causal overrules the class.

LN0 is layer normalisation without affine parameters. Sources: LTG-BERT, arXiv 2303.09859; GPT-BERT, arXiv 2410.24159.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput, ModelOutput


class AntlmBertConfig(PretrainedConfig):
    """Sizes; the fields are those of antlm_fast's LtgBertConfig and GptBertConfig."""

    model_type = "antlm_bert"

    def __init__(
        self,
        architecture: str = "ltg_bert",
        vocab_size: int = 16384,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 512,
        position_bucket_size: int = 32,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layer_norm_eps: float | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if architecture not in ("ltg_bert", "gpt_bert"):
            raise ValueError(f"architecture must be 'ltg_bert' or 'gpt_bert'; got {architecture!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({num_attention_heads}); got {hidden_size}"
            )
        if not kwargs.setdefault("tie_word_embeddings", True):
            raise ValueError("tie_word_embeddings must be True: the head has no matrix of its own; got False")
        if kwargs.get("is_causal") is not None or kwargs.get("is_decoder"):
            # kept in a config it would outlive the call it was meant for
            raise ValueError(
                "is_causal and is_decoder must not be in the config: the class says what a token sees, or the call's "
                f"is_causal; got is_causal={kwargs.get('is_causal')}, is_decoder={kwargs.get('is_decoder')}"
            )
        super().__init__(**kwargs)
        self.architecture = architecture
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings, self.position_bucket_size = max_position_embeddings, position_bucket_size
        self.hidden_dropout, self.attention_dropout = hidden_dropout, attention_dropout
        default_eps = 1e-7 if architecture == "ltg_bert" else 1e-5
        self.layer_norm_eps = default_eps if layer_norm_eps is None else layer_norm_eps
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id, self.mask_token_id = pad_token_id, mask_token_id


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


def _relative_rows(length: int, config: AntlmBertConfig, device: torch.device) -> Tensor:
    """Row of the relative table for query i and key j, int64 (length, length): bucket(i - j) + B - 1."""
    ends = _last_distances(config.position_bucket_size, config.max_position_embeddings)
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    bucket = torch.bucketize(distance.abs(), torch.tensor(ends[:-1], device=device))
    return torch.sign(distance) * bucket + config.position_bucket_size - 1


def _layer_norm(size: int, config: AntlmBertConfig) -> nn.LayerNorm:
    """LN0."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


class _Embedding(nn.Module):
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
        self.norm = _layer_norm(size, config)
        self.heads = _Heads(config)
        if self.gated:
            self.value_gate = nn.Linear(size, 2 * size)
            self.inner_norm = _layer_norm(size, config)
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
        self.norm = _layer_norm(config.hidden_size, config)
        self.wide = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.inner_norm = _layer_norm(config.intermediate_size, config)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)
        for part in (self.wide, self.narrow):
            part.init_scale = math.sqrt(1 / (2 * (1 + layer)))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(self.norm(x)).chunk(2, dim=-1)
        return self.dropout(self.narrow(self.inner_norm(value * F.gelu(gate, approximate="tanh"))))


class _WeightedSum(nn.Module):
    """GPT-BERT: a learned sum of all outputs so far, taken before they were summed"""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs))

    def forward(self, outputs: list[Tensor]) -> Tensor:
        total = self.weight[-1] * outputs[-1]
        for weight, output in zip(self.weight[:-1].unbind(), outputs[:-1], strict=True):
            total = torch.addcmul(total, weight, output)
        return total


class _Layer(nn.Module):
    def __init__(self, config: AntlmBertConfig, number: int) -> None:
        super().__init__()
        self.gpt = config.architecture == "gpt_bert"
        self.attention = _Attention(config)
        self.feed_forward = _FeedForward(config, number)
        if self.gpt:
            self.attention_sum = _WeightedSum(2 * number + 2)
            self.feed_forward_sum = _WeightedSum(2 * number + 3)

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


class _Head(nn.Module):
    def __init__(self, config: AntlmBertConfig) -> None:
        super().__init__()
        self.norm = _layer_norm(config.hidden_size, config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_norm = _layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.dropout(self.inner_norm(F.gelu(self.dense(self.norm(hidden))))))


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """What would change the result elsewhere must not pass unheeded here; use_cache never changes it."""
    arguments.pop("use_cache", None)
    token_types = arguments.pop("token_type_ids", None)
    if token_types is not None and bool(token_types.any()):
        raise ValueError("token_type_ids must be all 0: the model has no token types; got others")
    given = sorted(name for name, value in arguments.items() if value is not None and value is not False)
    if given:
        raise TypeError(f"forward must be called with arguments that it knows; got {', '.join(given)}")


class AntlmBertPreTrainedModel(PreTrainedModel):
    config_class = AntlmBertConfig
    base_model_prefix = "model"
    _no_split_modules = ("_Layer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal of standard deviation sqrt(2 / (5 hidden_size)), as in antlm_fast; loaded weights stay."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = math.sqrt(2 / (5 * self.config.hidden_size)) * getattr(module, "init_scale", 1.0)
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, _WeightedSum) and not getattr(module.weight, "_is_hf_initialized", False):
            module.weight.zero_()
            module.weight[-1] = 1.0

    def _in_form(self, result: ModelOutput, return_dict: bool | None) -> Any:
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


class AntlmBertModel(AntlmBertPreTrainedModel):
    """The body; a token sees the whole sequence unless is_causal."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^head\."]

    def __init__(self, config: AntlmBertConfig) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.layer_norm_eps
        self.embedding = _Embedding(config.vocab_size, _layer_norm(size, config), config)
        self.relative = _Embedding(2 * config.position_bucket_size - 1, nn.LayerNorm(size, eps=eps), config)
        self.layers = nn.ModuleList(_Layer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.table = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        is_causal: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """last_hidden_state, (batch, length, hidden_size).

        Args:
            input_ids: int64 (batch, length).
            attention_mask: (batch, length), 0 at padding, on either side; None is no padding.
        """
        _refuse_unknown(kwargs)
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids must have at most {self.config.max_position_embeddings} tokens a sequence; got {length}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}; got {tuple(attention_mask.shape)}"
            )
        visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device)
        if is_causal:
            visible = visible.tril()
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None, :]
        rows = _relative_rows(length, self.config, input_ids.device)
        x, relative = self.embedding(input_ids), self.relative()
        outputs, states = [x], [x]
        for layer in self.layers:
            x = layer(x, outputs, relative, rows, visible)
            states.append(x)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        result = BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)
        return self._in_form(result, return_dict)


class _LanguageModel(AntlmBertPreTrainedModel):
    _tied_weights_keys: ClassVar = {"head.decoder.weight": "model.embedding.table.weight"}
    causal: bool

    def __init__(self, config: AntlmBertConfig) -> None:
        super().__init__(config)
        self.model = AntlmBertModel(config)
        self.head = _Head(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        is_causal: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """logits, (batch, length, vocab_size), and with labels the loss.

        Args:
            labels: int64 (batch, length), -100 where there is none. Masked: labels[t] is what position t predicts.
                Causal: labels are input_ids, and position t predicts labels[t + 1].
            is_causal: None is the class's own. It never moves the labels: those go by the class.
            num_items_in_batch: divisor of the summed loss (Trainer's accumulation); None is the mean.
        """
        is_causal = self.causal if is_causal is None else is_causal
        body = self.model(input_ids, attention_mask, is_causal=is_causal, return_dict=True, **kwargs)
        logits = self.head(body.last_hidden_state)
        loss = None
        if labels is not None:
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if self.causal else labels
            flat = logits.float().flatten(0, 1), targets.flatten().to(logits.device)
            whole = num_items_in_batch is None
            loss = F.cross_entropy(*flat) if whole else F.cross_entropy(*flat, reduction="sum") / num_items_in_batch
        kind = CausalLMOutput if self.causal else MaskedLMOutput
        result = kind(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return self._in_form(result, return_dict)


class AntlmBertForMaskedLM(_LanguageModel):
    """Every token sees the whole sequence; labels are not moved."""

    causal = False


class AntlmBertForCausalLM(_LanguageModel, GenerationMixin):
    """Every token sees its past; labels are moved by one. generate() computes the whole sequence at each step."""

    causal = True

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
