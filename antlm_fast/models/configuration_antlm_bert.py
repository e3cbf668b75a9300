# SPDX-License-Identifier: Apache-2.0
# Not type-checked: releases of transformers type the class that is subclassed here in different ways.
# mypy: ignore-errors
"""Sizes of LTG-BERT and GPT-BERT for transformers; lies beside modeling_antlm_bert.py in every exported model folder.

Needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


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
