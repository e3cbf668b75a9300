"""Who else computes on this machine, and how torch's threads wait for one another there. Never imports torch.

OpenMP's threads spin at barriers, which is fastest while every thread has a core. Where another process takes a core, a
spinning thread keeps it from the thread that all wait for, and a step takes many times as long. So threads
sleep where cores are busy; the runtime reads the setting once, when torch loads it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

_STAT = Path("/proc/stat")
_WATCHED_SECONDS = 0.2
# what a desktop does beside; a process that computes takes a whole core
_NOTHING = 0.3
# a user's word on how threads wait, in the runtimes of GNU, LLVM and Intel
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def my_cores() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy_cores(seconds: float = _WATCHED_SECONDS) -> float | None:
    """How many of `my_cores` others keep busy, watched for so long; None where the system does not tell."""
    before = _times()
    time.sleep(seconds)
    after = _times()
    busy = 0.0
    for core in my_cores():
        if core not in before or core not in after:
            return None
        total, idle = (new - old for new, old in zip(after[core], before[core], strict=True))
        if total <= 0:
            return None
        busy += 1.0 - idle / total
    return busy


def choose_waiting(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Set OMP_WAIT_POLICY=passive where other processes keep cores busy; call it before torch is imported.

    Does nothing where the user has set how threads wait, or one thread, and where torch is there already.

    Returns:
        What was done and why, in one line; None where nothing was done.
    """
    chosen = any(name in environ for name in WAIT_SETTINGS) or environ.get("OMP_NUM_THREADS") == "1"
    if chosen or "torch" in sys.modules:
        return None
    cores = len(my_cores())
    busy = busy_cores()
    if cores == 1 or busy is None or busy < _NOTHING:
        return None
    environ["OMP_WAIT_POLICY"] = "passive"
    return (
        f"note: {busy:.1f} of {cores} cores are busy, so threads sleep while they wait "
        "(OMP_WAIT_POLICY=passive; set OMP_WAIT_POLICY to choose)"
    )


def _times() -> dict[int, tuple[int, int]]:
    """(all, idle) clock ticks of each core since the machine started."""
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":
            numbers = [int(each) for each in ticks]
            # guests' ticks, from the ninth on, are among the user's already
            found[int(name.removeprefix("cpu"))] = (sum(numbers[:8]), sum(numbers[3:5]))
    return found
