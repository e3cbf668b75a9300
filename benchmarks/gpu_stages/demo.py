"""Stage h: real steps of the recipe demo in float32, on the GPU and on a CPU, by the same seed: losses side by side.

The two start from the same weights, see the same masks, and differ in the order of their sums alone. What training
makes of such a difference grows with the steps, so the bound is tight before the first and loose after the last.
Without a GPU both runs are a CPU's, and equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import TIME_USED_UP, Row, with_extras

from gpu_stages.plan import GpuBench

# relative differences of validation losses: before the first step, and after the last
_FIRST_BOUND, _LAST_BOUND = 1e-4, 0.05
_SETTINGS = {"precision": "float32", "evaluation.minimal_pairs": "none", "logging.every_steps": "1"}


def run(bench: GpuBench) -> Iterator[list[Row]]:
    blank = Row(suite="demo", workload="demo, float32", case="", provider="", quantity="nats")
    with tempfile.TemporaryDirectory() as folder:
        runs = {"antlm_fast on the GPU" if bench.device == "cuda" else "antlm_fast": bench.device}
        runs["antlm_fast on the CPU" if bench.device == "cuda" else "antlm_fast again"] = "cpu"
        outputs = [Path(folder, str(number)) for number in range(len(runs))]
        processes = [_started(bench, device, output) for device, output in zip(runs.values(), outputs, strict=True)]
        try:
            reasons = [_ended(process, bench) for process in processes]
        finally:
            for process in processes:
                process.kill()
        found = [_losses(output / "metrics.jsonl") for output in outputs]
    for (name, reason), losses in zip(zip(runs, reasons, strict=True), found, strict=True):
        rows = [replace(blank, case=case, provider=name, samples=tuple(values)) for case, values in losses.items()]
        yield rows
        if reason is not None:
            yield [replace(blank, case="run", provider=name, reason=reason)]
    yield list(_differences(blank, *found))


def _started(bench: GpuBench, device: str, output: Path) -> subprocess.Popen[str]:
    settings = _SETTINGS | bench.sizes.demo_settings | {"device": device}
    command = [sys.executable, "-m", "antlm_fast.cli", "train", "--recipe", "demo", "--output", str(output)]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if bench.device == "cpu":  # two runs share the cores
        environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _ended(process: subprocess.Popen[str], bench: GpuBench) -> str | None:
    """Why the run has no end, or None."""
    try:
        output, _ = process.communicate(timeout=max(bench.left(), 1.0))
    except subprocess.TimeoutExpired:
        return TIME_USED_UP
    print(output[-4000:], flush=True)
    if process.returncode:
        last = output.strip().splitlines()[-1] if output.strip() else "no word"
        return f"FAILED it ended with status {process.returncode}: {last[:200]}"
    return None


def _losses(path: Path) -> dict[str, list[float]]:
    """By kind and objective, in order; of a run that was cut off, those it wrote."""
    found: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        record: dict[str, Any] = json.loads(line)
        for objective, value in record.get("loss", {}).items():
            found.setdefault(f"{record['kind']} {objective}", []).append(float(value))
    return found


def _differences(blank: Row, first: dict[str, list[float]], second: dict[str, list[float]]) -> Iterator[Row]:
    """Of the last losses that both runs wrote, relative; validation's are judged, those before step 1 more strictly."""
    for case in first:
        pairs = list(zip(first[case], second.get(case, ()), strict=False))
        row = replace(blank, workload="differences", case=case, provider="antlm_fast", quantity="relative")
        if not pairs:
            yield replace(row, reason=f"{TIME_USED_UP}: the two runs have no such loss in common")
            continue
        begin, end = (abs(x - y) / abs(y) for x, y in (pairs[0], pairs[-1]))
        if case.startswith("validation") and not (begin <= _FIRST_BOUND and end <= _LAST_BOUND):
            reason = f"WRONG losses differ by {begin:.1e} before the first step and {end:.1e} at the last; "
            yield replace(row, reason=f"{reason}the bounds are {_FIRST_BOUND:.0e} and {_LAST_BOUND:.0e}")
        else:
            yield with_extras(replace(row, samples=(end,)), of_the_first=begin, compared=len(pairs))
