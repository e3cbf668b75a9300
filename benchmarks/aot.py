"""The gate of compiled kernels, for GPUs that need not be there: `python benchmarks/aot.py`.

Compiles attention's and the loss's kernels in the shipped configurations, reads registers, spills, shared memory and
the instructions of the main loops from the binaries, and fails where they grew against benchmarks/aot_table.json. No
kernel runs, so nothing here is a time. A change that is meant: `python benchmarks/aot.py --write --compare`.
Whether another Triton compiles them at all: `--compiles`, with that Triton first on PYTHONPATH."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aot_report
from aot_report import Row

Work = Callable[[Any], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", metavar="ARCH", help="such as sm_90; default: all, as for the next three")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="half, tf32, ieee")
    parser.add_argument("--head-dims", nargs="+", type=int, metavar="N", help="head sizes; the loss's is 768")
    parser.add_argument(
        "--kernels", nargs="+", metavar="KERNEL", help="forward, delta, dq, dkdv, loss_forward, loss_d_logits"
    )
    parser.add_argument("--options", nargs="+", metavar="OPTION", help='such as dropout, "relative dropout", none')
    parser.add_argument(
        "--write", action="store_true", help="put what was compiled into the table, then judge by rules"
    )
    parser.add_argument("--compare", action="store_true", help="also with visibility as a constant, and a plain kernel")
    parser.add_argument("--compiles", action="store_true", help="only whether every kernel compiles, with any Triton")
    parser.add_argument("--markdown", action="store_true", help="print the table for the docs; compiles nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile; default: 2")
    parser.add_argument("--table", type=Path, default=aot_report.TABLE, metavar="FILE.json")
    arguments = parser.parse_args(argv)

    table = aot_report.read_table(arguments.table)
    if arguments.markdown:
        print(*aot_report.markdown(table), sep="\n")
        return 0
    if reason := cannot_compile():
        print(f"aot: {reason}", file=sys.stderr)
        return 2

    import aot_compile

    chosen = {}
    for option, known in (
        ("archs", aot_compile.ARCHS),
        ("kinds", aot_compile.KINDS),
        ("head_dims", aot_compile.SIZES),
        ("kernels", aot_compile.KERNELS),
    ):
        asked = getattr(arguments, option) or known
        if wrong := [value for value in asked if value not in known]:
            names = ", ".join(map(str, known))
            parser.error(f"--{option.replace('_', '-')} must be among {names}; got {wrong[0]}")
        chosen[option] = tuple(value for value in known if value in asked)

    configs = list(aot_compile.configurations(**chosen))
    whole = list(aot_compile.configurations())
    if arguments.options:
        known = sorted({config.option or "none" for config in whole})
        if wrong := [option for option in arguments.options if option not in known]:
            parser.error(f"--options must be among {', '.join(known)}; got {wrong[0]}")
        configs = [config for config in configs if (config.option or "none") in arguments.options]
    if arguments.write and len(configs) < len(whole) and table["triton"] not in (None, _version("triton")):
        parser.error(f"--write must be of the whole table: the old one was made with Triton {table['triton']}")
    if arguments.compiles:
        return compiles(configs, arguments.workers)
    cases = []
    if arguments.compare and "half" in chosen["kinds"]:
        cases = aot_compile.comparison_cases(chosen["archs"], chosen["head_dims"], chosen["kernels"])
    started = time.perf_counter()
    with _processes(arguments.workers) as pool:
        rows = _compiled(pool, aot_compile.row_of, configs, "configurations")
        comparison = _compiled(pool, aot_compile.comparison_of, cases, "comparisons")
    seconds = time.perf_counter() - started
    print(f"{len(rows)} configurations, {len(comparison)} comparisons: {seconds:.0f} s, {arguments.workers} workers")

    if arguments.write:
        versions = {"triton": _version("triton"), "torch": _version("torch"), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        order = [config.name for config in whole]
        table = versions | {
            "rows": aot_report.merged(table["rows"], rows, order),
            "comparison": aot_report.merged(table["comparison"], comparison, order),
        }
        aot_report.write_table(table, arguments.table)
        print(f"wrote {arguments.table}")
    if comparison:
        print("", *aot_report.comparison_lines(comparison), "", sep="\n")
    failures = judge(table, rows, comparison)
    for line in (*notes(table, rows, {config.name for config in whole}), *(f"FAIL {line}" for line in failures)):
        print(line)
    print(f"{len(failures)} failures" if failures else "every kernel holds")
    return 1 if failures else 0


def compiles(configs: Sequence[Any], workers: int) -> int:
    """Prints what does not compile or fit the device, and how many do on each architecture; the exit status."""
    from aot_compile import shared_of

    with _processes(workers) as pool:
        rows = _compiled(pool, shared_of, configs, "configurations")
    refused = []
    for config in configs:
        row, limit = rows[config.name], aot_report.SHARED_LIMIT[config.arch]
        if "error" in row:
            print(f"FAIL {config.name} does not compile: {row['error']}")
        elif row["shared_bytes"] > limit:
            print(f"FAIL {config.name} takes {row['shared_bytes']} bytes of shared memory; {limit} are there")
        else:
            continue
        refused.append(config.name)
    counts = []
    for arch in dict.fromkeys(config.arch for config in configs):
        names = [config.name for config in configs if config.arch == arch]
        counts.append(f"{arch} {len(set(names) - set(refused))} of {len(names)}")
    print(f"compiled with Triton {_version('triton')}, torch {_version('torch')}: {', '.join(counts)}")
    return 1 if refused else 0


def _processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def cannot_compile() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton must be installed to compile kernels: pip install '.[gpu]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET must not be 1: the interpreter compiles nothing"
    return None


def judge(table: Mapping[str, Any], rows: Mapping[str, Row], comparison: Mapping[str, Row]) -> list[str]:
    """One line for each entry that breaks a rule, grew against the table, or costs more than a constant flag."""
    found = []
    for name, row in rows.items():
        found += aot_report.broken_rules(name, row) + aot_report.growth(name, table["rows"].get(name), row)
    for name, row in comparison.items():
        found += aot_report.dearer(name, row)
    return found


def notes(table: Mapping[str, Any], rows: Mapping[str, Row], whole: set[str]) -> Iterator[str]:
    """What is worth knowing and no failure."""
    if table["triton"] not in (None, _version("triton")):
        yield (
            f"note: the table was made with Triton {table['triton']}, this is {_version('triton')}: "
            "differences may be the compiler's"
        )
    refused = [name for name, row in rows.items() if "error" in row]
    yield from (f"note: {name} does not compile: {rows[name]['error']}" for name in refused)
    known = table["rows"]
    moved = [name for name, row in rows.items() if known.get(name, row)["tile"] != row["tile"]]
    if moved:
        yield f"note: {len(moved)} rows have another tile than in the table, such as {moved[0]}"
    better = [name for name, row in rows.items() if aot_report.shrunk(name, known.get(name), row)]
    if better:
        yield f"note: {len(better)} rows shrank, such as {better[0]}: the table can be rewritten with --write"
    if stale := [name for name in known if name not in whole]:
        yield f"note: {len(stale)} rows of the table are not shipped any more, such as {stale[0]}: rewrite it"


def _compiled(pool: ProcessPoolExecutor, work: Work, configs: Sequence[Any], what: str) -> dict[str, dict[str, Any]]:
    """Rows by name, in the order of the configurations."""
    futures = {pool.submit(work, config): config.name for config in configs}
    rows = {futures[future]: future.result() for future in _shown(as_completed(futures), len(futures), what)}
    return {config.name: rows[config.name] for config in configs}


def _shown(finished: Iterator[Any], total: int, what: str) -> Iterator[Any]:
    """The same items, with a line of progress."""
    try:
        from tqdm import tqdm
    except ImportError:
        for at, item in enumerate(finished, 1):
            if at % 20 == 0 or at == total:
                print(f"{what}: {at}/{total}", flush=True)
            yield item
    else:
        yield from tqdm(finished, total=total, desc=what, disable=total == 0)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
