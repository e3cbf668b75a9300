"""Stage g: whole training steps beside Hugging Face, and what a flip of the objective costs.

As the suites train_step and switch of benchmarks/run.py, whose code this shares; but all variants are started and
compiled at the same time, so the time to the first step would mean nothing, and is left out. A compiled variant is
compiled for each objective. A step's time is the clock's, from an idle device to an idle device.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from harness import TIME_USED_UP, Call, Provider, Row, measure, told
from step_workloads import VARIANTS, Stage, shared_out, title, with_findings, work_of

from gpu_stages.plan import GpuBench

_OTHER = {"CLM": "MLM", "MLM": "CLM"}


def run(bench: GpuBench) -> Iterator[list[Row]]:
    for number, scene in enumerate(bench.sizes.scenes):
        if bench.left() < 0:
            return
        own = shared_out(bench, number)
        with Stage(own, scene) as stage:
            yield steps(own, stage)
            if number % 2 == 0:  # a model's first scene
                yield from flips(own, stage)


def steps(bench: GpuBench, stage: Stage) -> list[Row]:
    scene = stage.scene
    for name in scene.variants:  # what is exact is computed once, before all ask for it
        for objective in scene.objectives:
            stage.exact(VARIANTS[name], objective)
    with ThreadPoolExecutor(len(scene.variants)) as pool:
        ready = {name: pool.submit(_prepared, stage, name) for name in scene.variants}
        providers = [
            Provider(
                case=objective,
                name=name,
                prepare=functools.partial(_ready, ready[name], objective),
                amount=scene.batch[0] * scene.batch[1],
                unit="tokens/s",
                floor=bench.floor(work_of(stage, objective), scene.precision),
            )
            for objective in scene.objectives
            for name in scene.variants
        ]
        rows = measure("train_step", title(scene), providers, rounds=scene.rounds, warmup=2, until=bench.until)
    return [with_findings(bench, scene, stage, row) for row in rows]


def _prepared(stage: Stage, name: str) -> dict[str, Call | Exception]:
    """Each objective's checked step, or why there is none: one thread a variant, since a worker does one at a time."""
    found: dict[str, Call | Exception] = {}
    for objective in stage.scene.objectives:
        try:
            found[objective] = stage.prepare(name, objective)
            stage.extras[objective, name].pop("first_step_s", None)
        except Exception as error:  # it becomes the row's reason
            found[objective] = error
    return found


def _ready(prepared: Future[dict[str, Call | Exception]], objective: str) -> Call:
    call = prepared.result()[objective]
    if isinstance(call, Exception):
        raise call
    return call


def flips(bench: GpuBench, stage: Stage) -> Iterator[list[Row]]:
    """The first step after a flip over the median of the phase's other steps; graphs that a flip compiled."""
    scene = stage.scene
    rows, counts = [], []
    for name in scene.variants:
        if name not in stage.workers:
            continue
        for objective in scene.objectives:
            row = Row(
                suite="switch", workload=title(scene), case=f"to {objective}", provider=name, quantity="of a step"
            )
            row, count = _flipped(bench, stage, row, objective)
            rows.append(row)
            counts.append(count)
    if rows:
        yield rows
        yield counts


def _flipped(bench: GpuBench, stage: Stage, row: Row, objective: str) -> tuple[Row, Row]:
    count = replace(row, workload=f"{row.workload}: recompiles", quantity="count")
    ratios: list[float] = []
    recompiles = 0
    try:
        for _ in range(bench.sizes.flips):
            if ratios and bench.left() < 0:
                break
            keywords = stage.key(objective) | {"before": _OTHER[objective], "steps": bench.sizes.phase_steps}
            found = stage.worker(row.provider).call("flips", timeout=stage.limit(), **keywords)
            first, *others = found["seconds"]
            ratios.append(first / statistics.median(others))
            recompiles += found["recompiles"]
    except Exception as error:
        reason = told(error)
        return replace(row, reason=reason), replace(count, reason=reason)
    if not ratios:
        return replace(row, reason=TIME_USED_UP), replace(count, reason=TIME_USED_UP)
    return replace(row, samples=tuple(ratios)), replace(count, samples=(float(recompiles),))
