"""How a run looks while it goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LINE_SECONDS = 20.0  # between two plain training lines
ESTIMATE_SECONDS = 10.0  # of training before the remaining time is estimated
LONG_HOURS = 48  # from here on it is a warning


class Progress:
    """Phase, objective, both losses, tokens per second and time left, on stderr.

    Args:
        total_steps: of the run.
        step: already done (resumed runs).
    """

    def __init__(self, total_steps: int, step: int) -> None:
        self._total_steps = total_steps
        self._training = self._validation = ""
        self._phase = ""
        self._begun, self._begun_step = time.monotonic(), step
        self._last_line = self._begun
        self._steps_here, self._first_step_end = 0, 0.0
        self._estimated = False
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True, unit="step")

    def phase(self, index: int, count: int, name: str, step: int) -> None:
        self._phase = f"phase {index + 1}/{count} {name}"
        self._say(f"{self._phase} begins at step {step}")
        if self._bar is not None:
            self._bar.set_description_str(self._phase)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()
        if not self._estimated:
            self._estimate()

    def trained(self, step: int, loss: Mapping[str, float], tokens_per_second: float) -> None:
        self._training = f"train {_losses(loss)}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._show_losses()
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._say(f"{self._phase}  {self._place(step)}  {self._training}")

    def validated(self, step: int, loss: Mapping[str, float]) -> None:
        self._validation = f"validation {_losses(loss)}"
        self._say(f"{self._phase}  {self._place(step)}  {self._validation}".lstrip())
        self._show_losses()

    def saved(self, checkpoint: Path) -> None:
        self._say(f"SIGUSR1: saved {checkpoint}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show_losses(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._training}  {self._validation}")

    def _estimate(self) -> None:
        """Once, after some steps: how long the rest takes. The first step is not counted, since it may compile."""
        self._steps_here += 1
        now = time.monotonic()
        if self._steps_here == 1:
            self._first_step_end = now
            return
        seconds = now - self._first_step_end
        left = self._total_steps - self._begun_step - self._steps_here
        if seconds < ESTIMATE_SECONDS or not left:
            return
        self._estimated = True
        hours = seconds / (self._steps_here - 1) * left / 3600
        if hours < LONG_HOURS:
            self._say(f"about {_clock(hours * 3600)} left at this speed")
        else:
            self._say(
                f"warning: about {hours:,.0f} hours ({hours / 24:,.0f} days) left at this speed; a shorter schedule, "
                "a smaller model or a GPU takes less (Ctrl-C saves and stops)"
            )

    def _place(self, step: int) -> str:
        done = step - self._begun_step
        if not done or step >= self._total_steps:
            return f"step {step}/{self._total_steps}"
        left = (time.monotonic() - self._begun) / done * (self._total_steps - step)
        return f"step {step}/{self._total_steps}  {_clock(left)} left"

    def _say(self, line: str) -> None:
        self._last_line = time.monotonic()
        with contextlib.suppress(OSError):  # a terminal that is gone, or `| tee` after Ctrl-C, must not end the run
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"


def _losses(loss: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in loss.items())
