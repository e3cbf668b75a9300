"""Whole training steps and flips of the objective; every variant in a process of its own, all of them in turns.

Beside the time of a step: tokens/s, the share of the measured GEMM peak (MFU) in each phase, seconds to the first step
from the launch of the process (imports and compilation included), and the process's peak memory in a step.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import TIME_USED_UP, Bench, Provider, Row, Told, told, with_extras
from roofline import step_work
from sizes import Scene
from step_runner import drawn_batch, fake_loss, save_exact
from surroundings import available_gib
from workers import MALLOC, Worker


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of doing a step; fields as in `step_runner.StepRunner`. malloc: glibc keeps its memory (workers.MALLOC)."""

    source: str
    form: str
    compiled: bool = False
    mode: str | None = None
    dropout: bool = True
    malloc: bool = False
    threads: int | None = None


def _hugging_face() -> Iterator[tuple[str, Variant]]:
    for family, title in (("llama", "Llama"), ("gpt2", "GPT-2"), ("bert", "BERT"), ("modernbert", "ModernBERT")):
        for attention in ("eager", "sdpa"):
            for compiled in (False, True):
                for malloc in (False, True):
                    marks = ", compiled" * compiled + ", malloc" * malloc
                    yield (
                        f"HF {title} {attention}{marks}",
                        Variant(source=family, form=attention, compiled=compiled, malloc=malloc),
                    )
            yield (
                f"HF {title} {attention}, compiled, reduce-overhead",
                Variant(source=family, form=attention, compiled=True, mode="reduce-overhead"),
            )


VARIANTS: dict[str, Variant] = {
    "antlm_fast": Variant(source="ours", form="auto"),
    "antlm_fast, malloc": Variant(source="ours", form="auto", malloc=True),
    "antlm_fast, no dropout": Variant(source="ours", form="auto", dropout=False),
    "antlm_fast, compiled": Variant(source="ours", form="auto", compiled=True),
    "LTG-BERT gathered": Variant(source="ltg", form="gathered"),
    "LTG-BERT einsum": Variant(source="ltg", form="einsum"),
    "LTG-BERT gathered, compiled, malloc": Variant(source="ltg", form="gathered", compiled=True, malloc=True),
    **dict(_hugging_face()),
}
# memory that must stay free for a further process to be started
_RESERVE_GIB = 3.5
_SLOW_WEIGHT = 3
_SAME_WEIGHTS = ("ours", "ltg", "llama")


class Stage:
    """The workers of a scene, started one after the other, and what was found when they were."""

    def __init__(self, bench: Bench, scene: Scene) -> None:
        self.bench, self.scene = bench, scene
        self.config = bench.sizes.models[scene.model]
        self.workers: dict[str, Worker] = {}
        self.extras: dict[tuple[str, str], dict[str, float]] = {}
        self.least_limit = 30.0
        self._folder = tempfile.TemporaryDirectory()
        self._exact: dict[str, Path] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self._folder.cleanup()

    def worker(self, name: str) -> Worker:
        if name not in self.workers:
            free = available_gib()
            if free is not None and free < _RESERVE_GIB:
                raise Told(f"only {free:.1f} GiB of memory are free beside the others")
            self.workers[name] = start(self.bench, self.scene, VARIANTS[name])
        return self.workers[name]

    def limit(self) -> float:
        """Seconds that a single answer may take: a step is not broken off because the suite's end is near."""
        return max(min(self.bench.left(), 600.0), self.least_limit)

    def key(self, objective: str) -> dict[str, Any]:
        sequences, seqlen = self.scene.batch
        return {"objective": objective, "sequences": sequences, "seqlen": seqlen}

    def prepare(self, name: str, objective: str) -> Callable[[], object]:
        """A checked step of the variant, as a call that returns its own seconds."""
        variant, key = VARIANTS[name], self.key(objective)
        if variant.compiled and not self.bench.sizes.compiled:
            raise Told("nothing is compiled at these sizes, or with --uncompiled; see --sizes full")
        is_new = name not in self.workers
        worker = self.worker(name)
        limit = self.limit()
        found = self.extras.setdefault((objective, name), {})
        first = worker.call("first_step", timeout=limit, **key)
        if is_new:  # later the process is warm, and may hold on to what checks have needed
            found["first_step_s"] = first
            with suppress(Told):  # not every system can tell
                found["peak_mib"] = worker.call("peak_mib", timeout=limit, **key)
        found["gradient_error"] = worker.call("check", timeout=limit, exact=self.exact(variant, objective), **key)
        return functools.partial(worker.call, "step", timeout=limit, **key)

    def exact(self, variant: Variant, objective: str) -> str | None:
        if variant.source not in _SAME_WEIGHTS:
            return None
        if objective not in self._exact:
            path = Path(self._folder.name, f"{objective}.pt")
            save_exact(asdict(self.config), objective, self.scene.batch[1], path)
            self._exact[objective] = path
        return str(self._exact[objective])


