"""report.html: one self-contained page about a run; every text of the run is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from math import ceil
from typing import Any

from antlm_fast.report import numbers
from antlm_fast.report.page_assets import SCRIPT, STYLE
from antlm_fast.report.plots import NARROW_INCHES, WIDE_INCHES, draw_svg, phase_colour
from antlm_fast.report.run_record import RunRecord

MAX_READINGS = 400  # steps whose numbers the pointer can show
MAX_OPEN_ROWS = 24  # a longer table starts folded
READ_OUT_COLOURS = {"causal": "CLM", "masked": "MLM", "mntp": "MNTP"}


def page(record: RunRecord) -> str:
    """The whole page; the same record gives the same text with the same matplotlib."""
    sections = [
        _summary(record),
        _curves(record),
        _phases(record),
        _minimal_pairs(record),
        _measured_on(record),
        _data(record),
        _configuration(record),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(record.name)}: training report</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *filter(None, sections),
            "</main>",
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _summary(record: RunRecord) -> str:
    done = f"{record.steps_done:,} of {record.total_steps:,} steps"
    if record.steps_done < record.total_steps:
        done += ", unfinished"
    layers, hidden = (record.model_config.get(key) for key in ("num_hidden_layers", "hidden_size"))
    shape = f"{layers} layers, hidden size {hidden}" if layers and hidden else ""
    tiles = [
        ("Parameters", numbers.count(record.num_parameters), shape),
        ("Tokens seen", numbers.count(record.tokens_seen), done),
    ]
    for objective, loss in record.final_losses.items():
        tiles.append((f"{objective} loss", numbers.loss(loss), f"validation; perplexity {numbers.perplexity(loss)}"))
    if record.best_read_out is not None:
        name, aggregate, accuracy = record.best_read_out
        tiles.append(("Minimal pairs, best", numbers.percent(accuracy), f"read out {name}, {aggregate}; chance 50 %"))
    if record.median_throughput is not None:
        tiles.append(("Throughput", f"{numbers.count(record.median_throughput)}", "tokens per second, median"))
    return "\n".join(
        [
            f"<header><h1>{escape(record.name)}</h1>",
            f'<p class="note">Schedule <code>{escape(record.schedule).replace("+", "+<wbr>")}</code>, {done}</p>',
            '<dl class="tiles">',
            *(
                f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd><dd>{escape(more)}</dd></div>"
                for what, value, more in tiles
            ),
            "</dl></header>",
        ]
    )


def _curves(record: RunRecord) -> str:
    description = "Validation and training loss, learning rate and mask rate over the optimizer steps. " + " ".join(
        f"{phase.name}: steps {phase.first_step} to {phase.end_step}." for phase in record.phases
    )
    figures = []
    for kind, inches in (("wide", WIDE_INCHES), ("narrow", NARROW_INCHES)):
        picture = draw_svg(record, inches, prefix=kind)
        steps = max(record.total_steps, record.steps_done, 1)
        box = [picture.width, picture.height, picture.left, picture.right, picture.top, picture.bottom, steps]
        named = (
            f'<svg role="img" aria-labelledby="{kind}-title {kind}-about"',
            f'><title id="{kind}-title">Training curves</title><desc id="{kind}-about">{escape(description)}</desc>',
        )
        start, rest = picture.svg.removeprefix("<svg").split(">", 1)
        figures.append(
            f'<figure class="{kind}" tabindex="0" aria-label="Training curves; arrow keys read the values" '
            f'data-box="{json.dumps([round(value, 2) for value in box])}">\n{named[0]}{start}{named[1]}{rest}</figure>'
        )
    # "<" would end the script element from within a text
    readings = json.dumps(_readings(record), ensure_ascii=False).replace("<", "\\u003c")
    return "\n".join(
        [
            "<section><h2>Training</h2>",
            *figures,
            f'<script type="application/json" id="measurements">{readings}</script>',
            "</section>",
        ]
    )


def _readings(record: RunRecord) -> list[tuple[int, str]]:
    """(step, what was measured there), at most MAX_READINGS of them; the last validation is carried along."""
    measured: dict[int, dict[str, dict[str, Any]]] = {}
    for kind, lines in (("validation", record.validation), ("train", record.train)):
        for line in lines:
            measured.setdefault(int(line["step"]), {})[kind] = line
    stride = ceil(len(measured) / MAX_READINGS) or 1
    validation: dict[str, Any] = {}
    readings = []
    for index, step in enumerate(sorted(measured)):
        validation = measured[step].get("validation", validation)
        if index % stride and index != len(measured) - 1:
            continue
        train = measured[step].get("train", {})
        line = train or validation
        phase = int(line.get("phase", -1))
        name = record.phases[phase].name if 0 <= phase < len(record.phases) else ""
        texts = [f"step {step:,}  {name}".rstrip()]
        texts += [f"validation {key} {numbers.loss(value)}" for key, value in validation.get("loss", {}).items()]
        texts += [f"training {key} {numbers.loss(value)}" for key, value in train.get("loss", {}).items()]
        if train.get("lr") is not None:
            texts.append(f"learning rate {numbers.rate(train['lr'])}")
        if train.get("mask_rate") is not None:
            texts.append(f"mask rate {numbers.percent(train['mask_rate'])}")
        readings.append((step, "\n".join(texts)))
    return readings


def _phases(record: RunRecord) -> str:
    objectives = record.validated
    rows = []
    for phase in record.phases:
        dot = f'<span class="dot" style="--c:var(--{phase_colour(phase.objective)})"></span>'
        cells = [
            f'<td class="left objective">{escape(phase.objective)}</td>',
            f"<td>{phase.first_step:,}–{phase.end_step:,}</td>",
        ]
        for objective in objectives:
            start, end = record.losses_at_ends(phase, objective)
            cells.append(f'<td>{numbers.loss(start)}<span class="arrow">→</span>{numbers.loss(end)}</td>')
        rows.append(f'<tr><th scope="row">{dot}{escape(phase.name)}</th>{"".join(cells)}</tr>')
    table = _table(
        "",
        "Validation losses at the start and at the end of each phase (the last measurement by then).",
        ["phase", "objective", "steps", *objectives],
        rows,
        left=(0, 1),
    )
    return f"<section><h2>Phases</h2>\n{_folded(f'{len(rows)} phases', table, len(rows))}</section>"


def _folded(summary: str, content: str, num_rows: int) -> str:
    """Content as it is, or behind its summary where it is long."""
    if num_rows <= MAX_OPEN_ROWS:
        return content
    return f"<details><summary>{summary}</summary>\n{content}</details>"


def _minimal_pairs(record: RunRecord) -> str:
    if record.pairs is None or not record.pairs.get("read_outs"):
        return ""
    tables = {name: by_aggregate["sum"] for name, by_aggregate in record.pairs["read_outs"].items()}
    overall = []
    for name, by_aggregate in record.pairs["read_outs"].items():
        cells = "".join(_bar(by_aggregate[aggregate]["overall"], name, aggregate) for aggregate in ("sum", "mean"))
        overall.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    fields = _bar_rows(tables, "by_field", sorted({field for table in tables.values() for field in table["by_field"]}))
    uids, num_uids = _uid_rows(tables)
    source, num_pairs = escape(str(record.pairs.get("source", ""))), int(record.pairs.get("num_pairs", 0))
    return "\n".join(
        [
            "<section><h2>Minimal pairs</h2>",
            f"<p>{num_pairs:,} pairs ({source}). The acceptable sentence must score strictly higher; a tie is wrong. "
            "Overall and fields are unweighted means over UIDs. The upright line marks chance, 50 %.</p>",
            _table(
                "",
                "Overall accuracy: sum and mean of a sentence's log-probabilities",
                ["read-out", "sum", "mean"],
                overall,
                kind="pairs",
            ),
            _table("<h3>By field</h3>", "Accuracy, sum", ["field", *tables], fields, kind="pairs"),
            "<h3>By UID</h3>",
            _folded(f"{num_uids} UIDs", _table("", "Accuracy, sum", ["UID", *tables], uids, kind="pairs"), num_uids),
            "</section>",
        ]
    )


def _uid_rows(tables: dict[str, dict[str, Any]]) -> tuple[list[str], int]:
    """Rows of all UIDs, those of one field together under its name; how many UIDs there are."""
    field_of = {uid: str(row.get("field", "")) for table in tables.values() for uid, row in table["by_uid"].items()}
    rows = []
    for field in sorted(set(field_of.values())):
        if field:
            rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{1 + len(tables)}">{escape(field)}</th></tr>')
        rows += _bar_rows(tables, "by_uid", sorted(uid for uid in field_of if field_of[uid] == field))
    return rows, len(field_of)


def _bar_rows(tables: dict[str, dict[str, Any]], key: str, names: Iterable[str]) -> list[str]:
    rows = []
    for name in names:
        bars = [
            _bar(table[key].get(name, {}).get("accuracy"), read_out, read_out) for read_out, table in tables.items()
        ]
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(bars)}</tr>')
    return rows


def _bar(accuracy: float | None, read_out: str, label: str) -> str:
    colour = READ_OUT_COLOURS.get(read_out, "muted")
    filled = 0.0 if accuracy is None else 100 * accuracy
    return (
        f'<td data-label="{escape(label)}"><div class="bar"><span class="track" aria-hidden="true">'
        f'<i style="width:{filled:.1f}%;--c:var(--{colour})"></i><b></b></span>'
        f"<span>{numbers.MISSING if accuracy is None else f'{filled:.1f}'}</span></div></td>"
    )


def _measured_on(record: RunRecord) -> str:
    if record.median_throughput is None and not record.versions:
        return ""
    rows = [(str(key), str(value)) for key, value in record.versions.items()]
    if record.median_throughput is not None:
        measurements = len(record.tokens_per_second)
        speed = f"{record.median_throughput:,.0f} tokens per second, median of {measurements} measurements"
        rows.insert(0, ("training", f"{speed}, measured on this machine"))
    return _table(
        "<section><h2>Throughput and versions</h2>",
        "The machine that trained this model; another one gives other speeds.",
        [],
        [f'<tr><th scope="row">{escape(key)}</th><td class="left">{escape(value)}</td></tr>' for key, value in rows],
    )


def _data(record: RunRecord) -> str:
    splits = {split: facts for split, facts in record.data.items() if isinstance(facts, dict)}
    if not splits:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(str(split))}</th><td>{numbers.count(facts.get("num_tokens"))}</td>'
        f"<td>{numbers.count(facts.get('num_documents'))}</td>"
        f'<td class="left"><code>{escape(str(facts.get("fingerprint", ""))[:16])}</code></td></tr>'
        for split, facts in splits.items()
    ]
    return _table("<section><h2>Data</h2>", "", ["split", "tokens", "documents", "fingerprint"], rows, left=(0, 3))


def _configuration(record: RunRecord) -> str:
    if not record.config:
        return ""
    text = escape(json.dumps(record.config, indent=2, ensure_ascii=False))
    return f"<section><details><summary>Configuration</summary>\n<pre>{text}</pre></details></section>"


def _table(
    heading: str,
    caption: str,
    header: Sequence[str],
    rows: Iterable[str],
    *,
    left: Sequence[int] = (0,),
    kind: str = "plain",
) -> str:
    """A table that scrolls sideways where it is too wide; the columns in `left` are aligned left."""
    cells = "".join(
        f'<th scope="col" class="{"left" if column in left else "right"} {escape(name)}">{escape(name)}</th>'
        for column, name in enumerate(header)
    )
    label = f' aria-label="{escape(caption)}"' if caption else ""
    lines = [
        heading,
        f'<p class="note">{escape(caption)}</p>' if caption else "",
        f'<div class="scroll"><table class="{kind}"{label}>',
        f"<thead><tr>{cells}</tr></thead>" if header else "",
        "<tbody>",
        *rows,
        "</tbody></table></div>",
        "</section>" if heading.startswith("<section>") else "",
    ]
    return "\n".join(filter(None, lines))
