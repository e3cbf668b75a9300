"""The table of what compiled kernels cost: reading, writing, judging against it, and showing it. Nothing compiles here.

The table is {"triton", "torch", "date", "rows": {name: row}, "comparison": {name: row}}; rows are those of
aot_compile.row_of and comparison_of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

TABLE = Path(__file__).with_name("aot_table.json")
TOLERANCE = 1.03  # instructions of a loop; small changes of a compiler or of line order move them by a few
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
_REGISTER_LIMIT = {"gfx942": 512}  # with the accumulation registers
_SPILL_FREE = {
    f"{arch} half {head_dim} forward{option}"
    for arch in ("sm_80", "sm_90")
    for head_dim in (64, 128)
    for option in ("", " float16", " dropout")
} | {f"sm_90 half {head_dim} forward relative" for head_dim in (32, 64, 128)}
_SPILL_FREE.add("sm_90 half 64 forward relative dropout")
# bytes; on AMD registers
_SPILLS = ("spill_store_bytes", "spill_load_bytes", "vgpr_spills", "sgpr_spills")
_NEVER_MORE = (*_SPILLS, "stack_bytes", "shared_bytes")
_COMPARED = ("ours", "constexpr causal", "constexpr full", "plain causal", "plain causal loop", "plain full")


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The checked-in table; an empty one where there is none."""
    if not path.is_file():
        return {"triton": None, "torch": None, "date": None, "rows": {}, "comparison": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def write_table(table: Mapping[str, Any], path: Path = TABLE) -> None:
    """One row a line, so that a change shows as the lines it touches."""
    lines = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{rows}\n }}" if rows else f" {json.dumps(name)}: {{}}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def merged(old: Mapping[str, Row], new: Mapping[str, Row], order: Iterable[str]) -> dict[str, Row]:
    """The old rows with the new ones in their places, in a given order; names outside the order are dropped."""
    rows = {**old, **new}
    return {name: rows[name] for name in order if name in rows}


def broken_rules(name: str, row: Row) -> list[str]:
    """What a row may not be, whatever the table says: one line for each rule that it breaks."""
    arch = name.split()[0]
    if "error" in row:
        # what AMD's compiler refuses is recorded: nothing of the package was ever run there
        return [] if arch == "gfx942" else [f"{name}: must compile; got {row['error']}"]
    found = []
    # of attention unmasked and masked; the loss has one, which compilers may peel
    few, many = {"delta": (0, 0), "loss_forward": (1, 2), "loss_d_logits": (1, 2)}.get(name.split()[3], (2, 2))
    if arch != "gfx942" and not few <= len(row["loops"]) <= many:
        found.append(f"{name}: main loops must be {few}; got {len(row['loops'])}")
    limit = _REGISTER_LIMIT.get(arch, 255)
    if row["registers"] > limit:
        found.append(f"{name}: registers must be at most {limit}; got {row['registers']}")
    if row["shared_bytes"] > SHARED_LIMIT[arch]:
        found.append(f"{name}: shared_bytes must be at most {SHARED_LIMIT[arch]}; got {row['shared_bytes']}")
    if name in _SPILL_FREE and spilled(row):
        found.append(f"{name}: must not spill; got {spilled(row)} bytes")
    return found


def growth(name: str, was: Row | None, now: Row) -> list[str]:
    """What became worse than the table's row: one line for each entry."""
    if was is None:
        return [f"{name}: row was missing from the table, is there"]
    if "error" in now or "error" in was:
        return [] if "error" in was else [f"{name}: compiled, does not any more: {now['error']}"]
    found = [(what, was.get(what, 0), now[what]) for what in _NEVER_MORE if now.get(what, 0) > was.get(what, 0)]
    before, after = _loops(was), _loops(now)
    if len(before) != len(after):
        found.append(("main loops", len(before), len(after)))
    for at, (old, new) in enumerate(zip(before, after, strict=False), 1):
        if new["mma"] != old["mma"]:
            found.append((f"mma of loop {at}", old["mma"], new["mma"]))
        if new["instructions"] > old["instructions"] * TOLERANCE:
            found.append((f"instructions of loop {at}", old["instructions"], new["instructions"]))
    return [f"{name}: {what} was {old}, is {new}" for what, old, new in found]


def shrunk(name: str, was: Row | None, now: Row) -> bool:
    """Whether a row is better than the table's in some entry, so that the table holds the gate too wide open."""
    if was is None or "error" in now:
        return False
    if "error" in was:
        return True
    loops = zip(_loops(was), _loops(now), strict=False)
    return any(now.get(what, 0) < was.get(what, 0) for what in _NEVER_MORE) or any(
        new["instructions"] * TOLERANCE < old["instructions"] for old, new in loops
    )