def start(bench: Bench, scene: Scene, variant: Variant) -> Worker:
    values = asdict(variant)
    malloc, threads = values.pop("malloc"), values.pop("threads")
    environment = dict(MALLOC) if malloc else {}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    config = asdict(bench.sizes.models[scene.model])
    arguments = {**values, "config": config, "precision": scene.precision, "device": bench.device}
    return Worker("step_runner:StepRunner", arguments, environment)


def train_step(bench: Bench) -> Iterator[list[Row]]:
    """Both objectives of the same model in the same process, and the peers' steps of the same size on the same data."""
    for number, scene in enumerate(bench.sizes.scenes):
        own = shared_out(bench, number)
        with Stage(own, scene) as stage:
            works = {objective: work_of(stage, objective) for objective in scene.objectives}
            providers = [
                Provider(
                    case=objective,
                    name=name,
                    prepare=functools.partial(stage.prepare, name, objective),
                    amount=scene.batch[0] * scene.batch[1],
                    unit="tokens/s",
                    floor=bench.floor(work, scene.precision),
                    faces=functools.partial(_faces, stage, name, objective),
                    rounds=1 if VARIANTS[name].form == "einsum" and scene.batch[1] >= 512 else None,
                )
                for objective, work in works.items()
                for name in scene.variants
            ]
            rows = own.measure("train_step", title(scene), providers, rounds=scene.rounds)
            yield [with_findings(bench, scene, stage, row) for row in rows]


def is_slow(variant: Variant, bench: Bench) -> bool:
    """To compile a step, or to take the equation as it stands, costs as much as several others together."""
    return (variant.compiled and bench.sizes.compiled) or variant.form == "einsum"


def shared_out(bench: Bench, number: int) -> Bench:
    """The scene's part of the time that is left; what it does not use goes to those after it."""

    def weight(scene: Scene) -> int:
        slow = sum(is_slow(VARIANTS[name], bench) for name in scene.variants)
        return (len(scene.variants) + _SLOW_WEIGHT * slow) * len(scene.objectives)

    weights = [weight(scene) for scene in bench.sizes.scenes]
    if bench.until == float("inf"):
        return bench
    return replace(bench, until=time.monotonic() + bench.left() * weights[number] / sum(weights[number:]))


def _faces(stage: Stage, name: str, objective: str) -> str:
    variant = VARIANTS[name]
    return fake_loss(asdict(stage.config), variant.source, variant.form, **stage.key(objective))


def work_of(stage: Stage, objective: str) -> Any:
    scene = stage.scene
    batch = drawn_batch(stage.config.vocab_size, objective, *scene.batch)
    labelled = sum(batch.num_labelled.values())
    return step_work(stage.config, *scene.batch, labelled, scene.precision, causal=objective == "CLM")


def title(scene: Scene) -> str:
    return f"{scene.model}, {scene.batch[0]} x {scene.batch[1]} tokens, {scene.precision}"


def with_findings(bench: Bench, scene: Scene, stage: Stage, row: Row) -> Row:
    if row.median is None:
        return row
    work = work_of(stage, row.case)
    mfu = work.flops / row.median / bench.limits.flops_per_s[scene.precision] if bench.limits is not None else None
    extras = {} if mfu is None else {"mfu_percent": 100 * mfu}
    return with_extras(row, **extras, **stage.extras.get((row.case, row.provider), {}))


def switch(bench: Bench) -> Iterator[list[Row]]:
    """What a flip costs: the first ever, the first step after a later one, the median of the phase's other steps; and
    what it compiles.

    "recompiles" counts graphs that torch.compile made after the flip; the first flip's are those of a new value.
    """
    for scene in bench.sizes.switch:
        with Stage(bench, scene) as stage:
            yield from _flips(bench, scene, stage)


_KINDS = ("later steps", "first step after a flip", "first flip ever")


