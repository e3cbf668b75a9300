"""Stage g: whole training steps beside Hugging Face, and what a flip of the objective costs.

As the suites train_step and switch of benchmarks/run.py, whose code this shares; but all variants are started at the
same time and kept for all batches, so the time to the first step would mean nothing, and is left out. Those that are
compiled come last, for they take a minute. A step's time is the clock's, from an idle device to an idle device.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace

from harness import TIME_USED_UP, Bench, Call, Provider, Row, Told, measure, told
from sizes import BOTH, Scene
from step_workloads import VARIANTS, Stage, title, with_findings, work_of

from gpu_stages.plan import GpuBench, StepsOfModel

_OTHER = {"CLM": "MLM", "MLM": "CLM"}


def run(bench: GpuBench) -> Iterator[list[Row]]:
    parts = [(plan, False) for plan in bench.sizes.steps] + [
        (plan, True) for plan in bench.sizes.steps if plan.compiled
    ]
    for number, (plan, compiled) in enumerate(parts):
        if bench.left() < 0:
            return
        # of what is compiled less may come, but what it takes is not taken from the others
        weights = [1.0 if slow else 2.0 for _, slow in parts[number:]]
        own = replace(bench, until=time.monotonic() + bench.left() * weights[0] / sum(weights))
        yield from (_compiled if compiled else _eager)(own, plan)


def _eager(bench: GpuBench, plan: StepsOfModel) -> Iterator[list[Row]]:
    scenes = [_scene(bench, plan, batch, plan.variants, BOTH) for batch in plan.batches]
    with Stage(bench, scenes[0]) as stage:
        for number, scene in enumerate(scenes):
            stage.scene = scene  # other batches, in the same processes
            stage.extras.clear()
            yield steps(bench, stage, title(scene))
            if number == 0:
                yield from flips(bench, stage)


def _compiled(bench: GpuBench, plan: StepsOfModel) -> Iterator[list[Row]]:
    scene = _scene(bench, plan, plan.batches[0], (plan.variants[0], *plan.compiled), (plan.objective,))
    with Stage(bench, scene) as stage:
        yield steps(bench, stage, f"{title(scene)}, compiled peers")


def _scene(
    bench: GpuBench, plan: StepsOfModel, batch: tuple[int, int], variants: Sequence[str], objectives: tuple[str, ...]
) -> Scene:
    rounds = bench.sizes.rounds
    return Scene(
        model=plan.model,
        batch=batch,
        precision="bf16",
        objectives=objectives,
        variants=tuple(variants),
        rounds=rounds,
    )


def steps(bench: Bench, stage: Stage, workload: str) -> list[Row]:
    scene = stage.scene
    stage.least_limit = 5.0  # a late answer would take the time of those after it
    pool = ThreadPoolExecutor(len(scene.variants))
    starting = [pool.submit(stage.worker, name) for name in scene.variants]
    for name in scene.variants:  # what is exact is computed once, before all ask for it, while they start
        for objective in scene.objectives:
            stage.exact(VARIANTS[name], objective)
    wait(starting)
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
    rows = measure("train_step", workload, providers, rounds=scene.rounds, warmup=2, until=bench.until)
    pool.shutdown(wait=True)  # a worker does one thing at a time
    return [with_findings(bench, scene, stage, row) for row in rows]


def _prepared(stage: Stage, name: str) -> dict[str, Call | Exception]:
    """Each objective's checked step, or why there is none: one thread a variant, since a worker does one at a time."""
    found: dict[str, Call | Exception] = {}
    for objective in stage.scene.objectives:
        try:
            found[objective] = stage.prepare(name, objective)
            with suppress(Told):  # not every system can tell
                peak = stage.worker(name).call("peak_mib", timeout=stage.limit(), **stage.key(objective))
                stage.extras[objective, name]["peak_mib"] = peak
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
