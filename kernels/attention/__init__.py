"""Softmax attention whose visibility is data: causal, bidirectional and prefix-LM sequences, dense or packed."""

from antlm_fast.kernels.attention.api import OPS, AttentionCall, attention, attention_varlen

__all__ = ["OPS", "AttentionCall", "attention", "attention_varlen"]
