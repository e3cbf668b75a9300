"""Results on disk: one JSON file of suites, each with its own environment and limits; CSV and PNG drawn from it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Row, of_floor, over_first, quartiles

FORMAT = 2
_COLUMNS = (
    "suite",
    "workload",
    "case",
    "provider",
    "quantity",
    "lower_quartile",
    "median",
    "upper_quartile",
    "samples",
    "rate",
    "unit",
    "floor",
    "of_floor",
    "over_first",
    "extras",
    "reason",
)


def suite_record(environment: Mapping[str, Any], limits: Any, sizes: str, minutes: float, rows: Sequence[Row]) -> Any:
    return {
        "environment": dict(environment),
        "limits": None if limits is None else limits.json(),
        "sizes": sizes,
        "minutes": round(minutes, 2),
        "rows": [row.json() for row in rows],
    }


def write(path: Path, suites: Mapping[str, Any], *, merge: bool) -> dict[str, Any]:
    """Write the JSON; with merge, into the suites that the file has already, each replaced as a whole.

    Raises:
        ValueError: the file is there and not ours.
    """
    known = read(path) if merge and path.exists() else {}
    merged = {**known, **suites}
    text = json.dumps({"format": FORMAT, "suites": merged}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    return merged


def read(path: Path) -> dict[str, Any]:
    """The suites of a file.

    Raises:
        ValueError: it is not of this format.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path.name} must be a result of benchmarks/run.py of format {FORMAT}; got another file")
    suites: dict[str, Any] = record["suites"]
    return suites


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    return [Row.read(values) for values in record["rows"]]


def workloads(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by workload, in order."""
    for workload in dict.fromkeys(row.workload for row in rows):
        yield workload, [row for row in rows if row.workload == workload]


def write_csv(path: Path, suites: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(_COLUMNS)
        for record in suites.values():
            rows = rows_of(record)
            for row in rows:
                low, middle, high = quartiles(row.samples) if row.samples else (None, None, None)
                rate = row.amount / middle if middle and row.quantity == "s" else None
                out.writerow(
                    [
                        *row.key,
                        row.quantity,
                        low,
                        middle,
                        high,
                        len(row.samples),
                        rate,
                        row.unit if rate else None,
                        row.floor,
                        of_floor(row),
                        over_first(row, rows),
                        " ".join(f"{name}={value:.6g}" for name, value in row.extras.items()),
                        row.reason,
                    ]
                )


def draw(path: Path, suites: Mapping[str, Any]) -> list[Path]:
    """A PNG of each suite beside the JSON; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    drawn = []
    for suite, record in suites.items():
        # the specification is the slowest of all: it would leave no room for what is compared
        rows = [row for row in rows_of(record) if row.samples and "reference" not in row.provider]
        if rows:
            picture = path.with_name(f"{path.stem}-{suite}.png")
            figure = _curves(rows) if suite == "scaling" else _bars(suite, rows)
            figure.savefig(picture, dpi=90)
            drawn.append(picture)
            import matplotlib.pyplot as plt

            plt.close(figure)
    return drawn


_OURS, _PEER, _FLOOR = "#2f6f9f", "#c9bda9", "#b03a2e"
_SCALE = {"s": (1e3, "ms"), "MiB": (1.0, "MiB"), "count": (1.0, "")}


def _bars(suite: str, rows: Sequence[Row]) -> Any:
    """A panel for each workload; a bar for each provider, its quartiles, and a red mark at the floor."""
    import matplotlib.pyplot as plt

    panels = list(workloads(rows))
    heights = [len(own) + 2.2 for _, own in panels]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, 0.25 * sum(heights) + 0.5),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for axis, (workload, own) in zip(axes[:, 0], panels, strict=True):
        scale, unit = _SCALE.get(own[0].quantity, (1.0, own[0].quantity))
        for place, row in enumerate(own):
            low, middle, high = (scale * value for value in quartiles(row.samples))
            colour = _OURS if row.provider.startswith("antlm_fast") or ": antlm_fast" in row.provider else _PEER
            axis.barh(place, middle, color=colour, xerr=[[middle - low], [high - middle]], error_kw={"lw": 0.8})
            if row.floor is not None:
                axis.plot([scale * row.floor] * 2, [place - 0.4, place + 0.4], color=_FLOOR, lw=1.5)
        axis.set_yticks(range(len(own)), [f"{row.case}  {row.provider}" for row in own], fontsize=7)
        axis.invert_yaxis()
        medians = [row.median or 0 for row in own]
        if min(medians) > 0 and max(medians) > 30 * min(medians):
            axis.set_xscale("log")
        elif not any(medians):
            axis.set_xlim(0, 1)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{suite}: {workload}" + (f", {unit}" if unit else ""), fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(rows: Sequence[Row]) -> Any:
    """Medians over what grows, both on logarithmic axes."""
    import matplotlib.pyplot as plt

    panels = list(workloads(rows))
    columns = 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(10, 3.4 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (workload, own) in zip(axes.flat, panels, strict=False):
        for name in dict.fromkeys(row.provider for row in own):
            points = [
                (float(row.case.rpartition("=")[2]), 1e3 * (row.median or 0)) for row in own if row.provider == name
            ]
            style = "o-" if "antlm_fast" in name else "o--"
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=name, ms=3, lw=1)
        axis.set(xscale="log", yscale="log", ylabel="ms", xlabel=own[0].case.partition(" =")[0])
        ticks = list(dict.fromkeys(row.case.rpartition("= ")[2] for row in own))
        axis.set_xticks([float(tick) for tick in ticks], ticks)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(workload, fontsize=8)
        axis.legend(frameon=False, fontsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return figure
