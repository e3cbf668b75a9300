"""TrainConfig: everything that determines a run, composed of what each component owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import BabyLlamaConfig, ModelConfig
from antlm_fast.objectives import MaskingConfig
from antlm_fast.schedule import Schedule
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig
from antlm_fast.types import InputError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Additions to the cross-entropy; both 0 in BabyLlama and AntLM. Training losses include them, validation's do not.

    Args:
        z_loss: weight of logsumexp^2 per labelled token.
        label_smoothing: share of the target spread over the vocabulary.
        last_layer_rows: where at most half of a micro-batch's tokens are labelled, a model that can computes only
            those in its last layer. The same loss for less work; with dropout, other elements are dropped.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    last_layer_rows: bool = True

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise InputError(f"loss.z_loss must be at least 0; got {self.z_loss}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"loss.label_smoothing must be at least 0 and below 1; got {self.label_smoothing}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while training, and after it.

    Args:
        every_steps: steps between two evaluations of both validation losses; None is once an epoch. A phase's end
            and the run's start are always evaluated.
        validation_rows: rows of the validation data that are read each time, the same ones.
        minimal_pairs: pairs to score at the end: "builtin", a JSONL file or a folder of them; None for none.
        read_outs: how they are scored: "causal", "masked" (pseudo-log-likelihood), "mntp".
    """

    every_steps: int | None = None
    validation_rows: int = 256
    minimal_pairs: str | None = None
    read_outs: tuple[str, ...] = ("causal", "masked")

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise InputError(f"evaluation.every_steps must be at least 1, or none; got {self.every_steps}")
        if self.validation_rows < 1:
            raise InputError(f"evaluation.validation_rows must be at least 1; got {self.validation_rows}")
        unknown = set(self.read_outs) - {"causal", "masked", "mntp"}
        if unknown or not self.read_outs:
            raise InputError(f"evaluation.read_outs must be among causal, masked, mntp; got {list(self.read_outs)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save.

    Args:
        every_steps: steps between two checkpoints; None saves with each evaluation. The run's end is always saved.
        keep: how many of the newest are kept.
        keep_phase_ends: also save at the end of each phase of the schedule, and never drop these.
    """

    every_steps: int | None = None
    keep: int = 2
    keep_phase_ends: bool = True

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise InputError(f"checkpoint.every_steps must be at least 1, or none; got {self.every_steps}")
        if self.keep < 1:
            raise InputError(f"checkpoint.keep must be at least 1; got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training, beside metrics.jsonl's validation lines.

    Args:
        every_steps: steps between two training lines.
        tensorboard: also write TensorBoard event files into the run folder.
    """

    every_steps: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise InputError(f"logging.every_steps must be at least 1; got {self.every_steps}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. model.vocab_size is the tokenizer's and is filled in when the tokenizer is ready.

    Args:
        name: of the recipe; also the default run folder's.
        schedule: phases in the language of antlm_fast.schedule.
        epochs, steps: length of the training, for those who want it checked against the schedule; None lets the
            schedule say.
        seed: of the weights, the order of rows and the masks.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the hardware computes in it.
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        model: its sizes; model.architecture says which of the classes of antlm_fast.models it is.
    """

    name: str
    schedule: str
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    model: ModelConfig = field(default_factory=BabyLlamaConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        schedule = Schedule.parse(self.schedule)
        if self.epochs is not None and not schedule.steps:
            schedule.timeline(1, epochs=self.epochs)
        if self.steps is not None and not schedule.epochs:
            schedule.timeline(1, steps=self.steps)
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"precision must be 'auto', 'float32' or 'bfloat16'; got {self.precision!r}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2^63; got {self.seed}")
        self.batch.check_lengths(self.data.row_tokens, self.model.max_position_embeddings)
