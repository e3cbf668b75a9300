"""Timing that survives a shared machine: providers take turns, and every figure keeps its raw samples."""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from surroundings import environment, shared

__all__ = ["Bench", "Call", "Provider", "Row", "attempt", "environment", "measure", "quartiles", "ratio", "shared"]

_logger = logging.getLogger("harness")

# what is timed; one that times itself (on another process, on a device) returns seconds
Call = Callable[[], object]
HEADER = f"  {'case':20}{'provider':39}{'median':>12}{'quartiles':>24}{'rate':>18}{'of floor':>9}{'/first':>8}"
# the reason of a row that had no turn: of nothing that failed
TIME_USED_UP = "the suite's time was used up"
_L2_BYTES = 256 * 2**20  # more than the second-level cache of any GPU


class Told(Exception):
    """A reason that is a whole sentence already: a row shows it as it is."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way of doing a workload.

    Args:
        case: providers of one case do the same work and are compared; the first of them is the one compared with.
        name: of the way.
        prepare: checks the numbers and returns what is timed; it raises where it cannot run or is wrong.
        amount, unit: the work of one call, and the unit of the rate that is printed.
        probe: a tiny real call, made first: what is not installed, or cannot run here, raises in it.
        floor: seconds that the work takes at the machine's measured limits, or None.
        faces: shapes of what a tiny call gives on tensors of a device that is not there (`--dry-run`).
        graph: whether the call may be captured in a CUDA graph and replayed.
        rounds: at most so many timed calls, where one takes very long; 1 also leaves out the warm-up.
    """

    case: str
    name: str
    prepare: Callable[[], Call]
    amount: float = 1.0
    unit: str = "calls/s"
    probe: Callable[[], object] | None = None
    floor: float | None = None
    faces: Callable[[], object] | None = None
    graph: bool = False
    rounds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one provider, or why nothing was.

    Args:
        samples: of `quantity` ("s", "MiB" or "count"), one a round, in the order of the rounds.
        reason: why there are none.
        amount, unit: the work of one sample, and the unit of the rate (of seconds alone).
        floor: the least that the machine's measured limits allow, in `quantity`.
        extras: further figures of this provider, by name with the unit as a suffix.
    """

    suite: str
    workload: str
    case: str
    provider: str
    samples: tuple[float, ...] = ()
    quantity: str = "s"
    reason: str | None = None
    amount: float = 1.0
    unit: str = "calls/s"
    floor: float | None = None
    extras: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.workload, self.case, self.provider

    @property
    def median(self) -> float | None:
        return quartiles(self.samples)[1] if self.samples else None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Row:
        """From JSON."""
        known = {name: values[name] for name in (each.name for each in fields(cls)) if name in values}
        return cls(**known | {"samples": tuple(values["samples"])})

    def json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(kw_only=True)
class Bench:
    """What every suite is given.

    Args:
        sizes: of the workloads; see sizes.py.
        device: "cpu" or "cuda".
        limits: what the machine can do, measured before; None leaves floors out.
        until: `time.monotonic()` at which the suite has to end; what has had no turn by then says so in its row.
        dry: builds inputs, calls nothing, and shows the plan.
    """

    sizes: Any
    device: str = "cpu"
    limits: Any = None
    until: float = float("inf")
    dry: bool = False

    def left(self) -> float:
        return self.until - time.monotonic()

    def floor(self, work: Any, dtype: str) -> float | None:
        return None if self.limits is None else self.limits.floor_seconds(work, dtype)

    def measure(
        self, suite: str, workload: str, providers: Sequence[Provider], *, rounds: int, warmup: int = 1
    ) -> list[Row]:
        if self.dry:
            return [planned(suite, workload, provider, rounds) for provider in providers]
        if self.device == "cuda":
            providers = [each for one in providers for each in _with_device_timer(one)]
        return measure(suite, workload, providers, rounds=rounds, warmup=warmup, until=self.until)


def measure(
    suite: str,
    workload: str,
    providers: Sequence[Provider],
    *,
    rounds: int,
    warmup: int = 1,
    until: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time all providers of a workload in turns: a b c, a b c, ...

    Args:
        rounds: timed calls of each provider; fewer, but one at least, where `until` comes before.
        warmup: calls of each before; one that fails there or in `prepare` is not timed, and its row says why.
        until: by time.monotonic().
        clock: seconds.
    """
    calls: dict[int, Call] = {}
    reasons: dict[int, str] = {}
    for place, provider in enumerate(providers):
        prepared = TIME_USED_UP if time.monotonic() > until else attempt(provider, warmup)
        if isinstance(prepared, str):
            reasons[place] = prepared
        else:
            calls[place] = prepared
    samples: dict[int, list[float]] = {place: [] for place in calls}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for place, call in list(calls.items()):
            if number >= (providers[place].rounds or rounds):
                continue
            try:
                begun = clock()
                own = call()
                seconds = clock() - begun
            except Exception as error:  # it failed while it was timed: the others go on without it
                reasons[place] = told(error)
                samples[place] = []
                del calls[place]
                continue
            samples[place].append(own if isinstance(own, float) else seconds)
    return [
        row_of(suite, workload, it, samples.get(place, ()), reasons.get(place)) for place, it in enumerate(providers)
    ]


