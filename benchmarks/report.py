"""docs/performance.md from the committed results: `python benchmarks/report.py`.

Reads every result of this format in benchmarks/results, draws its pictures again, and writes the tables. Nothing is
measured here, and no number of the document is written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import results
from harness import Row, amount_text, of_floor, over_first, quartiles, rate_text
from peers import hugging_face

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"

METHOD = """\
# Performance

Written by `python benchmarks/report.py` from the files in [benchmarks/results](../benchmarks/results); nothing here was
typed in. How to measure your own machine: `python benchmarks/run.py --quick` (minutes), or
`python benchmarks/run.py --output benchmarks/results/NAME.json` (76 minutes at most).

## How it is measured

* All ways of doing a piece of work take turns, call by call, so that a load on the machine meets all of them. Figures
  are medians, with lower and upper quartile; "times" is the median over rounds of this way's time over the first one's.
* A way is held to the float64 reference before it is timed, results and gradients, within an error budget that plain
  code of the same dtype sets on the same inputs; whole steps by the relative error of all gradients together (1e-4 in
  float32, 5e-2 under bfloat16 autocast, where autocast alone costs 1 to 3 %). Models that cannot have our weights are
  held to themselves in float64, and must be causal and bidirectional where the flag says so. What is wrong gets no
  figure; what cannot run has its reason in the table.
* Steps: forward, backward, clipping, fused AdamW at learning rate 0; making the batch is left out for all. Every way
  has a process of its own; the processes wait for one another, and torch.compile starts from an empty cache. "malloc"
  is MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=64 GiB, MALLOC_TOP_PAD_=256 MiB. "compiled" is torch.compile of model
  and loss, static shapes. First step: seconds from the launch of the process, with imports and compilation. Peak
  memory: of the whole process during a step.
* Limits are measured by the tool when it starts: the best matrix product of each dtype, the best copy or triad. The
  floor is FLOPs / peak + bytes / bandwidth, where FLOPs are those of the mathematics (all layers on all tokens, the
  head on labelled tokens, six for each weight and token) and bytes those of the operation's interface, or of AdamW.
  100 % of the floor cannot be beaten but by leaving work out, or where tensors stay in cache (layers). MFU: the step's
  FLOPs over its time, of that peak.
* `benchmarks/run.py --compare A.json B.json` says what became slower between two results (ratio of medians, 99 %
  bootstrap interval, beyond a margin of 5 %), and refuses results of different machines or threads.
"""

PEERS = """\
## Who is compared

Our LTG-BERT peers are written from the paper's equations (benchmarks/peers/eager_ltg_bert.py): "gathered" is what one
writes with care in plain torch, "einsum" the equation as it stands. Stock models of transformers, unpatched, their
`is_causal` flipped as an argument:

"""

NOT_MEASURED = """\
## What was not measured

