"""The demo: the whole way on the built-in corpus, in minutes on two CPU cores."""

from __future__ import annotations

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import BabyLlamaConfig
from antlm_fast.objectives import MaskingConfig
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import EvaluationConfig, LoggingConfig, TrainConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig


def demo() -> TrainConfig:
    """A small BabyLlama on generated English; numbers chosen on two CPU cores, see docs/results.md."""
    return TrainConfig(
        name="demo",
        schedule="2_CLM+4_MLM+2_CLM",  # AntLM's shape, CLM at both ends
        model=BabyLlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
        ),
        tokenizer=TokenizerConfig(kind="byte_level_bpe", vocab_size=1500),
        data=DataConfig(train="builtin", builtin_words=400_000, row_mode="stream", row_tokens=64),
        masking=MaskingConfig(strategy="token", rate=0.15),
        batch=BatchConfig(rows_per_step=32),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, clip_norm=1.0),
        lr_schedule=LrScheduleConfig(warmup_steps=50),
        evaluation=EvaluationConfig(minimal_pairs="builtin", every_steps=100),
        logging=LoggingConfig(every_steps=10),
    )
