"""Attention with relative positions in both directions (LTG-BERT, DeBERTa), whose visibility is data."""

from antlm_fast.kernels.disentangled_attention.api import (
    OPS,
    disentangled_attention,
    disentangled_attention_varlen,
)
from antlm_fast.kernels.disentangled_attention.buckets import relative_bucket

__all__ = ["OPS", "disentangled_attention", "disentangled_attention_varlen", "relative_bucket"]