{gpu}* More than one machine, more threads than the tables name, several processes training together.
* Quality: a step is judged by its gradients; what training reaches is in [results.md](results.md).
"""

NO_GPU = "* No GPU: `--device cuda` (events, cache flushes, CUDA-graph replays) was run on fake tensors alone.\n"

_TITLES = {
    "stages": "How the stages ended, and their seconds",
    "limits": "Ceilings",
    "proof": "Smallest proof: the largest error, of what its budget allows",
    "tests": "Tests with compiled kernels",
    "tiles": "Tiles",
    "attention": "Attention, forward and backward",
    "disentangled": "Disentangled attention, forward and backward",
    "cross_entropy": "Head and loss, forward and backward",
    "layers": "Between the matrix products, forward and backward",
    "train_step": "Training steps",
    "switch": "Flips of the objective",
    "memory": "Peak memory",
    "scaling": "How cost grows",
    "data": "Data",
    "demo": "The demo in float32, on the GPU and on a CPU: losses",
}


def document(files: Mapping[str, Mapping[str, Any]], folder: str = "../benchmarks/results") -> str:
    """The whole text; `files` are suites by the name of the result, folder is where pictures lie, seen from docs."""
    parts = [METHOD]
    for name, suites in files.items():
        if len(files) > 1:
            parts.append(f"# {name}\n")
        parts.append("\n".join(machine(suites)) + "\n")
        ordered = sorted(suites, key=list(_TITLES).index)
        parts += ["\n".join(section(name, suite, suites[suite], folder)) + "\n" for suite in ordered]
    if not files:
        parts.append("No result has been committed yet.\n")
    peers = str(hugging_face.__doc__).partition("\n\n")[2].strip()
    indented = "\n".join(f"    {line}".rstrip() for line in peers.splitlines())
    devices = {record["environment"]["device"] for suites in files.values() for record in suites.values()}
    gaps = NOT_MEASURED.format(gpu="" if "cuda" in devices else NO_GPU)
    return "\n".join([*parts, PEERS + indented + "\n", gaps])


def machine(suites: Mapping[str, Any]) -> Iterator[str]:
    yield "## Machine\n"
    yield "| suite | when | machine | versions | load before, after | sizes, minutes | limits |"
    yield "|---|---|---|---|---|---|---|"
    for suite, record in suites.items():
        e = record["environment"]
        where = (
            f"{e['gpu'] or e['cpu']}, {e['capability']}, {e['threads']} of {e['cores']} cores, {e['memory_gib']} GiB"
        )
        versions = f"torch {e['torch']}, transformers {e['transformers']}, Python {e['python']}"
        loads = [e.get("load_average"), e.get("load_average_after")]
        load = ", ".join("-" if each is None else f"{each[0]:.1f}" for each in loads)
        limits = record["limits"]
        peaks = "-"
        if limits is not None:
            peaks = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in limits["flops_per_s"].items())
            peaks += f", {limits['bytes_per_s'] / 1e9:.0f} GB/s"
        taken = f"{record['sizes']}, {record['minutes']:.1f}"
        yield f"| {suite} | {e['date'][:16]} | {where} | {versions} | {load} | {taken} | {peaks} |"


def section(name: str, suite: str, record: Mapping[str, Any], folder: str) -> Iterator[str]:
    rows = results.rows_of(record)
    yield f"## {_TITLES[suite]}\n"
    by_gpu = str(record["sizes"]).startswith("gpu.py")
    yield "`python benchmarks/gpu.py`\n" if by_gpu else f"`python benchmarks/run.py --suite {suite}`\n"
    if any(row.samples for row in rows):
        yield f"![{_TITLES[suite]}]({folder}/{name}-{suite}.png)\n"
    for workload, own in results.workloads(rows):
        yield f"### {workload}\n"
        yield from markdown(own)
        yield ""
    yield from reasons(rows)


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """A table of one workload; columns that no row fills are left out, rows without a figure stand below it."""
    shown = [row for row in rows if row.samples]
    if not shown:
        return
    extras = list(dict.fromkeys(name for row in shown for name in row.extras))
    has_rate = any(row.quantity == "s" for row in shown)
    has_floor = any(row.floor for row in shown)
    has_times = any(over_first(row, rows) not in (None, 1.0) for row in shown)
    header = ["case", "provider", "median", "quartiles"]
    header += ["rate"] * has_rate + ["of floor"] * has_floor + ["times"] * has_times
    yield "| " + " | ".join(header + [name.replace("_", " ") for name in extras]) + " |"
    yield "|---" * (len(header) + len(extras)) + "|"
    for row in shown:
        low, middle, high = (amount_text(value, row.quantity) for value in quartiles(row.samples))
        cells = [row.case, f"**{row.provider}**" if "antlm_fast" in row.provider else row.provider, middle]
        cells.append(f"{low} - {high}" if len(row.samples) > 1 else "one sample")
        times, floor = over_first(row, rows), of_floor(row)
        cells += [rate_text(row)] * has_rate
        cells += ["" if floor is None else f"{floor:.0%}"] * has_floor
        cells += ["" if times is None else f"{times:.2f}"] * has_times
        cells += [f"{row.extras[name]:.3g}" if name in row.extras else "" for name in extras]
        yield "| " + " | ".join(cells) + " |"


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Who has no figure, and why; each reason once."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            named = (
                f"{row.provider} ({row.case})" if row.suite in ("train_step", "switch") and row.case else row.provider
            )
            why.setdefault(row.reason, []).append(named)
    if why:
        yield "Without a figure:\n"
    for reason, names in why.items():
        yield f"* {', '.join(dict.fromkeys(names))}: {reason}"


def committed(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of this format, by name; older ones are passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = results.read(path)
        except ValueError:
            print(f"{path.name}: another format, left out")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder; default: benchmarks/results")
    parser.add_argument("--output", type=Path, default=DOCUMENT, help="default: docs/performance.md")
    arguments = parser.parse_args(argv)
    files = committed(arguments.results)
    for name, suites in files.items():
        path = arguments.results / f"{name}.json"
        results.write_csv(path.with_suffix(".csv"), suites)
        results.draw(path, suites)
    arguments.output.write_text(document(files), encoding="utf-8")
    print(f"{arguments.output.name}: {', '.join(files) or 'no results'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
