"""How a run looks while it goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

LINE_SECONDS = 20.0  # between two plain training lines


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

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show_losses(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._training}  {self._validation}")

    def _place(self, step: int) -> str:
        done = step - self._begun_step
        if not done or step >= self._total_steps:
            return f"step {step}/{self._total_steps}"
        left = (time.monotonic() - self._begun) / done * (self._total_steps - step)
        return f"step {step}/{self._total_steps}  {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left"

    def _say(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _losses(loss: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in loss.items())
