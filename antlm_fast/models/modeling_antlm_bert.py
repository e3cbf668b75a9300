# SPDX-License-Identifier: Apache-2.0
# Not type-checked: releases of transformers type the classes that are subclassed here in different ways.
# mypy: ignore-errors
"""LTG-BERT and GPT-BERT as antlm_fast trains them, for transformers: every exported model folder holds a copy.

Needs torch, transformers and the files of config and layers alone. One set of weights, two classes that differ in what
a token sees: AntlmBertForMaskedLM (the whole sequence) and AntlmBertForCausalLM (its past). A call's is_causal
overrules the class. AntlmBertModel gives hidden states, AntlmBertForSequenceClassification puts a new head on them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    MaskedLMOutput,
    ModelOutput,
    SequenceClassifierOutput,
)

# by a dot: transformers copies the files into one folder
from .configuration_antlm_bert import AntlmBertConfig
from .layers_antlm_bert import Embedding, Head, Layer, WeightedSum, layer_norm, relative_rows


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
    _no_split_modules = ("Layer",)

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
        if isinstance(module, WeightedSum) and not getattr(module.weight, "_is_hf_initialized", False):
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
        self.embedding = Embedding(config.vocab_size, layer_norm(size, config), config)
        self.relative = Embedding(2 * config.position_bucket_size - 1, nn.LayerNorm(size, eps=eps), config)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
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
        rows = relative_rows(length, self.config, input_ids.device)
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
        self.head = Head(config, config.vocab_size)
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


class AntlmBertForSequenceClassification(AntlmBertPreTrainedModel):
    """A new head, built as the language model's, on the first token; every token sees the whole sequence."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^head\."]

    def __init__(self, config: AntlmBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AntlmBertModel(config)
        self.classifier = Head(config, config.num_labels)
        self.post_init()

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
        """logits, (batch, num_labels), and with labels the loss.

        Args:
            labels: as config.problem_type says, which is guessed where it is None: float (batch,) for one label
                (squared error), int64 (batch,) for classes (cross-entropy), else float (batch, num_labels), each
                label on or off.
            is_causal: refused where true, because the first token would see itself alone.
            num_items_in_batch: divisor of the summed loss (Trainer's accumulation); None is the mean.
        """
        if is_causal:
            raise ValueError(f"is_causal must be False or None: the first token is what is classified; got {is_causal}")
        body = self.model(input_ids, attention_mask, return_dict=True, **kwargs)
        hidden = body.last_hidden_state
        first = torch.zeros_like(input_ids[:, 0]) if attention_mask is None else attention_mask.int().argmax(dim=-1)
        logits = self.classifier(hidden[torch.arange(len(hidden), device=hidden.device), first])
        loss = None
        if labels is not None:
            whole = num_items_in_batch is None
            loss = self._loss(logits.float(), labels.to(logits.device), "mean" if whole else "sum")
            loss = loss if whole else loss / num_items_in_batch
        result = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return self._in_form(result, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        kind = self.config.problem_type
        if kind == "regression" or (kind is None and self.num_labels == 1):
            return F.mse_loss(logits, labels.float().view_as(logits), reduction=reduction)
        if kind == "single_label_classification" or (kind is None and not labels.is_floating_point()):
            return F.cross_entropy(logits, labels, reduction=reduction)
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction=reduction)
