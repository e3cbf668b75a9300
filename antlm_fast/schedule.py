"""When each objective is trained: the schedule language, and time as a pure function of the step.

    schedule   = item { "+" item }
    item       = COUNT "*" "(" schedule ")"  |  phase
    phase      = COUNT [ "s" ] "_" objective [ "@" ( "causal" | "full" ) ]      s: steps; without it: epochs
    objective  = "CLM" | "MLM" | "MNTP" | "MIX(" share [ "," ( "MLM" | "MNTP" ) ] ")"

`4_CLM+16_MLM+4_CLM` is AntLM's best schedule for BabyLlama (arXiv 2412.03275); `24_MIX(0.9375)` trains both objectives
in every batch, the share being that of masked sequences (GPT-BERT, arXiv 2410.24159); `16_MLM@causal` reads MLM labels
under the causal mask (the paper's mask-only ablation). `CLM@full` leaks its targets and exists as a control.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, NoReturn

from antlm_fast.types import InputError, Objective

MOST_PHASES = 10_000
MOST_NESTED = 50
Visibility = Literal["causal", "full"]


class ScheduleError(InputError):
    """A schedule cannot be read, or does not fit the length of the training."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training under one objective (or one mix of two).

    Args:
        name: the phase as written, such as "4_CLM" or "200s_MLM@causal".
        length: how long, in units.
        unit: "epochs" or "steps".
        masked_share: share of sequences trained on masked_objective; 0 is pure CLM, 1 is pure MLM or MNTP.
        masked_objective: MLM or MNTP.
        visibility: None for each objective's own mask, or the mask all sequences get instead.
    """

    name: str
    length: int
    unit: Literal["epochs", "steps"]
    masked_share: float
    masked_objective: Objective = Objective.MLM
    visibility: Visibility | None = None

    @property
    def objective(self) -> str:
        """The phase's name without its length: "CLM", "MLM@causal", "MIX(0.9375)"."""
        return self.name.split("_", 1)[1]

    @property
    def leaks_targets(self) -> bool:
        """True for the leak control: CLM labels that the full mask lets the model see."""
        return self.visibility == "full" and self.masked_share < 1

    def steps(self, steps_per_epoch: int) -> int:
        return self.length * (steps_per_epoch if self.unit == "epochs" else 1)


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A schedule laid over optimizer steps: phase i covers steps [ends[i - 1], ends[i])."""

    phases: tuple[Phase, ...]
    ends: tuple[int, ...]
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    def index_at(self, step: int) -> int:
        """Which phase the 0-based step belongs to; a step past the end belongs to the last phase."""
        return min(bisect_right(self.ends, step), len(self.phases) - 1)

    def at(self, step: int) -> Phase:
        return self.phases[self.index_at(step)]

    def first_step(self, index: int) -> int:
        return self.ends[index - 1] if index else 0


@dataclass(frozen=True)
class Schedule:
    """A sequence of phases, read from text by `Schedule.parse`; str() gives the text back."""

    text: str
    phases: tuple[Phase, ...]

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read the schedule language of this module.

        Raises:
            ScheduleError: names the place, what was expected there and what was found.
        """
        reader = _Reader(text)
        phases = reader.schedule()
        reader.expect_end()
        return cls(text, tuple(phases))

    def __str__(self) -> str:
        return self.text

    @property
    def epochs(self) -> int:
        """Sum of the phases counted in epochs."""
        return sum(phase.length for phase in self.phases if phase.unit == "epochs")

    @property
    def steps(self) -> int:
        """Sum of the phases counted in steps."""
        return sum(phase.length for phase in self.phases if phase.unit == "steps")

    def at(self, step: int, *, steps_per_epoch: int) -> Phase:
        """The phase of the 0-based optimizer step; a pure function."""
        return self.timeline(steps_per_epoch).at(step)

    def timeline(self, steps_per_epoch: int, *, epochs: int | None = None, steps: int | None = None) -> Timeline:
        """Lay the phases over optimizer steps.

        Args:
            steps_per_epoch: optimizer steps in one pass over the data.
            epochs, steps: the length of the training where it is set elsewhere; None means the schedule alone says.

        Raises:
            ScheduleError: the phases do not add up to the length set elsewhere.
        """
        if steps_per_epoch < 1:
            raise ScheduleError(f"steps_per_epoch must be at least 1; got {steps_per_epoch}")
        ends: list[int] = []
        for phase in self.phases:
            ends.append((ends[-1] if ends else 0) + phase.steps(steps_per_epoch))
        total = ends[-1]
        if epochs is not None and total != epochs * steps_per_epoch:
            raise ScheduleError(
                f"epochs must equal the sum of the schedule; got epochs {epochs} and schedule {self.text!r}, "
                f"which sums to {self._sum(total, steps_per_epoch)}"
            )
        if steps is not None and total != steps:
            raise ScheduleError(
                f"steps must equal the sum of the schedule; got steps {steps} and schedule {self.text!r}, "
                f"which sums to {total} steps ({steps_per_epoch} an epoch)"
            )
        return Timeline(phases=self.phases, ends=tuple(ends), steps_per_epoch=steps_per_epoch)

    def _sum(self, total: int, steps_per_epoch: int) -> str:
        if not self.steps:
            return f"{self.epochs} epochs"
        return f"{total} steps, {total / steps_per_epoch:g} epochs of {steps_per_epoch} steps"


