"""Timing that survives a shared machine: providers take turns, and every figure keeps its raw samples."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
HEADER = f"  {'case':14}{'provider':32}{'median ms':>11}{'quartiles ms':>22}{'rate':>18}{'time/first':>12}"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way of doing a workload.

    Args:
        case: providers of one case do the same work and are compared; the first of them is the one compared with.
        name: of the way.
        prepare: checks the numbers and returns what is timed; it raises where it cannot run or is wrong.
        amount, unit: the work of one call, and the unit of the rate that is printed.
    """

    case: str
    name: str
    prepare: Callable[[], Call]
    amount: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one provider: seconds of each call, in the order of the rounds, or why there are none."""

    suite: str
    workload: str
    case: str
    provider: str
    seconds: tuple[float, ...]
    reason: str | None
    amount: float
    unit: str


def measure(
    suite: str,
    workload: str,
    providers: Sequence[Provider],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time all providers of a workload in turns: a b c, a b c, ...

    Args:
        rounds: timed calls of each provider.
        warmup: calls of each before; one that fails there or in `prepare` is not timed, and its row says why.
        clock: seconds.
    """
    calls: dict[int, Call] = {}
    reasons: dict[int, str] = {}
    for place, provider in enumerate(providers):
        prepared = attempt(provider.prepare, warmup)
        if isinstance(prepared, str):
            reasons[place] = prepared
        else:
            calls[place] = prepared
    samples: dict[int, list[float]] = {place: [] for place in calls}
    for _ in range(rounds):
        for place, call in calls.items():
            begun = clock()
            call()
            samples[place].append(clock() - begun)
    return [row(suite, workload, it, samples.get(place, []), reasons.get(place)) for place, it in enumerate(providers)]


def attempt(prepare: Callable[[], Call], warmup: int) -> Call | str:
    """What is to be timed, warm; or, in a line, why it cannot be."""
    try:
        call = prepare()
        for _ in range(warmup):
            call()
    except Exception as error:  # whatever a peer raises becomes its row; the others go on
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return call


def row(suite: str, workload: str, provider: Provider, seconds: Sequence[float], reason: str | None) -> Row:
    return Row(
        suite=suite,
        workload=workload,
        case=provider.case,
        provider=provider.name,
        seconds=tuple(seconds),
        reason=reason,
        amount=provider.amount,
        unit=provider.unit,
    )


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; between two samples, linearly."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def ratio(samples: Sequence[float], first: Sequence[float]) -> float:
    """How many times as long as the first: median over rounds, so that a load both share drops out.

    Samples of different number were not taken in the same rounds: then the ratio of the medians.
    """
    if len(samples) == len(first):
        return statistics.median(a / b for a, b in zip(samples, first, strict=True))
    return statistics.median(samples) / statistics.median(first)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of one workload's table."""
    yield f"{rows[0].suite}: {rows[0].workload}"
    yield HEADER
    for one in rows:
        label = f"  {one.case:14}{one.provider:32}"
        if not one.seconds:
            yield f"{label}{one.reason}"
            continue
        low, middle, high = quartiles(one.seconds)
        first = next(other for other in rows if other.case == one.case)
        compared = f"{ratio(one.seconds, first.seconds):.2f}" if first.seconds else "-"
        spread = f"{low * 1e3:.2f} - {high * 1e3:.2f}"
        rate = f"{one.amount / middle:,.0f} {one.unit}"
        yield f"{label}{middle * 1e3:11.2f}{spread:>22}{rate:>18}{compared:>12}"


def environment() -> dict[str, Any]:
    """What the figures depend on, and nothing that names the machine or its folders."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "antlm_fast": _version("antlm_fast"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def shared(surroundings: Mapping[str, Any]) -> bool:
    """Whether the cores had too much to do already, for as many threads as are ours, when the run began."""
    load = surroundings["load_average"]
    return load is not None and load[0] + surroundings["threads"] > surroundings["cores"] + 0.5


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(one) for one in rows]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """As the system shows it; inside a virtual machine that need not be the name on the chip."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
