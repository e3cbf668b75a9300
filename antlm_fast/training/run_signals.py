"""Signals that a run obeys: SIGINT (Ctrl-C), SIGTERM and SIGHUP save and stop, SIGUSR1 saves and goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from antlm_fast.training.checkpoint import latest_checkpoint

# Windows has only the first two
STOPPING = tuple(each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP"))
SAVING = tuple(each for each in signal.Signals if each.name == "SIGUSR1")


class RunSignals:
    """What signals have asked for while `run_signals` is open.

    Attributes:
        stop: the signal that asks to stop, or None.
        save: a checkpoint is asked for; whoever writes one sets it back.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.save = False
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While this is open, a signal only sets `stop`, and the code inside ends when it can; then the run ends.

        Raises:
            KeyboardInterrupt: at the end, where SIGINT has come.
            SystemExit: at the end, with code 128 + the signal's number, where another has come.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self._end_if_stopped()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While this is open, SIGTERM and SIGHUP end the process as if there were no handler: while code of another
        language runs, which may be minutes, no handler of Python's does."""
        numbers = [each for each in STOPPING if self._previous.get(each) is signal.SIG_DFL]
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, self._receive)

    def _end_if_stopped(self) -> None:
        if self.stop is signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop is not None:
            raise SystemExit(128 + self.stop)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received in SAVING:
            self.save = True
            return
        self.stop = received
        self._restore(*STOPPING)  # a second signal does what it did before: it stops at once
        if not self._deferred:
            self._end_if_stopped()
        elif received is signal.SIGINT:  # os.write, because print may be what was interrupted
            with contextlib.suppress(OSError):
                os.write(2, b"\nantlm-fast: stops after this step and saves; Ctrl-C again stops at once\n")

    def _install(self) -> None:
        for number in (*STOPPING, *SAVING):
            previous = signal.getsignal(number)
            if previous not in (signal.SIG_IGN, None):  # nohup and trap '' stay in force
                self._previous[number] = signal.signal(number, self._receive)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))


@contextlib.contextmanager
def run_signals(checkpoints: Path) -> Iterator[RunSignals]:
    """While this is open, signals are received; then the handlers that were there before are back.

    Outside of the main thread, where Python allows no handlers, nothing is received.

    Args:
        checkpoints: the run's; when a signal has stopped it, one line says what is saved.
    """
    signals = RunSignals()
    if threading.current_thread() is threading.main_thread():
        signals._install()
    try:
        yield signals
    except (KeyboardInterrupt, SystemExit) as stopped:
        newest = latest_checkpoint(checkpoints)
        saved = f"{newest} is saved, --resume goes on from there" if newest else "nothing was trained yet"
        line = f"{signals.stop.name if signals.stop else 'SIGINT'}: stopped; {saved}"
        with contextlib.suppress(OSError):  # nobody may read any more, as after Ctrl-C on `| tee`
            print(f"antlm-fast: {line}", file=sys.stderr, flush=True)
        if isinstance(stopped, KeyboardInterrupt):
            raise KeyboardInterrupt(line) from None
        raise
    finally:
        signals._restore(*STOPPING, *SAVING)
