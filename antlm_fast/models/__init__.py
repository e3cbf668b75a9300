"""Models: each one readable file; every model takes its visibility as data."""

from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.models.gpt_bert import GptBert, GptBertConfig
from antlm_fast.models.language_model import LanguageModel
from antlm_fast.models.ltg_bert import LtgBert, LtgBertConfig
from antlm_fast.models.pretrained import load_pretrained, save_pretrained
from antlm_fast.models.public_checkpoints import convert_state_dict, load_public_checkpoint
from antlm_fast.models.registry import MODEL_CONFIGS, ModelConfig, build_model

__all__ = [
    "MODEL_CONFIGS",
    "BabyLlama",
    "BabyLlamaConfig",
    "GptBert",
    "GptBertConfig",
    "LanguageModel",
    "LtgBert",
    "LtgBertConfig",
    "ModelConfig",
    "build_model",
    "convert_state_dict",
    "load_pretrained",
    "load_public_checkpoint",
    "save_pretrained",
]
