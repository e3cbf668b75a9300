"""Speed and memory of antlm_fast beside its peers on this machine: `python benchmarks/run.py --quick`.

    python benchmarks/run.py --output benchmarks/results/NAME.json             every suite, 76 minutes at most
    python benchmarks/run.py --suite switch --merge --output .../NAME.json     one suite, into a file that has others
    python benchmarks/run.py --compare A.json B.json                           exit status 1 where B is slower than A
    python benchmarks/run.py --dry-run --device cuda                           the plan, and shapes on fake CUDA tensors
    python benchmarks/report.py                                                docs/performance.md from the results

Providers take turns, call by call; a figure is the median of its calls, with quartiles. A provider's numbers are
checked against the float64 reference before it is timed; one that is wrong, or cannot run here, has its reason instead
of a figure. "of floor" is the least time that the measured peak and bandwidth allow, over the time taken (roofline.py).
--output writes NAME.json with all samples, NAME.csv, and a picture of each suite.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare
import data_workloads
import layer_workloads
import memory_workloads
import op_workloads
import results
import scaling
import step_workloads
import torch
from harness import Bench, Row, environment, shared, table, told
from roofline import Limits, measure_limits
from sizes import SIZES, Scene, Sizes

SUITES: dict[str, Callable[[Bench], Iterator[list[Row]]]] = {
    "attention": op_workloads.attention_suite,
    "disentangled": op_workloads.disentangled_suite,
    "cross_entropy": op_workloads.cross_entropy_suite,
    "layers": layer_workloads.layers_suite,
    "train_step": step_workloads.train_step,
    "switch": step_workloads.switch,
    "memory": memory_workloads.memory_suite,
    "scaling": scaling.scaling_suite,
    "data": data_workloads.data_suite,
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    sizes = found.add_mutually_exclusive_group()
    sizes.add_argument("--sizes", choices=SIZES, default="full", help="of the workloads; tiny only tries the code out")
    sizes.add_argument("--quick", action="store_const", dest="sizes", const="quick", help="the same as --sizes quick")
    found.add_argument("--minutes", type=float, help="the most that each suite may take; default: see sizes.py")
    found.add_argument("--scene", nargs="+", metavar="PART", help="only training steps whose title holds one of these")
    found.add_argument("--uncompiled", action="store_true", help="leave torch.compile out: minutes on a slow machine")
    found.add_argument("--every-variant", action="store_true", help="all of transformers' variants in each scene")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--output", type=Path, metavar="FILE.json", help="write samples and environment; CSV, pictures")
    found.add_argument("--merge", action="store_true", help="keep the suites that --output has and were not run now")
    found.add_argument("--dry-run", action="store_true", help="build every provider's inputs and print the plan")
    found.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="measure nothing")
    found.add_argument("--margin", type=float, default=compare.MARGIN, help="of --compare; default %(default)s")
    found.add_argument("--across", action="store_true", help="--compare also results of different machines")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.compare:
        return compare.compare(*arguments.compare, margin=arguments.margin, across=arguments.across)
    if arguments.device == "cuda" and not arguments.dry_run and not torch.cuda.is_available():
        print("--device cuda: this torch sees no CUDA device (--dry-run shows the plan without one)")
        return 2
    _quieten()
    sizes = every_variant(SIZES[arguments.sizes]) if arguments.every_variant else SIZES[arguments.sizes]
    if arguments.scene:
        sizes = only_scenes(sizes, arguments.scene)
    if arguments.uncompiled:
        sizes = replace(sizes, compiled=False)
    device = "cpu" if arguments.dry_run else arguments.device  # fake tensors stand for the device's
    surroundings = environment(device)
    for name, value in surroundings.items():
        print(f"{name:26}{value}")
    if shared(surroundings) and not arguments.dry_run:
        print("\nOther work shares the cores: of these figures only ratios mean something, and with more threads than")
        print("free cores not even those, for torch then waits at every parallel region (set OMP_NUM_THREADS).")
    limits: Limits | None = None
    if not arguments.dry_run:
        limits, rows = measure_limits(Bench(sizes=sizes, device=device))
        for _, own in results.workloads(rows):
            print("", *table(own), sep="\n", flush=True)
        _show(limits)
    suites: dict[str, Any] = {}
    for name in arguments.suite:
        begun = time.monotonic()
        minutes = arguments.minutes or sizes.minutes[name]
        bench = Bench(sizes=sizes, device=device, limits=limits, until=begun + 60 * minutes, dry=arguments.dry_run)
        rows = measured(name, bench)
        taken = (time.monotonic() - begun) / 60
        print(f"\n{name} took {taken:.1f} minutes", flush=True)
        now = {**surroundings, "load_average_after": list(os.getloadavg()) if hasattr(os, "getloadavg") else None}
        suites[name] = results.suite_record(now, limits, arguments.sizes, taken, rows)
        if arguments.output is not None:  # after each suite: a run that is stopped keeps what it has
            written = results.write(arguments.output, suites, merge=arguments.merge)
            results.write_csv(arguments.output.with_suffix(".csv"), written)
    if arguments.output is not None and not results.draw(arguments.output, written):
        print("no pictures: matplotlib is not installed (pip install '.[bench]')")
    return 0


def measured(name: str, bench: Bench) -> list[Row]:
    """All rows of a suite, printed as they come; a suite that breaks keeps those it had."""
    rows: list[Row] = []
    try:
        for own in SUITES[name](bench):
            for _, part in results.workloads(own):
                print("", *table(part), sep="\n", flush=True)
            rows += own
    except Exception as error:  # a fault of one suite must not take the others' results along
        rows.append(Row(suite=name, workload="suite", case="", provider="antlm_fast", reason=told(error)))
        print("", *table(rows[-1:]), sep="\n", flush=True)
    return rows


def only_scenes(sizes: Sizes, parts: Sequence[str]) -> Sizes:
    """Without the scenes whose title holds none of the parts: the time goes to the others."""

    def kept(scenes: tuple[Scene, ...]) -> tuple[Scene, ...]:
        return tuple(scene for scene in scenes if any(part in step_workloads.title(scene) for part in parts))

    return replace(sizes, **{name: kept(getattr(sizes, name)) for name in ("scenes", "switch", "memory_steps")})


def every_variant(sizes: Sizes) -> Sizes:
    """Each scene with every variant that stands for its model."""

    def fuller(scene: Scene) -> Scene:
        is_ltg = sizes.models[scene.model].architecture != "baby_llama"
        sources = ("ours", "ltg", "bert", "modernbert") if is_ltg else ("ours", "llama", "gpt2")
        others = [name for name, variant in step_workloads.VARIANTS.items() if variant.source in sources]
        return replace(scene, variants=tuple(dict.fromkeys((*scene.variants, *others))))

    return replace(sizes, scenes=tuple(map(fuller, sizes.scenes)))


def _show(limits: Limits) -> None:
    peaks = ", ".join(f"{value / 1e9:,.0f} GFLOP/s {name}" for name, value in limits.flops_per_s.items())
    print(f"\nlimits for the floors: {peaks}, {limits.bytes_per_s / 1e9:,.0f} GB/s")


def _quieten() -> None:
    """What libraries say while they are tried out is not a result."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    raise SystemExit(main())
