"""The curves of a run, drawn by matplotlib: loss.png, and the same drawing as SVG for the page.

From top to bottom: the phases as a strip of names, validation and training loss, learning rate, mask rate (where
anything is masked). Matplotlib is imported when something is drawn and never earlier.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, nan
from pathlib import Path
from typing import Any

from antlm_fast.report import numbers
from antlm_fast.report.run_record import PhaseRecord, RunRecord
from antlm_fast.types import InputError

# each colour is used once, so that the page can replace it by the CSS variable of that name
COLOURS = {
    "ink": "#1c1f24",
    "muted": "#5c6471",
    "grid": "#e2e6eb",
    "CLM": "#1f6fb2",
    "MLM": "#c8590b",
    "MNTP": "#6d4bb8",
    "MIX": "#2f7d5b",
}
WIDE_INCHES, NARROW_INCHES = 9.6, 3.9
MAX_POINTS = 800  # of one curve: more cannot be told apart on paper

LEFT, RIGHT, TOP, BOTTOM = 36.0, 60.0, 18.0, 30.0  # margins, in points as every length below
LOSS_HEIGHT, SMALL_HEIGHT, GAP = 215.0, 56.0, 25.0
TEXT, SMALL_TEXT = 8.5, 7.0
CHARACTER = 0.64  # width of a character in units of the text's size


@dataclass(frozen=True)
class Picture:
    """An inline SVG and where its panels are.

    Args:
        svg: an <svg> element without title; colours are var(--NAME) of COLOURS.
        width, height: of its viewBox.
        left, right, top, bottom: of the panels, in units of the viewBox; the step axis runs from left to right.
    """

    svg: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


def write_png(record: RunRecord, path: Path) -> None:
    """Draws the curves into a PNG file; the same record gives the same bytes with the same matplotlib."""
    with _settings("png"):
        figure, _ = _draw(record, WIDE_INCHES)
        figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def draw_svg(record: RunRecord, width_inches: float, prefix: str) -> Picture:
    """Draws the curves as SVG; `prefix` keeps the ids of two pictures on one page apart."""
    buffer = io.StringIO()
    with _settings(prefix):
        figure, panels = _draw(record, width_inches)
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    width, height = 72.0 * figure.get_figwidth(), 72.0 * figure.get_figheight()
    left, right, top, bottom = panels
    return Picture(_inline(buffer.getvalue(), prefix), width, height, left, right, top, bottom)


def phase_colour(objective: str) -> str:
    """The name in COLOURS of an objective as metrics.jsonl writes it ("CLM", "MLM@causal", "MIX(0.5)")."""
    return next((name for name in ("CLM", "MLM", "MNTP", "MIX") if objective.startswith(name)), "muted")


def _settings(salt: str) -> Any:
    """A context with the settings that make a drawing reproducible and its text real text."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the report needs matplotlib: pip install '.[train]' in antlm_fast's checkout") from error
    return matplotlib.rc_context(
        {
            "svg.hashsalt": salt,
            "svg.fonttype": "none",
            "text.parse_math": False,
            "font.family": ["DejaVu Sans"],  # matplotlib brings it along: the same picture on every machine
            "font.size": TEXT,
            "axes.edgecolor": COLOURS["muted"],
            "axes.linewidth": 0.6,
            "xtick.color": COLOURS["muted"],
            "ytick.color": COLOURS["muted"],
            "xtick.labelsize": SMALL_TEXT + 0.5,
            "ytick.labelsize": SMALL_TEXT + 0.5,
            "xtick.major.size": 2.5,
            "xtick.major.width": 0.6,
            "ytick.major.size": 0.0,
        }
    )