def _flips(bench: Bench, scene: Scene, stage: Stage) -> Iterator[list[Row]]:
    sequences, seqlen = scene.batch
    blank = Row(suite="switch", workload=title(scene), case="", provider="", unit="tokens/s", amount=sequences * seqlen)
    rows: dict[tuple[str, str, str], Row] = {
        (objective, name, kind): replace(blank, case=objective, provider=f"{name}: {kind}")
        for objective in scene.objectives
        for name in scene.variants
        for kind in (_KINDS if objective != scene.objectives[0] else _KINDS[:2])
    }
    counts: list[Row] = []
    samples: dict[tuple[str, str, str], list[float]] = {key: [] for key in rows}
    recompiles: dict[str, list[int]] = {name: [] for name in scene.variants}
    reasons: dict[str, str] = {}
    if bench.dry:
        reasons = dict.fromkeys(scene.variants, f"would be flipped {bench.sizes.flips} times")
    others = {"CLM": "MLM", "MLM": "CLM"}
    for name in scene.variants:
        if name not in reasons:
            try:
                _first_flip(stage, name, samples, recompiles)
            except Exception as error:  # this variant's rows say so; the others go on
                reasons[name] = told(error)
    for flip in range(bench.sizes.flips):
        objective = scene.objectives[flip % 2]
        for name in scene.variants:
            if name in reasons or (flip and bench.left() < 0):
                continue
            try:
                keywords = stage.key(objective) | {"before": others[objective], "steps": bench.sizes.phase_steps}
                found = stage.worker(name).call("flips", **keywords)
            except Told as error:
                reasons[name] = told(error)
                continue
            samples[objective, name, _KINDS[1]].append(found["seconds"][0])
            # one figure a phase: the two are compared within it, for the machine's other load changes between phases
            samples[objective, name, _KINDS[0]].append(statistics.median(found["seconds"][1:]))
            recompiles[name].append(found["recompiles"])
    for name in scene.variants:
        counts += _counts(bench, scene, stage, name, recompiles[name], reasons.get(name))
    yield [
        replace(row, reason=reasons[key[1]])
        if key[1] in reasons
        else replace(row, samples=tuple(samples[key]), reason=None if samples[key] else TIME_USED_UP)
        for key, row in rows.items()
    ]
    yield counts


def _first_flip(
    stage: Stage,
    name: str,
    samples: dict[tuple[str, str, str], list[float]],
    recompiles: dict[str, list[int]],
) -> None:
    """A process whose first steps are of the first objective flips to the second; both are checked after it."""
    first, second = stage.scene.objectives[:2]
    variant = VARIANTS[name]
    if variant.compiled and not stage.bench.sizes.compiled:
        raise Told("nothing is compiled at these sizes, or with --uncompiled; see --sizes full")
    worker = stage.worker(name)
    limit = stage.limit()
    for _ in range(2):
        worker.call("step", timeout=limit, **stage.key(first))
    found = worker.call("flips", timeout=limit, before=first, steps=1, **stage.key(second))
    samples[second, name, _KINDS[2]] += found["seconds"]
    recompiles[name].append(found["recompiles"])
    for objective in (first, second):
        worker.call("check", timeout=limit, exact=stage.exact(variant, objective), **stage.key(objective))


def _counts(
    bench: Bench, scene: Scene, stage: Stage, name: str, recompiles: list[int], reason: str | None
) -> Iterator[Row]:
    blank = Row(suite="switch", workload=f"{title(scene)}: per flip", case="", provider=name, quantity="count")
    if reason is not None:
        yield replace(blank, case="recompiles", reason=reason)
        return
    yield replace(blank, case="recompiles", samples=tuple(map(float, recompiles[1:] or recompiles)))
    yield replace(blank, case="first flip's", samples=(float(recompiles[0]),))
    try:
        captures = stage.worker(name).call("recaptures", **stage.key("MLM"))
        yield replace(blank, case="re-captures", samples=(captures,))
    except Told as error:
        yield replace(blank, case="re-captures", reason=told(error))


def memory_of_steps(bench: Bench) -> Iterator[list[Row]]:
    """Peak memory of a step, each variant in a new process."""
    for scene in bench.sizes.memory_steps:
        rows = []
        with ExitStack() as stack:
            stage = stack.enter_context(Stage(bench, scene))
            for objective in scene.objectives:
                for name in scene.variants:
                    row = Row(
                        suite="memory",
                        workload=f"step of {title(scene)}",
                        case=objective,
                        provider=name,
                        quantity="MiB",
                    )
                    rows.append(measured_peak(bench, stage, row))
        yield rows


def measured_peak(bench: Bench, stage: Stage, row: Row) -> Row:
    if bench.dry:
        return replace(row, reason="would be measured in a new process")
    try:
        worker = stage.worker(row.provider)
        worker.call("step", **stage.key(row.case))
        peaks: Mapping[int, float] = {n: worker.call("peak_mib", **stage.key(row.case)) for n in range(2)}
        return replace(row, samples=tuple(peaks.values()))
    except Told as error:
        return replace(row, reason=told(error))
