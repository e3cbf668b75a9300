"""What benchmarks/gpu.py does, in order of worth: the stages, their shares of the time, and how large their work is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import Bench
from sizes import SIZES

from antlm_fast.models import BabyLlamaConfig, LtgBertConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the run.

    Args:
        letter: for --stages and --plant.
        name: also the suite of its rows, where it has only one.
        target: "module:function", called with a GpuBench in a new process; yields lists of rows as it gets them.
        minutes: what it is expected to take on an H100, and its share where the time is another.
        least_s: below so many seconds it would only begin: where the time is short, those after it get less.
        rehearsal_minutes: the same with --device cpu, on two cores.
        what: for the plan.
    """

    letter: str
    name: str
    target: str
    minutes: float
    rehearsal_minutes: float
    what: str
    least_s: float = 0.0

    def expected(self, device: str) -> float:
        return self.rehearsal_minutes if device == "cpu" else self.minutes


STAGES = (
    Stage(
        letter="a",
        name="limits",
        target="gpu_stages.limits:run",
        minutes=0.4,
        rehearsal_minutes=0.1,
        what="card, driver, versions; the two ceilings: bf16 product, copy; what a replayed graph costs by itself",
        least_s=20.0,
    ),
    Stage(
        letter="b",
        name="proof",
        target="gpu_stages.proof:run",
        minutes=0.9,
        rehearsal_minutes=0.6,
        what="each kernel once against float64, forward and backward, each case in reach of a new process",
        least_s=45.0,
    ),
    Stage(
        letter="c",
        name="tests",
        target="gpu_stages.gpu_tests:run",
        minutes=1.2,
        rehearsal_minutes=0.6,
        what="the tests marked gpu, compiled; compute-sanitizer memcheck and racecheck where it is installed",
    ),
    Stage(
        letter="d",
        name="attention",
        target="gpu_stages.attention:run",
        minutes=1.6,
        rehearsal_minutes=0.4,
        what="attention forward, backward and both, beside SDPA's flash and cuDNN, FlexAttention, varlen, flash-attn",
    ),
    Stage(
        letter="e",
        name="tiles",
        target="gpu_stages.tiles:run",
        minutes=0.7,
        rehearsal_minutes=0.3,
        what="the fastest tiles of head sizes 64 and 128 in bf16, as a patch; attention again with them",
    ),
    Stage(
        letter="f",
        name="operations",
        target="gpu_stages.operations:run",
        minutes=0.8,
        rehearsal_minutes=0.4,
        what="disentangled attention and the loss beside their peers",
    ),
    Stage(
        letter="g",
        name="steps",
        target="gpu_stages.steps:run",
        minutes=1.8,
        rehearsal_minutes=0.6,
        what="training steps of both models beside Hugging Face, eager and compiled; what a flip costs",
    ),
    Stage(
        letter="h",
        name="demo",
        target="gpu_stages.demo:run",
        minutes=0.6,
        rehearsal_minutes=0.5,
        what="steps of the recipe demo in float32, on the GPU and on the CPU: losses side by side",
    ),
)


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One workload of attention.

    Args:
        sequences: how many; of `packed` ones the lengths are spread, and this is about their number.
        seqlen: tokens in each; of packed ones the longest.
        visibility: "causal", "full", or "mixed": the first half of the sequences causal, the others full.
        flex: beside FlexAttention alone, which takes many seconds to compile.
    """

    sequences: int
    seqlen: int
    heads: int
    head_dim: int
    visibility: str
    packed: bool = False
    flex: bool = False

    @property
    def title(self) -> str:
        length = f"{'<= ' if self.packed else ''}{self.seqlen}"
        beside = " beside Flex" if self.flex else ""
        return f"D {self.head_dim}, {self.sequences} x {length} tokens, {self.heads} heads{beside}"


@dataclass(frozen=True, kw_only=True)
class StepsOfModel:
    """Training steps of one model's size.

    Args:
        model: name in GpuSizes.models.
        batches: (sequences, tokens in each), in order of worth.
        variants: names in step_workloads.VARIANTS, none of them compiled; the first is the one compared with.
        compiled: variants that take a minute to compile, for the first batch and one objective alone.
        objective: that of the compiled ones.
    """

    model: str
    batches: tuple[tuple[int, int], ...]
    variants: tuple[str, ...]
    compiled: tuple[str, ...] = ()
    objective: str = "CLM"


@dataclass(frozen=True, kw_only=True)
class GpuSizes:
    """How large the stages' work is. The first five are of `roofline.measure_limits` and of the training steps.

    Args:
        rounds: timed calls of each provider, in turns.
        gemm, stream_mib: products (rows, inner, columns) for the ceiling; one tensor of the copy's.
        models, compiled: of the training steps, by name; whether peers are compiled.
        proof_lengths, proof_heads: of the smallest proof.
        tests: the arguments of pytest; sanitized: whether compute-sanitizer is asked for.
        attention: in order of worth.
        tile_head_dims, tile_sequences: of the tuning; (sequences, tokens in each).
        disentangled: (batch, heads, seqlen, head_dim) each.
        cross_entropy: (rows, hidden_size, vocab_size, labelled share) each.
        steps: training steps; flips, phase_steps: changes of the objective, and steps between two.
        demo_settings: of the recipe demo.
    """

    rounds: int
    gemm: tuple[tuple[int, int, int], ...]
    stream_mib: int
    models: dict[str, BabyLlamaConfig | LtgBertConfig]
    compiled: bool
    proof_lengths: tuple[int, ...]
    proof_heads: int
    tests: tuple[str, ...]
    sanitized: bool
    attention: tuple[AttentionShape, ...]
    tile_head_dims: tuple[int, ...]
    tile_sequences: tuple[int, int]
    disentangled: tuple[tuple[int, int, int, int], ...]
    cross_entropy: tuple[tuple[int, int, int, float], ...]
    steps: tuple[StepsOfModel, ...]
    flips: int
    phase_steps: int
    demo_settings: dict[str, str]


@dataclass(kw_only=True)
class GpuBench(Bench):
    """What a stage is given.

    Args:
        folder: where it may leave files.
        planted: a fault on purpose, for the processes that the stage starts.
    """

    folder: Path
    planted: str | None = None


_TOKENS = 16_384
_WIDTH = 2_048  # heads x head_dim: the sizes that flash-attention's own figures are of


def _dense(seqlen: int, head_dim: int, visibility: str, *, flex: bool = False) -> AttentionShape:
    return AttentionShape(
        sequences=_TOKENS // seqlen,
        seqlen=seqlen,
        heads=_WIDTH // head_dim,
        head_dim=head_dim,
        visibility=visibility,
        flex=flex,
    )


def _packed(head_dim: int, visibility: str, *, flex: bool = False) -> AttentionShape:
    return AttentionShape(
        sequences=64, seqlen=2048, heads=_WIDTH // head_dim, head_dim=head_dim, visibility=visibility, packed=True,
        flex=flex,
    )  # fmt: skip


def _published(sequences: int, seqlen: int, heads: int, head_dim: int, visibility: str) -> AttentionShape:
    """A shape that others have published figures of."""
    return AttentionShape(sequences=sequences, seqlen=seqlen, heads=heads, head_dim=head_dim, visibility=visibility)


_ATTENTION = (
    *(_dense(1024, 64, visibility) for visibility in ("causal", "full", "mixed")),
    *(_packed(64, visibility) for visibility in ("causal", "full", "mixed")),
    *(_dense(1024, 128, visibility) for visibility in ("causal", "full", "mixed")),
    *(_dense(seqlen, 64, visibility) for seqlen in (128, 4096, 512) for visibility in ("causal", "full")),
    *(_dense(seqlen, 128, visibility) for seqlen in (4096, 128, 512) for visibility in ("causal", "full")),
    *(_packed(128, visibility) for visibility in ("causal", "mixed")),
    _dense(128, 64, "mixed"),
    _published(4, 1024, 16, 64, "full"),
    _published(8, 1024, 16, 64, "full"),
    *(_dense(seqlen, size, visibility) for seqlen in (2048, 8192) for size in (64, 128)
      for visibility in ("causal", "full")),
    _published(4, 4096, 48, 128, "causal"),
    # last, for each takes many seconds to compile
    _dense(1024, 64, "mixed", flex=True),
    _packed(64, "mixed", flex=True),
    _dense(1024, 64, "causal", flex=True),
)  # fmt: skip

_BABY, _LTG = "BabyLlama-58M", "LTG-BERT small"
GPU_SIZES = {
    "cuda": GpuSizes(
        rounds=12,
        gemm=((8192, 8192, 8192), (4096, 4096, 4096)),
        stream_mib=1024,
        models={name: SIZES["full"].models[name] for name in (_BABY, _LTG)},
        compiled=True,
        proof_lengths=(130, 1, 0, 257, 64),
        proof_heads=4,
        tests=(
            "-m", "gpu",
            "tests/kernels/test_triton_tiles.py",
            "tests/kernels/test_attention_properties.py",
            "tests/kernels/test_attention.py",
            "tests/kernels/test_disentangled_attention_properties.py",
            "tests/kernels/test_disentangled_attention.py",
            "tests/kernels/test_linear_cross_entropy.py",
        ),
        sanitized=True,
        attention=_ATTENTION,
        tile_head_dims=(64, 128),
        tile_sequences=(16, 1024),
        disentangled=((64, 6, 128, 64), (16, 6, 512, 64), (8, 12, 512, 64)),
        cross_entropy=(
            (8192, 512, 16001, 1.0),
            (8192, 512, 16001, 0.15),
            (2048, 4096, 32000, 1.0),
            (2048, 2048, 102400, 1.0),
        ),
        steps=(
            StepsOfModel(
                model=_BABY,
                batches=((64, 128), (16, 128)),
                variants=("antlm_fast", "HF Llama eager", "HF Llama sdpa"),
                compiled=("HF Llama sdpa, compiled", "HF Llama sdpa, compiled, reduce-overhead"),
                objective="CLM",
            ),
            StepsOfModel(
                model=_LTG,
                batches=((64, 128), (16, 128)),
                variants=("antlm_fast", "LTG-BERT gathered", "HF ModernBERT sdpa"),
                compiled=("HF ModernBERT sdpa, compiled", "HF ModernBERT sdpa, compiled, reduce-overhead"),
                objective="MLM",
            ),
        ),
        flips=6,
        phase_steps=5,
        demo_settings={"schedule": "100s_CLM+100s_MLM+100s_CLM"},
    ),
    "cpu": GpuSizes(
        rounds=2,
        gemm=((256, 256, 256),),
        stream_mib=4,
        models={
            "BabyLlama tiny": BabyLlamaConfig(
                vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
            )
        },
        compiled=False,
        proof_lengths=(17, 0, 2),
        proof_heads=2,
        tests=("tests/kernels/test_attention.py::test_causal_by_hand",),
        sanitized=False,
        attention=(
            AttentionShape(sequences=2, seqlen=16, heads=1, head_dim=16, visibility="causal"),
            AttentionShape(sequences=2, seqlen=16, heads=1, head_dim=16, visibility="mixed"),
            AttentionShape(sequences=2, seqlen=16, heads=1, head_dim=16, visibility="mixed", packed=True),
        ),
        tile_head_dims=(16,),
        tile_sequences=(2, 16),
        disentangled=((1, 1, 16, 16),),
        cross_entropy=((32, 32, 101, 1.0), (32, 32, 101, 0.15)),
        steps=(
            StepsOfModel(
                model="BabyLlama tiny",
                batches=((2, 8),),
                variants=("antlm_fast", "HF Llama sdpa"),
                compiled=("HF Llama sdpa, compiled, reduce-overhead",),
            ),
        ),
        flips=1,
        phase_steps=2,
        demo_settings={
            "schedule": "4s_CLM+4s_MLM+4s_CLM",
            "data.builtin_words": "20000",
            "tokenizer.vocab_size": "500",
            "evaluation.validation_rows": "16",
        },
    ),
}  # fmt: skip
