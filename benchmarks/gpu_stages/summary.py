"""The summary of a run: what held, what did not, and the figures beside the strongest peer, on at most 100 lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import results
from harness import TIME_USED_UP, Row, of_floor

from gpu_stages.gpu_tests import SANITIZER_MISSING
from gpu_stages.timing import PASSES

LINES = 100
_FAILURES_SHOWN = 12
_SHORT = {"forward": "fwd", "backward": "bwd", "both": "both"}


def failures(suites: Mapping[str, Any]) -> list[Row]:
    """What of ours has no figure for another reason than time; peers that cannot run are no failures."""
    rows = [row for record in suites.values() for row in results.rows_of(record)]
    return [row for row in rows if row.reason and is_ours(row) and not is_excused(row)]


def is_ours(row: Row) -> bool:
    return "antlm_fast" in row.provider or row.suite == "stages"


def is_excused(row: Row) -> bool:
    """No figure, and nothing wrong: it had no turn, a tool is not there, a tile that was tried is too large.

    A stage is never excused, whatever its last words were.
    """
    reason = row.reason or ""
    if row.suite == "stages":
        return False
    return (
        TIME_USED_UP in reason
        or (row.suite == "tests" and reason == SANITIZER_MISSING)
        or (row.suite == "tiles" and reason.startswith("OutOfResources"))
    )


def lines(suites: Mapping[str, Any]) -> list[str]:
    """The whole summary; the longest sections are cut where it would be too long."""
    head = list(_head(suites))
    sections = [list(section) for section in _sections(suites)]
    most = LINES
    while len(head) + sum(1 + min(len(section), most) for section in sections) > LINES:
        most -= 1
    for section in sections:
        if len(section) > most:
            section[most - 1 :] = [f"  ... {len(section) - most + 1} more lines of this are in gpu.json"]
    return [*head, *(line for section in sections for line in ("", *section))]


def _head(suites: Mapping[str, Any]) -> Iterator[str]:
    stages = results.rows_of(suites["stages"]) if "stages" in suites else []
    environment: Mapping[str, Any] = next(iter(suites.values()))["environment"] if suites else {}
    versions = ", ".join(f"{name} {environment.get(name)}" for name in ("torch", "triton", "transformers", "python"))
    yield f"{environment.get('gpu') or environment.get('cpu')}; {versions}; {str(environment.get('date'))[:16]}"
    limits = next((record["limits"] for record in suites.values() if record["limits"] is not None), None)
    if limits is not None:
        peaks = ", ".join(f"{name} {value / 1e12:,.3g} TFLOP/s" for name, value in limits["flops_per_s"].items())
        yield f"ceilings: {peaks}, copy {limits['bytes_per_s'] / 1e12:,.3g} TB/s"
    for row in stages:
        yield f"  {row.case:14}" + (f"{row.samples[0]:6.1f} s" if row.samples else f"FAILED: {row.reason}")
    found = failures(suites)
    proofs = [row for row in results.rows_of(suites["proof"]) if row.quantity != "s"] if "proof" in suites else []
    shown = f"; {sum(bool(row.samples) for row in proofs)} of {len(proofs)} proofs hold" if proofs else ""
    yield (f"{len(found)} failure{'s' * (len(found) > 1)} of ours" if found else "nothing of ours failed") + shown
    for row in found[:_FAILURES_SHOWN]:
        if row.suite != "stages":
            yield f"  {row.suite}: {row.workload}; {row.case}; {row.provider}: {row.reason}"[:200]


def _sections(suites: Mapping[str, Any]) -> Iterator[Iterator[str]]:
    for name, record in suites.items():
        rows = results.rows_of(record)
        if name == "proof":
            yield _proof(rows)
        elif name == "tests":
            yield _counts(rows)
        elif name == "demo":
            yield _differences(rows)
        elif name == "tiles":
            yield _tiles(rows)
        elif name == "switch":
            yield _flips(rows)
        elif name in ("attention", "disentangled", "cross_entropy"):
            yield _passes(name, rows)
        elif name == "train_step":
            yield _steps(rows)


def _proof(rows: Sequence[Row]) -> Iterator[str]:
    yield "proof: largest error, of what the budget allows"
    for workload, own in results.workloads(rows):
        figures = ", ".join(
            f"{row.case} {row.median:.2g}{' s' if row.quantity == 's' else ''}" if row.samples else _missing(row)
            for row in own
        )
        yield f"  {workload:42}{figures}"


def _missing(row: Row) -> str:
    return f"{row.case} {'had no time' if is_excused(row) else 'FAILED'}"


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    yield "tests: " + ", ".join(
        f"{row.case} {row.median:g}" if row.samples else f"{row.case}: {row.reason}"[:90]
        for row in rows
        if row.workload != "failures"
    )


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    yield "demo: losses of the two runs, relative differences"
    for row in rows:
        if row.workload == "differences":
            both = [other.samples for other in rows if other.case == row.case and other is not row and other.samples]
            ends = "; ".join(f"{losses[0]:.4f} -> {losses[-1]:.4f}" for losses in both)
            yield f"  {row.case:22}{'-' if row.median is None else f'{row.median:.1e}':>9}  {ends}"


def _tiles(rows: Sequence[Row]) -> Iterator[str]:
    yield "tiles: the fastest beside the table's"
    for workload, own in results.workloads(rows):
        figures = [row for row in own if row.median is not None]
        if not figures:
            continue
        for case in dict.fromkeys(row.case for row in figures):
            same = [row for row in figures if row.case == case]
            best = min(same, key=lambda row: row.median or 0.0)
            ratio = (best.median or 0.0) / (same[0].median or 1.0)
            name = best.provider.partition(", ")[2]
            yield f"  {workload} {case:16} {name}: {1e3 * (best.median or 0.0):.3f} ms, {ratio:.2f} of the table's"


def _passes(name: str, rows: Sequence[Row]) -> Iterator[str]:
    """A line a workload: our three passes, and how long the strongest peer's take."""
    yield f"{name}: ms, TFLOP/s, percent of the ceiling; then the strongest peer's time over ours"
    for workload, own in results.workloads(rows):
        for case in dict.fromkeys(row.case.rpartition(", ")[0] for row in own):
            parts = [
                f"{_SHORT[which]} {_figure([row for row in own if row.case == f'{case}, {which}'])}" for which in PASSES
            ]
            yield f"  {workload:34} {case:14}" + " | ".join(parts)