class _Reader:
    """Recursive descent over the text; every error names the character where it stopped."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.depth = 0

    def schedule(self) -> list[Phase]:
        phases = self.item()
        while self.take(r"\+"):
            phases += self.item()
        return phases

    def item(self) -> list[Phase]:
        start = self.place
        count = int(self.need(r"\d+", "a whole number of epochs or steps"))
        if count < 1:
            self.fail("a number of at least 1", start)
        if not self.take(r"\*"):
            return [self.phase(start, count)]
        self.need(r"\(", "'('")
        self.depth += 1
        if self.depth > MOST_NESTED:
            self.fail(f"repeats nested at most {MOST_NESTED} deep", start)
        phases = self.schedule()
        self.need(r"\)", "')' or '+'")
        self.depth -= 1
        if len(phases) * count > MOST_PHASES:
            self.fail(f"at most {MOST_PHASES} phases", start)
        return phases * count

    def phase(self, start: int, length: int) -> Phase:
        unit: Literal["epochs", "steps"] = "steps" if self.take("s") else "epochs"
        self.need("_", "'_' and an objective, as in 4_CLM (or '*(' for a repeat)")
        name_start = self.place
        name = self.need(r"[A-Za-z]+", "an objective (CLM, MLM, MNTP or MIX)")
        masked_share, masked_objective = 1.0, Objective.MLM
        if name == "CLM":
            masked_share = 0.0
        elif name == "MNTP":
            masked_objective = Objective.MNTP
        elif name == "MIX":
            masked_share, masked_objective = self.mix()
        elif name != "MLM":
            self.fail("an objective (CLM, MLM, MNTP or MIX)", name_start)
        visibility: Visibility | None = None
        if self.take("@"):
            if name == "MIX":
                self.fail("'+' or the end, since in a MIX each sequence has its own mask", self.place - 1)
            visibility = "causal" if self.need("causal|full", "'causal' or 'full'") == "causal" else "full"
        return Phase(
            name=re.sub(r"\s", "", self.text[start : self.place]),
            length=length,
            unit=unit,
            masked_share=masked_share,
            masked_objective=masked_objective,
            visibility=visibility,
        )

    def mix(self) -> tuple[float, Objective]:
        self.need(r"\(", "'(' and the share of masked sequences, as in MIX(0.5)")
        start = self.place
        share = float(self.need(r"\d*\.?\d+", "a share between 0 and 1"))
        if not 0 <= share <= 1:
            self.fail("a share between 0 and 1", start)
        objective = Objective.MLM
        if self.take(","):
            objective = Objective(self.need("MLM|MNTP", "MLM or MNTP"))
        self.need(r"\)", "')'")
        return share, objective

    def take(self, pattern: str) -> str | None:
        """The pattern at this place, blanks before it allowed, or None."""
        found = re.compile(r"\s*(" + pattern + ")").match(self.text, self.place)
        if found is None:
            return None
        self.place = found.end()
        return found.group(1)

    def need(self, pattern: str, meaning: str) -> str:
        found = self.take(pattern)
        if found is None:
            self.fail(meaning, self.place)
        return found

    def expect_end(self) -> None:
        if self.text[self.place :].strip():
            self.fail("'+' or the end", self.place)

    def fail(self, expected: str, place: int) -> NoReturn:
        found = self.text[place:].strip()
        raise ScheduleError(
            f"schedule must have {expected} at character {place + 1}; got {found[:20]!r} in {self.text!r}"
            if found
            else f"schedule must have {expected} at character {place + 1}; got the end of {self.text!r}"
        )
