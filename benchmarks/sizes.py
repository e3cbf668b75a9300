"""How large the workloads are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antlm_fast.models import BabyLlamaConfig, LtgBertConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Training steps that are compared: one model's size, one batch, some ways of doing the step.

    Args:
        model: name in Sizes.models.
        batch: sequences, and tokens in each.
        precision: "bf16" or "fp32".
        objectives: each a case of its own.
        variants: names in step_workloads.VARIANTS; the first is the one compared with.
        rounds: timed steps of each.
    """

    model: str
    batch: tuple[int, int]
    precision: str
    objectives: tuple[str, ...]
    variants: tuple[str, ...]
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of every suite.

    Args:
        rounds: timed calls of each provider, of single operations.
        minutes: the most that each suite may take; what has had no turn by then says so.
        gemm, stream_mib: of the limits: products (rows, inner, columns); one tensor of the memory's.
        attention, disentangled: (batch, heads, seqlen, head_dim) each.
        cross_entropy: rows, hidden_size, vocab_size.
        layers: tokens, hidden_size, intermediate_size, heads.
        models: by name.
        scenes: of train_step.
        switch: scenes of switch.
        flips, phase_steps: of switch: how often the objective changes, and steps between two changes.
        memory_loss, memory_lengths: (rows, vocabulary, labelled share) each; lengths of disentangled attention.
        memory_steps: scenes whose steps' memory is measured.
        lengths, vocabularies, batches, depths: of scaling, the last two with models like scaling_model.
        documents: of the corpus that the data suite reads, in tokens.
        compiled: whether peers are compiled; where not, their rows say so.
    """

    rounds: int
    minutes: dict[str, float]
    gemm: tuple[tuple[int, int, int], ...]
    stream_mib: int
    attention: tuple[Shape, ...]
    disentangled: tuple[Shape, ...]
    cross_entropy: tuple[int, int, int]
    layers: tuple[int, int, int, int]
    models: dict[str, BabyLlamaConfig | LtgBertConfig]
    scenes: tuple[Scene, ...]
    switch: tuple[Scene, ...]
    flips: int
    phase_steps: int
    memory_loss: tuple[tuple[int, int, float], ...]
    memory_lengths: tuple[int, ...]
    memory_steps: tuple[Scene, ...]
    lengths: tuple[int, ...]
    vocabularies: tuple[int, ...]
    batches: tuple[int, ...]
    depths: tuple[int, ...]
    scaling_model: str
    documents: int
    compiled: bool


BOTH = ("CLM", "MLM")
_BABY, _LTG, _LTG_BASE = "BabyLlama-58M", "LTG-BERT small", "LTG-BERT base"
# 76 in all; on a core that others use too, a peer's compilation alone takes two
_MINUTES = {"attention": 2.5, "disentangled": 5, "cross_entropy": 5, "layers": 2.5, "train_step": 45, "switch": 9}
_MINUTES |= {"memory": 2.5, "scaling": 3.5, "data": 1}
# below three in all, beside what is measured before
_QUICK_MINUTES = {"attention": 0.2, "disentangled": 0.3, "cross_entropy": 0.2, "layers": 0.1, "train_step": 0.7}
_QUICK_MINUTES |= {"switch": 0.3, "memory": 0.4, "scaling": 0.5, "data": 0.1}
_QUICK_MODELS = {
    "BabyLlama quick": BabyLlamaConfig(
        vocab_size=4001, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2
    ),
    "LTG-BERT quick": LtgBertConfig(
        vocab_size=4001, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2
    ),
}
_TINY_MODELS = {
    "BabyLlama tiny": BabyLlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    "LTG-BERT tiny": LtgBertConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
}


def _scene(model: str, batch: tuple[int, int], *variants: str, **others: object) -> Scene:
    values: dict[str, object] = {"precision": "bf16", "objectives": BOTH, "rounds": 7} | others
    return Scene(model=model, batch=batch, variants=variants, **values)  # type: ignore[arg-type]


def _small(model: str, batch: tuple[int, int], *variants: str, **others: object) -> Scene:
    return _scene(model, batch, *variants, **{"rounds": 2} | others)


SIZES = {
    "full": Sizes(
        rounds=9,
        minutes=_MINUTES,
        gemm=((2048, 512, 1024), (2048, 2048, 2048), (4096, 1024, 4096)),
        stream_mib=256,
        attention=((16, 8, 128, 64), (4, 8, 512, 64), (16, 6, 128, 64), (4, 6, 512, 64)),
        disentangled=((16, 8, 128, 64), (4, 8, 512, 64), (16, 6, 128, 64), (4, 6, 512, 64)),
        cross_entropy=(2048, 512, 16001),
        layers=(2048, 512, 1024, 8),
        models={
            _BABY: BabyLlamaConfig(vocab_size=16001),  # with its mask token
            _LTG: LtgBertConfig(
                vocab_size=6144, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6
            ),
            _LTG_BASE: LtgBertConfig(),
        },
        scenes=(
            _scene(
                _BABY,
                (16, 128),
                "antlm_fast",
                "HF Llama eager",
                "HF Llama sdpa",
                "HF Llama eager, malloc",
                "HF Llama eager, compiled, malloc",
                "HF Llama sdpa, compiled, malloc",
                "HF GPT-2 sdpa",
            ),
            _scene(
                _BABY, (4, 512), "antlm_fast", "HF Llama eager", "HF Llama sdpa", "HF Llama eager, malloc", rounds=4
            ),
            _scene(
                _LTG,
                (16, 128),
                "antlm_fast",
                "antlm_fast, no dropout",
                "LTG-BERT gathered",
                "LTG-BERT einsum",
                "HF BERT eager, compiled, malloc",
                "HF ModernBERT eager",
                "HF ModernBERT eager, compiled, malloc",
                "HF ModernBERT sdpa, compiled, malloc",
                objectives=("MLM",),
            ),
            _scene(_LTG, (16, 128), "antlm_fast", "LTG-BERT gathered", objectives=("CLM",)),
            _scene(
                _LTG,
                (4, 512),
                "antlm_fast",
                "antlm_fast, no dropout",
                "LTG-BERT gathered",
                "LTG-BERT einsum",
                "HF BERT eager, compiled, malloc",
                "HF ModernBERT eager, compiled, malloc",
                "HF ModernBERT sdpa, compiled, malloc",
                objectives=("MLM",),
                rounds=3,
            ),
            _scene(
                _LTG_BASE,
                (16, 128),
                "antlm_fast",
                "LTG-BERT gathered",
                "LTG-BERT einsum",
                objectives=("MLM",),
                rounds=3,
            ),
            _scene(
                _BABY,
                (16, 128),
                "antlm_fast",
                "HF Llama eager",
                "HF Llama sdpa",
                precision="fp32",
                objectives=("CLM",),
                rounds=3,
            ),
        ),
        switch=(
            _scene(_LTG, (16, 128), "antlm_fast", "LTG-BERT gathered"),
            _scene(
                _BABY,
                (16, 128),
                "antlm_fast",
                "HF Llama eager",
                "HF Llama sdpa, compiled, malloc",
                "antlm_fast, compiled",
            ),
        ),
        flips=14,
        phase_steps=4,
        memory_loss=((2048, 16384, 0.15), (2048, 16384, 1.0), (8192, 50304, 0.15), (8192, 50304, 1.0)),
        memory_lengths=(128, 512, 2048),
        memory_steps=(
            _scene(_BABY, (16, 128), "antlm_fast", "HF Llama eager", "HF Llama sdpa", "HF Llama eager, malloc"),
            _scene(_LTG, (4, 512), "antlm_fast", "LTG-BERT gathered", "HF ModernBERT eager", objectives=("MLM",)),
        ),
        lengths=(64, 128, 256, 512, 1024, 2048),
        vocabularies=(1024, 4096, 16384, 50304, 131072),
        batches=(1, 4, 16, 64),
        depths=(2, 4, 8, 16),
        scaling_model=_BABY,
        documents=2_000_000,
        compiled=True,
    ),
    "quick": Sizes(
        rounds=3,
        minutes=_QUICK_MINUTES,
        gemm=((1024, 512, 1024), (1024, 1024, 1024)),
        stream_mib=64,
        attention=((8, 4, 128, 64), (1, 4, 512, 64)),
        disentangled=((8, 4, 128, 64), (1, 4, 256, 64)),
        cross_entropy=(512, 256, 8001),
        layers=(512, 256, 512, 4),
        models=_QUICK_MODELS,
        scenes=(
            _small("BabyLlama quick", (8, 128), "antlm_fast", "HF Llama eager", "HF Llama sdpa, malloc"),
            _small(
                "LTG-BERT quick",
                (8, 128),
                "antlm_fast",
                "LTG-BERT gathered",
                "HF ModernBERT eager, compiled, malloc",
                objectives=("MLM",),
            ),
        ),
        switch=(_small("BabyLlama quick", (8, 128), "antlm_fast", "HF Llama sdpa"),),
        flips=4,
        phase_steps=3,
        memory_loss=((2048, 16384, 0.15),),
        memory_lengths=(512,),
        memory_steps=(_small("BabyLlama quick", (8, 128), "antlm_fast", "HF Llama eager", objectives=("MLM",)),),
        lengths=(64, 128, 256),
        vocabularies=(1024, 4096, 16384),
        batches=(1, 4, 8),
        depths=(2, 4),
        scaling_model="BabyLlama quick",
        documents=200_000,
        compiled=False,
    ),
    "tiny": Sizes(
        rounds=2,
        minutes=dict.fromkeys(_MINUTES, 1.0),
        gemm=((64, 64, 64),),
        stream_mib=1,
        attention=((2, 2, 16, 16),),
        disentangled=((2, 2, 16, 16),),
        cross_entropy=(64, 32, 101),
        layers=(32, 32, 64, 2),
        models=_TINY_MODELS,
        scenes=(
            _small("BabyLlama tiny", (4, 16), "antlm_fast", "HF Llama eager", "HF Llama eager, compiled, malloc"),
            _small("LTG-BERT tiny", (4, 16), "antlm_fast", "LTG-BERT einsum", objectives=("MLM",)),
        ),
        switch=(_small("BabyLlama tiny", (4, 16), "antlm_fast"),),
        flips=2,
        phase_steps=2,
        memory_loss=((64, 101, 0.15),),
        memory_lengths=(32,),
        memory_steps=(_small("BabyLlama tiny", (4, 16), "antlm_fast", objectives=("MLM",)),),
        lengths=(8, 16),
        vocabularies=(101, 202),
        batches=(1, 2),
        depths=(1, 2),
        scaling_model="BabyLlama tiny",
        documents=20_000,
        compiled=False,
    ),
}