def _figure(rows: Sequence[Row]) -> str:
    ours = next((row for row in rows if is_ours(row) and row.median), None)
    peers = [row for row in rows if not is_ours(row) and row.median]
    best = min(peers, key=lambda row: row.median or 0.0, default=None)
    text = "-" if ours is None or not ours.median else f"{1e3 * ours.median:.3f} {ours.amount / ours.median:.0f}"
    floor = None if ours is None else of_floor(ours)
    text += "" if floor is None else f" {floor:.0%}"
    if best is not None and best.median and ours is not None and ours.median:
        text += f", {best.provider} {best.median / ours.median:.2f}x"
    elif best is not None and best.median:
        text += f", {best.provider} {1e3 * best.median:.3f} ms"
    return text


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    yield "training steps: tokens/s, percent of the ceiling, peak memory; times: over ours"
    for workload, own in results.workloads(rows):
        for case in dict.fromkeys(row.case for row in own):
            same = [row for row in own if row.case == case]
            first = same[0].median
            parts = []
            for row in same:
                if row.median is None:
                    parts.append(f"{row.provider}: -")
                    continue
                floor = of_floor(row)
                share = "" if floor is None else f" {floor:.0%}"
                times = f" {row.median / first:.2f}x" if first and row is not same[0] else ""
                memory = f" {row.extras['peak_mib']:,.0f} MiB" if "peak_mib" in row.extras else ""
                parts.append(f"{row.provider} {row.amount / row.median:,.0f}{share}{memory}{times}")
            yield f"  {workload} {case}: " + " | ".join(parts)


def _flips(rows: Sequence[Row]) -> Iterator[str]:
    yield "flips: first step after one, in later steps; graphs compiled for all of them"
    for row in rows:
        if row.quantity == "count" or row.median is None:
            continue
        twin = next((o for o in rows if o.quantity == "count" and (o.case, o.provider) == (row.case, row.provider)
                     and o.workload.startswith(row.workload)), None)  # fmt: skip
        compiled = "-" if twin is None or twin.median is None else f"{twin.median:g}"
        yield f"  {row.workload}, {row.case}, {row.provider}: {row.median:.2f}, {compiled}"
