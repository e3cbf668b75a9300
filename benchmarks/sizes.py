"""How large the workloads are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antlm_fast.models import BabyLlamaConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of every suite.

    Args:
        rounds, step_rounds: timed calls of each provider; of whole training steps.
        gemm_side: of the square matrices of the peak.
        attention: (batch, heads, seqlen, head_dim) each.
        cross_entropy: rows, hidden_size, vocab_size.
        model: of train_step and switch.
        batches: (sequences, tokens in each) of train_step; switch takes the first.
        flips, phase_steps: of switch: how often the objective changes, and steps between two changes.
    """

    rounds: int
    step_rounds: int
    gemm_side: int
    attention: tuple[tuple[int, int, int, int], ...]
    cross_entropy: tuple[int, int, int]
    model: BabyLlamaConfig
    batches: tuple[tuple[int, int], ...]
    flips: int
    phase_steps: int


SIZES = {
    "full": Sizes(
        rounds=9,
        step_rounds=3,
        gemm_side=2048,
        attention=((16, 8, 128, 64), (4, 8, 512, 64), (16, 6, 128, 64)),
        cross_entropy=(2048, 512, 16001),
        model=BabyLlamaConfig(vocab_size=16001),  # BabyLlama-58M and its mask token
        batches=((16, 128), (4, 512)),
        flips=6,
        phase_steps=3,
    ),
    "quick": Sizes(
        rounds=3,
        step_rounds=3,
        gemm_side=1024,
        attention=((8, 4, 128, 64), (2, 4, 512, 64)),
        cross_entropy=(512, 256, 8001),
        model=BabyLlamaConfig(
            vocab_size=8001, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
        ),
        batches=((8, 128),),
        flips=4,
        phase_steps=3,
    ),
    "tiny": Sizes(
        rounds=2,
        step_rounds=2,
        gemm_side=64,
        attention=((2, 2, 16, 16),),
        cross_entropy=(64, 32, 101),
        model=BabyLlamaConfig(
            vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        batches=((4, 16),),
        flips=2,
        phase_steps=2,
    ),
}
