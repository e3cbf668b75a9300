"""Models: each one readable file; every model takes its visibility as data."""

from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.models.pretrained import load_pretrained, save_pretrained

__all__ = ["BabyLlama", "BabyLlamaConfig", "load_pretrained", "save_pretrained"]
