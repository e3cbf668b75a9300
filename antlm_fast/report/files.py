"""Writes the report of a run into its folder: model/README.md, loss.png, report.html."""

from __future__ import annotations

from pathlib import Path

from antlm_fast.report.model_card import model_card
from antlm_fast.report.page import page
from antlm_fast.report.plots import write_png
from antlm_fast.report.run_record import read_run


def write_report(run_folder: Path) -> list[Path]:
    """Writes loss.png, report.html and, where there is a model, its card model/README.md, replacing older ones.

    Reads only files of the run folder; the run may be unfinished. The same files give the same report: nothing in it
    depends on when it was written.

    Args:
        run_folder: with metrics.jsonl at least.

    Returns:
        The written files.

    Raises:
        InputError: no metrics.jsonl, a file of the run folder that is malformed, or matplotlib is not installed;
            the card, which does not need it, is written by then.
    """
    record = read_run(run_folder)
    card, picture, html = (run_folder / name for name in ("model/README.md", "loss.png", "report.html"))
    cards = [card] if record.model_config else []
    for path in cards:
        path.write_text(model_card(record), encoding="utf-8")
    write_png(record, picture)
    html.write_text(page(record), encoding="utf-8")
    return [*cards, picture, html]
