"""Which models there are: from a config's architecture to its class, and from a config to its model."""

from __future__ import annotations

from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.models.gpt_bert import GptBert, GptBertConfig
from antlm_fast.models.language_model import LanguageModel
from antlm_fast.models.ltg_bert import LtgBert, LtgBertConfig

ModelConfig = BabyLlamaConfig | LtgBertConfig | GptBertConfig

MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    config.architecture: config for config in (BabyLlamaConfig, LtgBertConfig, GptBertConfig)
}


def build_model(config: ModelConfig) -> LanguageModel:
    """The model of a config, newly initialised from torch's default generator.

    Raises:
        TypeError: config is none of MODEL_CONFIGS.
    """
    if isinstance(config, BabyLlamaConfig):
        return BabyLlama(config)
    if isinstance(config, LtgBertConfig):
        return LtgBert(config)
    if isinstance(config, GptBertConfig):
        return GptBert(config)
    raise TypeError(
        f"config must be one of {', '.join(known.__name__ for known in MODEL_CONFIGS.values())}; "
        f"got {type(config).__name__}"
    )
