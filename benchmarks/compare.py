"""Two results beside each other: what became slower, beyond what their samples and two runs of the same code allow.

Test: the ratio of medians B / A, and its bootstrap interval (both sets of samples drawn anew with replacement 4,000
times, seeded; the 0.5th to the 99.5th percentile, since hundreds of rows are judged at once). A row is slower if the
whole interval lies above 1 + margin, faster if it lies below 1 / (1 + margin). The margin stands for what changes
between two runs and is in neither's samples (clock, neighbours, memory layout). Fewer than three samples on a side are
not judged, unless they are of a quantity that does not vary from run to run (counts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
from harness import Row
from surroundings import SAME_MACHINE, shared

MARGIN = 0.05
LEAST_SAMPLES = 3
_RESAMPLES = 4000
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One row in both results; verdict "slower", "faster", "same" or "too few samples"."""

    row: Row
    ratio: float
    low: float
    high: float
    verdict: str


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of median(b) / median(a)."""
    generator = np.random.default_rng(0)
    medians = [np.median(generator.choice(np.asarray(x), (_RESAMPLES, len(x))), axis=1) for x in (a, b)]
    low, high = np.percentile(medians[1] / medians[0], _PERCENTILES)
    return float(low), float(high)


def judge(before: Row, after: Row, margin: float) -> Judged:
    a, b = before.samples, after.samples
    if before.quantity == "count":
        # recompiles and re-captures are exact: one more is one too many
        middle_a, middle_b = before.median or 0.0, after.median or 0.0
        verdict = "same" if middle_a == middle_b else "slower" if middle_b > middle_a else "faster"
        ratio = middle_b / middle_a if middle_a else 1.0 if middle_b == middle_a else math.inf
        return Judged(row=after, ratio=ratio, low=ratio, high=ratio, verdict=verdict)
    ratio = float(np.median(b) / np.median(a)) if np.median(a) else math.inf
    least = 1 if before.quantity == "MiB" else LEAST_SAMPLES
    if min(len(a), len(b)) < least or not math.isfinite(ratio):
        return Judged(row=after, ratio=ratio, low=math.nan, high=math.nan, verdict="too few samples")
    low, high = interval(a, b)
    verdict = "slower" if low > 1 + margin else "faster" if high < 1 / (1 + margin) else "same"
    return Judged(row=after, ratio=ratio, low=low, high=high, verdict=verdict)


def compare(before: Path, after: Path, *, margin: float = MARGIN, across: bool = False) -> int:
    """Prints the comparison.

    Returns:
        0; 1 where a row of ours became slower, or has no figure any more; 2 where the two cannot be compared.
    """
    try:
        first, second = results.read(before), results.read(after)
    except (OSError, ValueError) as error:
        print(f"--compare: {error}")
        return 2
    both = [suite for suite in first if suite in second]
    if not both:
        print(f"--compare: the two must have a suite in common; got {', '.join(first)} and {', '.join(second)}")
        return 2
    unlike = list(differences(both, first, second))
    for line in unlike:
        print(f"NOT THE SAME MACHINE OR SETTING: {line}")
    if unlike and not across:
        print("Nothing is compared: such ratios say nothing of the code. (--across compares all the same.)")
        return 2
    for suite in both:
        for name, record in (("first", first[suite]), ("second", second[suite])):
            if shared(record["environment"]):
                print(f"{suite}: other work shared the cores when the {name} result was taken")
    worse = 0
    for suite in both:
        worse += _print_suite(results.rows_of(first[suite]), results.rows_of(second[suite]), margin)
    if worse:
        print(f"{worse} rows of antlm_fast are slower or gone, beyond noise")
    return 1 if worse else 0


def differences(suites: Sequence[str], first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for suite in suites:
        a, b = first[suite], second[suite]
        if a["sizes"] != b["sizes"]:
            yield f"{suite}: sizes {a['sizes']} and {b['sizes']}"
        for name in SAME_MACHINE:
            if a["environment"].get(name) != b["environment"].get(name):
                yield f"{suite}: {name} {a['environment'].get(name)!r} and {b['environment'].get(name)!r}"


def is_ours(row: Row) -> bool:
    return "antlm_fast" in row.provider or (row.suite == "data" and "HF " not in row.provider)


def _print_suite(before: Sequence[Row], after: Sequence[Row], margin: float) -> int:
    """Prints every row that has changed; returns how many of ours for the worse. Peers that change show the noise."""
    known = {row.key: row for row in before}
    judged, gone = [], []
    for row in after:
        old = known.get(row.key)
        if old is not None and old.samples and row.samples:
            judged.append(judge(old, row, margin))
        elif old is not None and old.samples:
            gone.append(row)
    counts = {verdict: sum(each.verdict == verdict for each in judged) for verdict in ("slower", "faster", "same")}
    few = len(judged) - sum(counts.values())
    text = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    print(f"{after[0].suite}: {text}" + (f", {few} with too few samples" if few else ""))
    for each in judged:
        if each.verdict in ("slower", "faster"):
            name = f"{each.row.workload}; {each.row.case}; {each.row.provider}"
            band = f"{each.low:.2f} - {each.high:.2f}"
            print(f"  {each.verdict:8}{each.ratio:6.2f}  ({band})  {name}")
    for row in gone:
        print(f"  no figure any more: {row.workload}; {row.case}; {row.provider}: {row.reason}")
    return sum(each.verdict == "slower" and is_ours(each.row) for each in judged) + sum(map(is_ours, gone))