def attempt(provider: Provider, warmup: int) -> Call | str:
    """What is to be timed, warm; or, in a line, why it cannot be."""
    try:
        if provider.probe is not None:
            provider.probe()
        call = provider.prepare()
        for _ in range(warmup if provider.rounds != 1 else 0):
            call()
    except Exception as error:  # whatever a peer raises becomes its row; the others go on
        _logger.debug("%s: %s", provider.name, told(error), exc_info=True)
        return told(error)
    return call


def told(error: BaseException) -> str:
    """An error in a line that names no folder of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    text = re.sub(r"(?<![\w.])/[\w./-]+", "...", text)[:240]
    return text if isinstance(error, Told) else f"{type(error).__name__}: {text}"


def row_of(suite: str, workload: str, provider: Provider, samples: Sequence[float], reason: str | None) -> Row:
    return Row(
        suite=suite,
        workload=workload,
        case=provider.case,
        provider=provider.name,
        samples=tuple(samples),
        reason=reason,
        amount=provider.amount,
        unit=provider.unit,
        floor=provider.floor,
    )


def planned(suite: str, workload: str, provider: Provider, rounds: int) -> Row:
    """A row that says what would be done; with `faces`, what shapes come out on a device that is not there."""
    plan = f"would be timed {rounds} times"
    if provider.faces is not None:
        try:
            plan += f"; on fake CUDA tensors: {provider.faces()}"
        except Exception as error:  # a provider that a GPU would refuse as well is a finding, not an end
            plan += f"; on fake CUDA tensors: {told(error)}"
    return row_of(suite, workload, provider, (), plan)


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
        label = f"  {one.case:20}{one.provider:38} "
        if not one.samples:
            yield f"{label}{one.reason}"
            continue
        times = over_first(one, rows)
        compared = "-" if times is None else f"{times:.2f}"
        low, middle, high = (amount_text(value, one.quantity) for value in quartiles(one.samples))
        floor = f"{of_floor(one):.0%}" if of_floor(one) is not None else "-"
        line = f"{label}{middle:>12}{f'{low} - {high}':>24}{rate_text(one):>18}{floor:>9}{compared:>8}"
        yield line + "".join(f"  {name} {value:.4g}" for name, value in one.extras.items())


def over_first(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as much as the first row of its workload and case; None where one of them has no figure, or 0."""
    first = next(other for other in rows if (other.workload, other.case) == (row.workload, row.case))
    if not row.samples or not first.samples or not all(first.samples):
        return None
    return ratio(row.samples, first.samples)


def amount_text(value: float, quantity: str) -> str:
    if quantity == "s":
        return f"{value * 1e3:.2f} ms" if value < 100 else f"{value:.0f} s"
    return f"{value:,.1f} {quantity}" if quantity == "MiB" else f"{value:g}"


def rate_text(row: Row) -> str:
    if row.quantity != "s" or not row.median:
        return "-"
    rate = row.amount / row.median
    return f"{rate:,.0f} {row.unit}" if rate >= 100 else f"{rate:.3g} {row.unit}"


def of_floor(row: Row) -> float | None:
    """The share of the time taken that the machine's limits account for: 1 cannot be beaten."""
    return row.floor / row.median if row.floor and row.median else None


def with_extras(row: Row, **extras: float) -> Row:
    return replace(row, extras={**row.extras, **extras})


def _with_device_timer(provider: Provider) -> Iterator[Provider]:
    """On a GPU: the call timed by the device's own events; and, where it can be, as a replay of a captured graph."""

    def timed() -> Call:
        return device_timed(provider.prepare())

    def replayed() -> Call:
        return device_timed(captured(provider.prepare()))

    yield replace(provider, prepare=timed)
    if provider.graph:
        yield replace(provider, name=f"{provider.name}, CUDA graph", prepare=replayed)


def device_timed(call: Call) -> Call:
    """A call that returns the seconds the GPU took for it, its second-level cache overwritten before.

    One that times itself keeps its own seconds.
    """
    flushed = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        flushed.zero_()
        begin.record()
        own = call()
        end.record()
        torch.cuda.synchronize()
        return own if isinstance(own, float) else float(begin.elapsed_time(end)) / 1e3

    return timed


def captured(call: Call) -> Call:
    """The call as a CUDA graph; replaying it launches all of its kernels at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_cache(device: str) -> None:
    with suppress(RuntimeError):
        if device == "cuda":
            torch.cuda.empty_cache()