def _draw(record: RunRecord, width_inches: float) -> tuple[Any, tuple[float, float, float, float]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    masked = any(line.get("mask_rate") is not None for line in record.train)
    width = 72.0 * width_inches
    names = _names_that_fit(record, width - LEFT - RIGHT)
    strip = 15.0 if not names.upright else 8.0 + CHARACTER * SMALL_TEXT * max(map(len, names.shown))
    height = TOP + strip + LOSS_HEIGHT + (1 + masked) * (GAP + SMALL_HEIGHT) + BOTTOM
    figure = Figure(figsize=(width_inches, height / 72.0))
    FigureCanvasAgg(figure)

    y = height - TOP  # of the top of what comes next; figures count from the bottom

    def panel(panel_height: float, gap: float) -> Any:
        nonlocal y
        y -= gap + panel_height
        box = (LEFT / width, y / height, (width - LEFT - RIGHT) / width, panel_height / height)
        axes = figure.add_axes(box)
        axes.set_xlim(0, max(record.total_steps, record.steps_done, 1))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=False)
        return axes

    strip_axes = panel(strip, 0.0)
    _draw_strip(strip_axes, record.phases, names)
    _title(strip_axes, "Loss, nats per token: thick is validation, thin is training", width)
    panels = [panel(LOSS_HEIGHT, 0.0), panel(SMALL_HEIGHT, GAP)]
    _draw_losses(panels[0], record)
    _draw_small(panels[1], record, "lr", lambda value: numbers.rate(value, digits=2))
    _title(panels[1], "Learning rate", width)
    if masked:
        panels.append(panel(SMALL_HEIGHT, GAP))
        _draw_small(panels[2], record, "mask_rate", lambda value: f"{100 * value:.3g} %")
        _title(panels[2], "Mask rate, where tokens are masked", width)
    for axes in panels:
        axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        for phase in record.phases:
            axes.axvspan(
                phase.first_step, phase.end_step, color=COLOURS[phase_colour(phase.objective)], alpha=0.07, linewidth=0
            )
        _draw_boundaries(axes, record, width)
    _step_axis(panels[-1], width)
    return figure, (LEFT, width - RIGHT, TOP, height - y)


@dataclass(frozen=True)
class _Names:
    shown: tuple[str, ...]  # "" where a phase is too short for its name
    upright: bool


def _names_that_fit(record: RunRecord, width: float) -> _Names:
    """Names lie flat where all of them fit; else all stand upright; else only those are shown that fit lying flat."""
    room = [width * (phase.end_step - phase.first_step) / max(record.total_steps, 1) for phase in record.phases]
    names = [phase.name for phase in record.phases]
    fits = [CHARACTER * SMALL_TEXT * len(name) + 4.0 <= space for name, space in zip(names, room, strict=True)]
    if not all(fits) and min(room) >= SMALL_TEXT + 0.5:
        return _Names(tuple(names), upright=True)
    return _Names(tuple(name if fit else "" for name, fit in zip(names, fits, strict=True)), upright=False)


def _draw_strip(axes: Any, phases: Sequence[PhaseRecord], names: _Names) -> None:
    axes.set_axis_off()
    axes.set_ylim(0, 1)
    for phase, name in zip(phases, names.shown, strict=True):
        colour = COLOURS[phase_colour(phase.objective)]
        axes.axvspan(phase.first_step, phase.end_step, color=colour, alpha=0.3, linewidth=0)
        middle = (phase.first_step + phase.end_step) / 2
        axes.text(
            middle,
            0.47,
            name,
            color=COLOURS["ink"],
            fontsize=SMALL_TEXT,
            ha="center",
            va="center",
            rotation=90 if names.upright else 0,
        )


def _draw_boundaries(axes: Any, record: RunRecord, width: float) -> None:
    """A line at each switch, unless switches are so dense that the lines would hide the colours."""
    if len(record.phases) <= (width - LEFT - RIGHT) / 4.0:
        for phase in record.phases[1:]:
            axes.axvline(phase.first_step, color=COLOURS["muted"], alpha=0.35, linewidth=0.5)


