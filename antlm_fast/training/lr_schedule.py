"""The learning rate as a pure function of the step: linear warm-up, then one cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from antlm_fast.schedule import Timeline
from antlm_fast.types import InputError


@dataclass(frozen=True, kw_only=True)
class LrScheduleConfig:
    """Course of the learning rate.

    Args:
        warmup_steps: steps until the peak is reached, within each span.
        warmup_share: the same as a share of the span's steps, rounded to whole steps; warmup_steps must then be 0.
            None leaves it to warmup_steps.
        final_share: the rate at the end of the cosine, as a share of the peak.
        span: "run", one cosine over the whole run (AntLM is silent; the default), or "phase", one for each phase.
    """

    warmup_steps: int = 200
    warmup_share: float | None = None
    final_share: float = 0.0
    span: Literal["run", "phase"] = "run"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise InputError(f"lr_schedule.warmup_steps must be at least 0; got {self.warmup_steps}")
        if self.warmup_share is not None:
            if not 0 <= self.warmup_share <= 1:
                raise InputError(f"lr_schedule.warmup_share must be between 0 and 1, or none; got {self.warmup_share}")
            if self.warmup_steps:
                raise InputError(
                    f"lr_schedule.warmup_steps must be 0 where lr_schedule.warmup_share is given; "
                    f"got {self.warmup_steps} and {self.warmup_share}"
                )
        if not 0 <= self.final_share <= 1:
            raise InputError(f"lr_schedule.final_share must be between 0 and 1; got {self.final_share}")
        if self.span not in ("run", "phase"):
            raise InputError(f"lr_schedule.span must be 'run' or 'phase'; got {self.span!r}")

    def warmup_of(self, span_steps: int) -> int:
        """Steps of warm-up in a span of that many steps."""
        return self.warmup_steps if self.warmup_share is None else round(self.warmup_share * span_steps)


def lr_at(step: int, peak: float, config: LrScheduleConfig, timeline: Timeline) -> float:
    """Learning rate of the 0-based step s of a span of n steps with w of warm-up.

    s < w: peak * (s + 1) / w. Else peak * (f + (1 - f) * (1 + cos(pi * (s - w) / (n - w))) / 2), f = final_share.
    """
    first, end = 0, timeline.total_steps
    if config.span == "phase":
        index = timeline.index_at(step)
        first, end = timeline.first_step(index), timeline.ends[index]
    done, length = step - first, end - first
    warmup = config.warmup_of(length)
    if done < warmup:
        return peak * (done + 1) / warmup
    progress = (done - warmup) / max(length - warmup, 1)
    return peak * (config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * progress)) / 2)
