"""GPT-BERT: both objectives in every batch, and the same model under whole epochs of each."""

from __future__ import annotations

from dataclasses import replace

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import GptBertConfig
from antlm_fast.objectives import MaskingConfig
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import EvaluationConfig, LoggingConfig, LossConfig, TrainConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig


def gptbert() -> TrainConfig:
    """GPT-BERT small: in every batch 15 of 16 sequences MNTP and one CLM, on one device (29.9M parameters)."""
    return TrainConfig(
        name="gptbert",
        # share of MNTP: GPT-BERT, arXiv 2410.24159; 10 epochs: the BabyLM challenge's most, for which the paper's
        # scores are compared. Every labelled token weighs the same (the project's choice), so CLM, which labels all
        # positions, is 18 % of the loss at the first mask rate and 31 % at the last. The published code weighs the
        # mean loss of each GPU the same, so that CLM is a sixteenth, unless it is told to weigh tokens.
        schedule="10_MIX(0.9375,MNTP)",
        model=GptBertConfig(
            hidden_size=384,  # GPT-BERT: small, and so the next three
            intermediate_size=1280,
            num_hidden_layers=12,
            num_attention_heads=6,
            max_position_embeddings=512,  # the same: its longest sequences
            position_bucket_size=32,  # LTG-BERT, arXiv 2303.09859, and so the next two
            hidden_dropout=0.1,
            attention_dropout=0.1,
            layer_norm_eps=1e-5,  # GPT-BERT
        ),
        tokenizer=TokenizerConfig(
            kind="byte_level_bpe",  # the project's choice
            vocab_size=8192,  # GPT-BERT on 10M words; one mask token is added
        ),
        data=DataConfig(
            train=None,  # the user's (--data); BabyLM strict-small, 10M words, in GPT-BERT
            row_mode="stream",  # the project's choice
            row_tokens=128,  # GPT-BERT: its first 70 % of steps
        ),
        masking=MaskingConfig(
            strategy="span-uniform",  # GPT-BERT
            rate=0.30,  # the same
            final_rate=0.15,  # the same, linear in steps
            mask_share=0.8,  # BERT's, as LTG-BERT
            random_share=0.1,  # the same
        ),
        batch=BatchConfig(
            rows_per_step=128,  # the project's choice: 10 epochs of 10M words are then some 13,000 steps
            length_ramp=("256@0.7", "512@0.9"),  # GPT-BERT
            ramp_from=0.25,  # GPT-BERT
        ),
        loss=LossConfig(z_loss=1e-4),  # GPT-BERT
        optimizer=OptimizerConfig(
            kind="lamb",  # GPT-BERT, and so all that follows here
            lr=1.41e-2,
            beta1=0.9,
            beta2=0.98,
            eps=1e-8,
            weight_decay=0.1,
            decay_embeddings=True,  # its published code leaves out biases and norms alone
            clip_norm=2.0,
            ema_decay=0.999,
        ),
        lr_schedule=LrScheduleConfig(
            warmup_steps=0,
            warmup_share=0.016,  # LTG-BERT, and so the next
            final_share=0.1,
        ),
        evaluation=EvaluationConfig(read_outs=("causal", "mntp")),  # what it is trained for
        logging=LoggingConfig(every_steps=50),
    )


def antlm_gptbert() -> TrainConfig:
    """AntLM's alternation for GPT-BERT (the project's own): whole epochs of CLM, MNTP, CLM instead of a mix."""
    return replace(
        gptbert(),
        name="antlm-gptbert",
        # the project's choice: AntLM's shape (arXiv 2412.03275) in GPT-BERT's epochs, MNTP as the masked objective,
        # so that the head means the same throughout. An epoch is a tenth of the steps: the first reads less text
        # than the last, as the batch grows.
        schedule="1_CLM+8_MNTP+1_CLM",
    )


def demo_gptbert() -> TrainConfig:
    """A small GPT-BERT on generated English: both objectives in every batch, minutes on a CPU."""
    base = gptbert()
    return replace(
        base,
        name="demo-gptbert",
        schedule="6_MIX(0.9375,MNTP)",
        model=GptBertConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        tokenizer=TokenizerConfig(kind="byte_level_bpe", vocab_size=1500),
        data=replace(base.data, train="builtin", builtin_words=400_000, row_tokens=32),
        batch=BatchConfig(rows_per_step=64, length_ramp=("64@0.7", "128@0.9"), ramp_from=0.25),
        optimizer=replace(base.optimizer, ema_decay=0.98),  # some 2,400 steps: a shorter memory
        evaluation=replace(base.evaluation, minimal_pairs="builtin", every_steps=100),
        logging=LoggingConfig(every_steps=10),
    )
