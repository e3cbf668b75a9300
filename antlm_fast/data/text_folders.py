"""Which files of a folder are a corpus: text by its ending, at any depth, and nothing that a run has written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from antlm_fast.data.text_files import ENDINGS, ending
from antlm_fast.types import InputError


class NoText(InputError):
    """There is no text where a corpus should be: it may have been moved."""


def find_files(folder: Path, *, validation: bool) -> list[Path]:
    """The files of a folder and the folders in it that are read, sorted by name.

    BabyLM's names decide: *.test never, *.dev for validation (for training only where there is nothing else), the
    other endings for training (for validation only where there is no *.dev). Links are followed, and a folder that is
    met twice is read once. What is hidden is left out, and so are the folders of runs: they hold .jsonl files.

    Raises:
        NoText: there is none.
        InputError: the folder is that of a run, or a text in it is no regular file.
    """
    paths, others = _walk(folder)
    if not paths:
        there = f", but {_in_words(others)}" if others else ""
        raise NoText(
            f"corpus folder must hold files that end in {', '.join(ENDINGS)} (or these with .gz); "
            f"got {folder}, which has none{there}"
        )
    development = [path for path in paths if ending(path) == ".dev"]
    rest = [path for path in paths if ending(path) != ".dev"]
    return (development or rest) if validation else (rest or development)


def what_is_not_read(folder: Path) -> str:
    """The kinds of files that a folder has and that are no text here, in words: "2 .csv, 1 run"."""
    return _in_words(_walk(folder)[1])


def _in_words(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _walk(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The files with a text's ending, sorted; and how many there are of each other kind."""
    if _is_run(folder):
        raise InputError(f"corpus must be text; got {folder}, which is the folder of a run")
    texts: list[Path] = []
    others: Counter[str] = Counter()
    met = set()
    pending = [folder]
    while pending:
        here = pending.pop(0)
        place = os.path.realpath(here)
        if place in met:
            continue
        met.add(place)
        with os.scandir(here) as entries:
            shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        for entry in shown:
            path = here / entry.name
            if entry.is_dir():
                if _is_run(path):
                    others["run"] += 1
                else:
                    pending.append(path)
            elif ending(path) not in ENDINGS:
                others[ending(path) or "without an ending"] += 1
            elif not entry.is_file():
                state = "is a link to nothing" if entry.is_symlink() else "is not a regular file"
                raise InputError(f"corpus folder must hold files that can be read; got {path}, which {state}")
            else:
                texts.append(path)
    return sorted(texts, key=lambda path: path.relative_to(folder).as_posix()), others


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "metrics.jsonl"))
