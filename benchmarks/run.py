"""Throughput of antlm_fast beside its peers on this machine's CPU: `python benchmarks/run.py --quick`.

Each figure is the median of calls that took turns with the other providers'. A provider is checked against the
float64 reference before it is timed; one that is wrong or cannot run shows its reason instead of a figure.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import op_workloads
import step_workloads
from harness import Row, as_json, environment, shared, table
from sizes import SIZES, Sizes

SUITES: dict[str, Callable[[Sizes], Iterator[list[Row]]]] = {
    "attention": op_workloads.attention_suite,
    "cross_entropy": op_workloads.cross_entropy_suite,
    "train_step": step_workloads.train_step,
    "switch": step_workloads.switch,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--sizes", choices=SIZES, default="full", help="of the workloads; tiny only tries the code out")
    sizes.add_argument("--quick", action="store_const", dest="sizes", const="quick", help="the same as --sizes quick")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write raw samples and environment here")
    arguments = parser.parse_args(argv)

    surroundings = environment()
    for name, value in surroundings.items():
        print(f"{name:14}{value}")
    if shared(surroundings):
        print("\nOther work shares the cores: of these figures only ratios mean something, and with more threads than")
        print("free cores not even those, for torch then waits at every parallel region (set OMP_NUM_THREADS).")
    rows: list[Row] = []
    for suite in (op_workloads.peak, *(SUITES[name] for name in arguments.suite)):
        for measured in suite(SIZES[arguments.sizes]):
            rows += measured
            print("", *table(measured), sep="\n", flush=True)
    if arguments.output is not None:
        surroundings["load_average_after"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
        record = {"environment": surroundings, "sizes": arguments.sizes, "rows": as_json(rows)}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