def _draw_losses(axes: Any, record: RunRecord) -> None:
    highest_shown = _draw_training(axes, record)
    ends = []
    for objective in record.validated:
        points = [(line["step"], line["loss"][objective]) for line in record.validation if objective in line["loss"]]
        colour = COLOURS[phase_colour(objective)]
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=colour, linewidth=1.9, marker="o" if len(points) <= 60 else None, markersize=2.8)
        finite = [loss for loss in losses if isfinite(loss)]
        if finite:
            ends.append(_End(finite[-1], objective, colour))
            highest_shown = max(highest_shown, max(finite))
    if not record.train and not record.validation:
        axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, ha="center", color=COLOURS["muted"])
        axes.set_yticks([])
        return
    if highest_shown > -inf:
        lowest = axes.dataLim.y0
        margin = 0.06 * (highest_shown - lowest) or 0.5
        axes.set_ylim(lowest - margin, highest_shown + margin)
        _label_ends(axes, ends, record.steps_done)


def _draw_training(axes: Any, record: RunRecord) -> float:
    """Draws the training losses; returns the highest value worth showing: a jump far above the rest is cut off."""
    values: list[float] = []
    for objective in sorted({name for line in record.train for name in line["loss"]}):
        steps: list[float] = []
        losses: list[float] = []
        points = [
            (line["phase"], line["step"], line["loss"][objective]) for line in record.train if objective in line["loss"]
        ]
        group = ceil(len(points) / MAX_POINTS)
        for phase in sorted({point[0] for point in points}):
            of_phase = [point for point in points if point[0] == phase]
            for start in range(0, len(of_phase), group):
                part = of_phase[start : start + group]
                steps.append(sum(point[1] for point in part) / len(part))
                losses.append(sum(point[2] for point in part) / len(part))
            steps.append(nan)  # the line is lifted between phases
            losses.append(nan)
        axes.plot(steps, losses, color=COLOURS[phase_colour(objective)], linewidth=0.7, alpha=0.5)
        values.extend(loss for loss in losses if isfinite(loss))
    if not values:
        return -inf
    typical = sorted(values)[int(0.98 * (len(values) - 1))]
    return max(values) if max(values) <= 2.5 * typical else typical


@dataclass(frozen=True, order=True)
class _End:
    loss: float
    objective: str
    colour: str


def _label_ends(axes: Any, ends: list[_End], step: int) -> None:
    """Writes each curve's name and last value behind the last step, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    line_height = (TEXT + 2.0) / LOSS_HEIGHT * (high - low)
    y = -inf
    for end in sorted(ends):
        y = max(end.loss, y + line_height)
        axes.annotate(
            f"{end.objective} {end.loss:.2f}",
            (step, y),
            xytext=(5, 0),
            textcoords="offset points",
            color=end.colour,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _draw_small(axes: Any, record: RunRecord, key: str, label: Any) -> None:
    axes.set_yticks([])
    if not record.train:
        return
    stride = ceil(len(record.train) / MAX_POINTS)
    lines = [*record.train[::stride], record.train[-1]]
    values = [nan if line.get(key) is None else line[key] for line in lines]
    steps = [line["step"] for line in lines]
    axes.plot(steps, values, color=COLOURS["ink"], linewidth=1.1, marker="o" if len(lines) <= 3 else None, markersize=2)
    highest = max((value for value in values if isfinite(value)), default=0.0) or 1.0
    axes.set_ylim(0, 1.15 * highest)
    axes.set_yticks([0, highest], ["0", label(highest)])


def _title(axes: Any, text: str, width: float) -> None:
    """A heading at the left edge, above the axes."""
    if CHARACTER * TEXT * len(text) > width:
        text = text.split(":")[0]
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", color=COLOURS["ink"]
    )


def _step_axis(axes: Any, width: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.tick_params(bottom=True, labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10 if width > 400 else 4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("optimizer steps", color=COLOURS["muted"], fontsize=SMALL_TEXT + 0.5, labelpad=2)


def _inline(svg: str, prefix: str) -> str:
    """A stand-alone SVG file as an element of a page: unique ids, colours as CSS variables, the page's font."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*\n", "\n", svg)
