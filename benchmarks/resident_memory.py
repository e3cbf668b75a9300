"""The most memory that a piece of work holds on the CPU, told by the kernel's own high-water mark (Linux)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

_MIB = 2**20
_RESET = Path("/proc/self/clear_refs")


def cannot_measure() -> str | None:
    """Why peaks cannot be measured here, or None."""
    return None if _RESET.exists() else "needs Linux, which counts a process's most resident memory"


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work(*arguments) returns, run in a process that has allocated nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(work, *arguments).result()


def peak_mib(work: Callable[[], Sequence[torch.Tensor]]) -> float:
    """MiB that were resident at most while `work` ran, beyond what was before it and the tensors that it returns."""
    _RESET.write_text("5")  # the high-water mark starts again
    before = _status_mib("VmRSS")
    results = work()
    kept = sum(x.numel() * x.element_size() for x in results) / _MIB
    return _status_mib("VmHWM") - before - kept


def peak_resident_mib(work: Callable[[], object]) -> float:
    """MiB that the whole process held at most while `work` ran."""
    _RESET.write_text("5")
    work()
    return _status_mib("VmHWM")


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024
