"""Stage e: the fastest tiles of attention's kernels in bf16, as a patch of the table; attention again with them.

Every candidate of a kernel takes turns with the table's own; half of the sequences are causal. The winners are written
to tiles.json beside the results, and as tiles.patch, which `git apply` puts into the table. Then attention as a whole,
checked against float64, with the table's tiles and with the new ones in turns.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import tune
from harness import TIME_USED_UP, Call, Provider, Row, captured, device_timed, measure

from antlm_fast.kernels.attention import triton_launches
from antlm_fast.kernels.triton_support.interpreter import correct_interpreter
from antlm_fast.kernels.triton_support.launch import Tile, arch_of
from gpu_stages import attention
from gpu_stages.ahead import compile_with_launcher, compiled_on_all_cores
from gpu_stages.plan import AttentionShape, GpuBench
from gpu_stages.timing import Passes, providers

KERNELS = ("forward", "dq", "dkdv")
_ROUNDS = 7
# a winner must be this much faster than the table's tile: within it, two measurements differ by themselves
_MARGIN = 0.98
_TABLE = triton_launches.TILES

Job = tuple[str, str, int, str]


def run(bench: GpuBench) -> Iterator[list[Row]]:
    arch = arch_of(torch.device(bench.device))
    jobs: list[Job] = [(arch, "half", size, kernel) for size in bench.sizes.tile_head_dims for kernel in KERNELS]
    if bench.device == "cuda":
        compile_all(jobs, bench)
    else:
        correct_interpreter()
    chosen: dict[Job, Tile] = {}
    for job in jobs:
        rows = timed(bench, job)
        yield rows
        best = winner(rows, tiles_to_try(job, bench.device))
        if best is not None:
            chosen[job] = best
    table = write_patch(chosen, bench.folder)
    for size in bench.sizes.tile_head_dims:
        if chosen and bench.left() > 0:
            yield with_both_tables(bench, size, table)


def tiles_to_try(job: Job, device: str) -> list[Tile]:
    """The table's first."""
    arch, kind, size, kernel = job
    own = triton_launches.tile_for(f"{kernel} {kind}", arch, size)
    others = tune.candidates(kernel, kind, size, timed=True)
    if device == "cpu":  # the interpreter's time goes with the number of tiles
        others = [Tile(16, 16, 4, 1), Tile(32, 32, 4, 1)]
    return list(dict.fromkeys((own, *others)))


def compile_all(jobs: list[Job], bench: GpuBench) -> None:
    work = [(job, tile) for job in jobs for tile in tiles_to_try(job, bench.device)]
    done = compiled_on_all_cores(_compile, work, bench.left() / 2)
    print(f"compiled ahead: {done} of {len(work)} kernels", flush=True)


def _compile(job: Job, tile: Tile) -> None:
    compile_with_launcher(replace(tune.offline_launch(*job), tile=tile), job[0])


def timed(bench: GpuBench, job: Job) -> list[Row]:
    launch = tune.launch_on_device(*job, device=bench.device, sequences=bench.sizes.tile_sequences)

    def prepare(tile: Tile) -> Call:
        call = functools.partial(launch.launch, tile)
        return device_timed(captured(call)) if bench.device == "cuda" else call

    found = [
        Provider(
            case="one call", name=f"antlm_fast triton, {tile_name(tile)}", prepare=functools.partial(prepare, tile)
        )
        for tile in tiles_to_try(job, bench.device)
    ]
    _, kind, size, kernel = job
    rounds = min(_ROUNDS, bench.sizes.rounds)
    return measure("tiles", f"{kernel} {kind}, D {size}", found, rounds=rounds, until=bench.until)


def tile_name(tile: Tile) -> str:
    return f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"


def winner(rows: list[Row], tiles: list[Tile]) -> Tile | None:
    """The tile of the fastest row where it beats the table's, which is the first; None where the table's stays.

    It stays too where some tile had no turn: the best of a part is not the best.
    """
    if any(row.reason == TIME_USED_UP for row in rows):
        return None
    figures = [(row.median, tile) for row, tile in zip(rows, tiles, strict=True) if row.median is not None]
    if not figures:
        return None
    least, best = min(figures, key=lambda each: each[0])
    own = rows[0].median
    return None if own is not None and least > _MARGIN * own else best


def write_patch(chosen: dict[Job, Tile], folder: Path) -> Path:
    """The table with the chosen tiles, in the folder, and the difference as a patch."""
    table = folder / "tiles.json"
    shutil.copyfile(_TABLE, table)
    if chosen:
        tune.write(chosen, table)
    name = "kernels/attention/tiles.json"
    before, after = (path.read_text(encoding="utf-8").splitlines(keepends=True) for path in (_TABLE, table))
    patch = "".join(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"))
    (folder / "tiles.patch").write_text(patch, encoding="utf-8")
    print(f"tiles.patch: {len(chosen)} tiles changed\n{patch}", flush=True)
    return table


def with_both_tables(bench: GpuBench, head_dim: int, table: Path) -> list[Row]:
    shapes = [shape for shape in bench.sizes.attention if shape.head_dim == head_dim and shape.visibility == "mixed"]
    shape: AttentionShape = next(shape for shape in shapes if not shape.packed)
    work = attention.drawn(shape, bench.device)
    exact = functools.cache(functools.partial(attention.reference_results, work))
    found: list[Provider] = []
    for name, path in (("the table's tiles", _TABLE), ("the new tiles", table)):
        way = replace(next(attention.ways(work)), name=f"antlm_fast triton, {name}")
        found += providers(
            bench,
            shape.visibility,
            way.name,
            functools.partial(prepared_with, path, way, bench.device),
            work.flops,
            functools.partial(attention.check_results, work, way, exact),
            backward_over_forward=attention.BACKWARD_OVER_FORWARD,
        )
    return measure("tiles", f"attention, {shape.title}", found, rounds=bench.sizes.rounds, until=bench.until)


def prepared_with(table: Path, way: attention.Way, device: str) -> Passes:
    """The way's passes, with the tiles of a table."""

    def within(call: Callable[[], object]) -> Call:
        def with_table() -> object:
            with tiles_of(table):
                return call()

        return with_table

    with tiles_of(table):
        made = attention.prepared(way, device)
    return replace(made, forward=within(made.forward), backward=within(made.backward), both=within(made.both))


@contextlib.contextmanager
def tiles_of(table: Path) -> Iterator[None]:
    before = triton_launches.TILES
    triton_launches.TILES = table
    try:
        yield
    finally:
        triton_launches.TILES = before