def _loops(row: Row) -> list[Row]:
    # AMD's loops are not told apart: the whole program stands for them
    return row["loops"] if "mma" not in row else [row]


def spilled(row: Row) -> int:
    """Bytes moved to and from local memory per thread; on AMD registers."""
    return sum(row.get(what, 0) for what in _SPILLS)


def ratio(row: Row) -> float | None:
    """Instructions of our unmasked loop over the constexpr kernel's: the larger of causal and full."""
    if "error" in row:
        return None
    counts = [row[name]["unmasked"] for name in ("ours", "constexpr causal", "constexpr full")]
    return None if None in counts else counts[0] / min(counts[1:])


def dearer(name: str, row: Row) -> list[str]:
    """Where visibility as data costs more than as a constant: one line for each entry."""
    if "error" in row:
        return [f"{name}: must be compared; got {row['error']}"]
    found = []
    times = ratio(row)
    if times is None:
        found.append(f"{name}: main loops must be found in our kernel and in the constexpr ones")
    elif times > TOLERANCE:
        found.append(f"{name}: unmasked loop must be at most {TOLERANCE} of the constexpr kernel's; got {times:.3f}")
    most = max(row[f"constexpr {kind}"]["spill_bytes"] for kind in ("causal", "full"))
    if row["ours"]["spill_bytes"] > most:
        found.append(f"{name}: spill_bytes must be at most {most}, as constexpr; got {row['ours']['spill_bytes']}")
    return found


def comparison_lines(comparison: Mapping[str, Row]) -> Iterator[str]:
    """A table for the terminal: per kernel its unmasked loop's instructions, and spilled bytes where there are any."""
    yield f"{'unmasked loop (spill bytes)':30}" + "".join(f"{name:>19}" for name in _COMPARED) + f"{'ratio':>8}"
    for name, row in comparison.items():
        cells = "".join(f"{_cell(row.get(column)):>19}" for column in _COMPARED)
        times = ratio(row)
        yield f"{name:30}{cells}{'-' if times is None else f'{times:.3f}':>8}"


def _cell(costs: Row | None) -> str:
    if costs is None or costs["unmasked"] is None:
        return "-"
    return f"{costs['unmasked']} ({costs['spill_bytes']})" if costs["spill_bytes"] else str(costs["unmasked"])


def markdown(table: Mapping[str, Any]) -> Iterator[str]:
    """Resources and comparison at head sizes 64 and 128 in bfloat16, for the documentation."""
    yield f"Compiled with Triton {table['triton']}, torch {table['torch']}, {table['date']}."
    yield ""
    yield from _markdown_row(
        "arch",
        "head_dim",
        "kernel",
        "tile (m x n, warps, stages)",
        "registers",
        "spill bytes",
        "shared KiB",
        "instructions, unmasked loop",
        "masked loop",
        "MMA",
    )
    yield "|" + "---|" * 10
    for name, row in table["rows"].items():
        arch, kind, head_dim, kernel, *option = name.split()
        if kind == "half" and head_dim in ("64", "128") and not option:
            yield from _markdown_row(arch, head_dim, kernel, _tile(kernel, row["tile"]), *_measures(kernel, row))
    yield ""
    yield from _markdown_row(
        "arch", "head_dim", "kernel", "tile", *(f"{name}, unmasked (spill bytes)" for name in _COMPARED), "ratio"
    )
    yield "|" + "---|" * 11
    for name, row in table["comparison"].items():
        arch, _, head_dim, kernel = name.split()
        times = ratio(row)
        cells = [_cell(row.get(column)) for column in _COMPARED]
        shown = "-" if times is None else f"{times:.3f}"
        yield from _markdown_row(arch, head_dim, kernel, _tile(kernel, row["tile"]), *cells, shown)


def _measures(kernel: str, row: Row) -> list[Any]:
    if "error" in row:
        return [row["error"], "-", "-", "-", "-", "-"]
    loops = row["loops"][::-1] if kernel == "dkdv" else row["loops"]
    counts = [str(loop["instructions"]) for loop in loops]
    mma = [str(loop["mma"]) for loop in loops]
    shown = [*counts, "-", "-"][:2]
    work = str(row["mma"]) if "mma" in row else " / ".join(mma) or "-"
    spills = f"{spilled(row)} registers" if "vgpr_spills" in row else spilled(row)
    return [row["registers"], spills, f"{row['shared_bytes'] / 1024:.1f}", *shown, work]


def _tile(kernel: str, tile: list[int]) -> str:
    m, n, warps, stages = tile
    return f"{m}, {warps}, {stages}" if kernel == "delta" else f"{m} x {n}, {warps}, {stages}"


def _markdown_row(*cells: Any) -> Iterator[str]:
    yield "| " + " | ".join(str(cell) for cell in cells) + " |"
