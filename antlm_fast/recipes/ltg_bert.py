"""LTG-BERT under one objective, AntLM's alternation for it, and sizes that a CPU can train."""

from __future__ import annotations

from dataclasses import replace

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import LtgBertConfig
from antlm_fast.objectives import MaskingConfig
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import EvaluationConfig, LoggingConfig, TrainConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig


def ltgbert() -> TrainConfig:
    """LTG-BERT small, masked language modelling only: the baseline of AntLM (23.8M parameters)."""
    return TrainConfig(
        name="ltgbert",
        schedule="72_MLM",  # AntLM, arXiv 2412.03275: 72 epochs for LTG-BERT
        model=LtgBertConfig(
            hidden_size=384,  # LTG-BERT, arXiv 2303.09859: small, and so the next three
            intermediate_size=1024,
            num_hidden_layers=12,
            num_attention_heads=6,
            max_position_embeddings=512,  # the same: its longest sequences
            position_bucket_size=32,  # the same, and so the next three
            hidden_dropout=0.1,
            attention_dropout=0.1,
            layer_norm_eps=1e-7,
        ),
        tokenizer=TokenizerConfig(
            kind="word_piece",  # LTG-BERT's published tokenizer
            vocab_size=6144,  # LTG-BERT on 10M words
        ),
        data=DataConfig(
            train=None,  # the user's (--data); BabyLM strict-small, 10M words, in AntLM
            row_mode="stream",  # the project's choice: LTG-BERT fills its items with text of one document
            row_tokens=128,  # LTG-BERT: its first 90 % of steps
            short_share=0.1,  # LTG-BERT: a tenth of the items is shorter
        ),
        masking=MaskingConfig(
            strategy="span",  # LTG-BERT
            rate=0.15,  # LTG-BERT; AntLM
            mask_share=0.8,  # AntLM, arXiv 2412.03275
            random_share=0.1,  # the same
        ),
        batch=BatchConfig(
            rows_per_step=512,  # the project's choice: 72 epochs of 10M words are then LTG-BERT's 15,625 steps or so
            length_ramp=("512@0.9",),  # LTG-BERT: a quarter of the sequences, four times as long, the last 10 %
        ),
        optimizer=OptimizerConfig(
            kind="lamb",  # LTG-BERT, and so all that follows here
            lr=1e-2,
            beta1=0.9,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.1,
            decay_embeddings=False,
            clip_norm=2.0,
        ),
        lr_schedule=LrScheduleConfig(
            warmup_steps=0,
            warmup_share=0.016,  # LTG-BERT: 250 of 15,625 steps
            final_share=0.1,  # LTG-BERT: one cosine to a tenth of the peak
        ),
        logging=LoggingConfig(every_steps=50),
    )


def ltgbert_clm() -> TrainConfig:
    """LTG-BERT small, causal language modelling only, for as many epochs."""
    return replace(ltgbert(), name="ltgbert-clm", schedule="72_CLM")  # as many epochs as the baseline


def antlm_ltgbert() -> TrainConfig:
    """AntLM's best alternation for LTG-BERT: 6 epochs of CLM, 60 of MLM, 6 of CLM."""
    return replace(
        ltgbert(),
        name="antlm-ltgbert",
        schedule="6_CLM+60_MLM+6_CLM",  # AntLM, arXiv 2412.03275: +2.2 macro average over MLM alone
    )


def antlm_ltgbert_xs() -> TrainConfig:
    """The same proportions for LTG-BERT xs on a CPU: BabyLM-sized text, a sixth of the epochs."""
    base = antlm_ltgbert()
    return replace(
        base,
        name="antlm-ltgbert-xs",
        schedule="1_CLM+10_MLM+1_CLM",  # the project's choice: AntLM's 1 : 10 : 1 in CPU time
        model=replace(
            base.model,
            hidden_size=192,  # LTG-BERT, arXiv 2303.09859: xs, and so the next three
            intermediate_size=512,
            num_hidden_layers=12,
            num_attention_heads=3,
        ),
        # the project's choice: some 10,000 steps on 10M words; the micro-batch stays in a desktop's memory
        batch=replace(base.batch, rows_per_step=128, rows_per_micro_batch=64),
    )


def demo_ltgbert() -> TrainConfig:
    """A small LTG-BERT on generated English: AntLM's shape, minutes on a CPU."""
    base = antlm_ltgbert()
    return replace(
        base,
        name="demo-ltgbert",
        schedule="1_CLM+5_MLM+1_CLM",  # AntLM's shape, CLM at both ends
        model=LtgBertConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        tokenizer=TokenizerConfig(kind="word_piece", vocab_size=1500),
        data=replace(base.data, train="builtin", builtin_words=400_000, row_tokens=64),
        batch=BatchConfig(rows_per_step=32, length_ramp=("128@0.9",)),
        evaluation=EvaluationConfig(minimal_pairs="builtin", every_steps=100),
        logging=LoggingConfig(every_steps=10),
    )
