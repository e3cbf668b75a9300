"""Stage a: what the card can do, measured here and now."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Call, Provider, Row, captured, device_timed, measure
from roofline import measure_limits

from gpu_stages.plan import GpuBench


def run(bench: GpuBench) -> Iterator[list[Row]]:
    yield measure_limits(bench)[1]
    if bench.device == "cuda":
        smallest = Provider(case="one number", name="CUDA graph", prepare=_smallest)
        yield measure("limits", "a replay by itself", [smallest], rounds=50)


def _smallest() -> Call:
    """A graph that adds 1 to a number: what every figure of a replayed graph holds beside its kernels."""
    number = torch.zeros((), device="cuda")
    return device_timed(captured(lambda: number.add_(1.0)))
