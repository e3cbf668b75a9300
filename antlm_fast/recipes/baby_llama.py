"""BabyLlama-58M under one objective, and AntLM's alternations of both."""

from __future__ import annotations

from dataclasses import replace

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import BabyLlamaConfig
from antlm_fast.objectives import MaskingConfig
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import TrainConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig


def babyllama() -> TrainConfig:
    """BabyLlama-58M, causal language modelling only: the baseline of AntLM (58.34M parameters)."""
    return TrainConfig(
        name="babyllama",
        schedule="24_CLM",  # AntLM, arXiv 2412.03275: 24 epochs for BabyLlama
        model=BabyLlamaConfig(
            hidden_size=512,  # BabyLlama, arXiv 2308.02019: the 58M student, and so the next four
            intermediate_size=1024,
            num_hidden_layers=16,
            num_attention_heads=8,
            tie_word_embeddings=False,
        ),
        tokenizer=TokenizerConfig(
            kind="byte_level_bpe",  # BabyLlama's published tokenizer
            vocab_size=16000,  # the same; AntLM adds one mask token
            min_frequency=2,  # the same
        ),
        data=DataConfig(
            train=None,  # the user's (--data); BabyLM strict-small, 10M words, in AntLM
            row_mode="stream",  # BabyLlama: all text one stream, a random offset each epoch
            row_tokens=128,  # BabyLlama's student
        ),
        batch=BatchConfig(rows_per_step=32),  # BabyLlama's student: 32 x 128 tokens
        optimizer=OptimizerConfig(
            lr=2.5e-4,  # BabyLlama's student
            weight_decay=0.1,  # the same
            clip_norm=1.0,  # the same
        ),
        lr_schedule=LrScheduleConfig(warmup_steps=200),  # BabyLlama's student: cosine to 0 after 200 steps
    )


def babyllama_mlm() -> TrainConfig:
    """BabyLlama-58M, masked language modelling only, for as many epochs."""
    return replace(
        babyllama(),
        name="babyllama-mlm",
        schedule="24_MLM",  # as many epochs as the baseline
        masking=MaskingConfig(
            strategy="token",  # AntLM is silent; each token on its own, as BERT
            rate=0.15,  # AntLM, arXiv 2412.03275
            mask_share=0.8,  # the same
            random_share=0.1,  # the same
        ),
    )


def antlm_babyllama() -> TrainConfig:
    """AntLM's best alternation for BabyLlama: 4 epochs of CLM, 16 of MLM, 4 of CLM."""
    return replace(
        babyllama_mlm(),
        name="antlm-babyllama",
        schedule="4_CLM+16_MLM+4_CLM",  # AntLM, arXiv 2412.03275: +1.0 macro average over CLM alone
    )


def antlm_babyllama_8_8_8() -> TrainConfig:
    """AntLM's alternation with equal phases."""
    return replace(
        babyllama_mlm(),
        name="antlm-babyllama-8-8-8",
        schedule="8_CLM+8_MLM+8_CLM",  # AntLM, arXiv 2412.03275: compared with 4+16+4
    )
