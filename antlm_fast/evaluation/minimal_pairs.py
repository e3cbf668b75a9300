"""Minimal pairs: the acceptable sentence of a pair must be more probable than the unacceptable one.

Reads BLiMP, the BabyLM supplement and any other JSON lines of that form, or the built-in pairs. Accuracy is given per
UID (one grammatical contrast), per field and overall.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from antlm_fast.data.text_files import ending
from antlm_fast.evaluation.sentence_scores import READ_OUTS, SentenceTokenizer, score_sentences
from antlm_fast.models import LanguageModel
from antlm_fast.types import InputError
from antlm_fast.user_text import read_lines

BUILTIN = "builtin"
AGGREGATES = ("sum", "mean")
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class MinimalPair:
    """Two sentences that differ in one grammatical property.

    Args:
        sentence_good: the acceptable one.
        sentence_bad: the unacceptable one.
        uid: the contrast's name; accuracy is taken per uid first.
        field: what the contrast belongs to (syntax, morphology, ...).
        linguistics_term: BLiMP's phenomenon, "" where the file names none.
    """

    sentence_good: str
    sentence_bad: str
    uid: str
    field: str
    linguistics_term: str = ""


def load_pairs(source: str) -> list[MinimalPair]:
    """Minimal pairs of a file, a folder, or the built-in ones.

    A line is one JSON object with `sentence_good` and `sentence_bad`; `UID`, `field` and `linguistics_term` are
    optional. The BabyLM supplement has no UID: the file's name without .jsonl stands for it, and where `field` is
    missing, the name of the folder that holds the file (for example `supplement_filtered`). Blank lines are skipped.

    Args:
        source: a .jsonl file; a folder, whose own .jsonl files are read in the order of their names (folders within
            it are not entered, hidden files left out); or "builtin". Files may be gzipped.

    Raises:
        InputError: no such path, no .jsonl file in the folder, no pair in a file, or a line that is no pair; the
            message names file, line (from 1) and what is wrong.
    """
    if source == BUILTIN:
        from antlm_fast.data.builtin.corpus import minimal_pairs

        return [_pair(record, uid="", field="") for record in minimal_pairs()]
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if ending(file) == ".jsonl" and not file.name.startswith("."))
        if not files:
            raise InputError(f"{source}: no .jsonl file in this folder")
        return [pair for file in files for pair in _pairs_of(file)]
    if not path.is_file():
        raise InputError(f"pairs must be a .jsonl file, a folder of them or {BUILTIN!r}; no such path: {source}")
    return list(_pairs_of(path))


def _pairs_of(file: Path) -> Iterator[MinimalPair]:
    found = False
    uid = Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem
    try:
        for number, line in enumerate(read_lines(file, "pairs file"), start=1):
            if not line.strip():
                continue
            try:
                yield _pair(json.loads(line), uid=uid, field=file.resolve().parent.name)
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
            except InputError as error:
                raise InputError(f"{file}, line {number}: {error}") from error
            found = True
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if not found:
        raise InputError(f"{file}: holds no pair")


def _pair(record: Any, *, uid: str, field: str) -> MinimalPair:
    """One record as a pair; `uid` and `field` stand in where the record has none."""
    if not isinstance(record, dict):
        raise InputError(f"a pair must be a JSON object; got {json.dumps(record)[:60]}")
    for key in ("sentence_good", "sentence_bad"):
        if key not in record:
            raise InputError(f"key {key!r} is missing")
        if not isinstance(record[key], str) or not record[key].strip():
            raise InputError(f"{key} must be a text that is not empty; got {json.dumps(record[key])[:60]}")
        if any("\ud800" <= sign <= "\udfff" for sign in record[key]):
            raise InputError(f"{key} must be text without lone surrogates; got {json.dumps(record[key])[:60]}")
    return MinimalPair(
        sentence_good=record["sentence_good"],
        sentence_bad=record["sentence_bad"],
        uid=str(record.get("UID") or uid),
        field=str(record.get("field") or field),
        linguistics_term=str(record.get("linguistics_term") or ""),
    )


def evaluate_pairs(
    model: LanguageModel,
    tokenizer: SentenceTokenizer,
    pairs: Sequence[MinimalPair],
    read_outs: Iterable[str] = ("causal", "masked"),
    *,
    source: str = BUILTIN,
    precision: str = "float32",
    batch_tokens: int = 4096,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores every pair under each read-out; what is returned is the content of minimal_pairs.json.

    Args:
        model, tokenizer, precision, batch_tokens, progress: as `score_sentences`.
        pairs: as `load_pairs` returns them; at least one.
        read_outs: names from READ_OUTS.
        source: where the pairs come from, written into the result.

    Returns:
        {"source", "num_pairs", "chance": 0.5, "read_outs": {name: {"sum": table, "mean": table}}}; "sum" and "mean" say
        how the log-probabilities of a sentence's tokens become its score. See `accuracy_table`.

    Raises:
        InputError: no pairs, an unknown read-out, or what `score_sentences` cannot score.
    """
    names = list(read_outs)
    if not pairs:
        raise InputError("pairs must hold at least one pair; got none")
    for name in names:
        if name not in READ_OUTS:
            raise InputError(f"read_outs must be among {', '.join(map(repr, READ_OUTS))}; got {name!r}")
    sentences = [text for pair in pairs for text in (pair.sentence_good, pair.sentence_bad)]
    tables: dict[str, dict[str, Any]] = {}
    for name in names:
        scores = score_sentences(
            model, tokenizer, sentences, name, precision=precision, batch_tokens=batch_tokens, progress=progress
        )
        tables[name] = {
            aggregate: accuracy_table(pairs, values[0::2] > values[1::2])
            for aggregate, values in zip(AGGREGATES, (scores.sums, scores.means), strict=True)
        }
    return {"source": source, "num_pairs": len(pairs), "chance": CHANCE, "read_outs": tables}


def accuracy_table(pairs: Sequence[MinimalPair], correct: Sequence[bool] | np.ndarray[Any, Any]) -> dict[str, Any]:
    """Accuracy per UID, per field and overall.

    A pair is correct where the good sentence scores strictly higher; a tie is wrong.

    Args:
        pairs: n pairs.
        correct: n truth values.

    Returns:
        {"overall": unweighted mean over UIDs, "by_uid": {uid: {"accuracy", "num_pairs", "field"}}, "by_field": {field:
        {"accuracy": unweighted mean over its UIDs, "num_pairs"}}}; names in alphabetical order.
    """
    by_uid: dict[str, list[bool]] = defaultdict(list)
    by_field: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for pair, right in zip(pairs, correct, strict=True):
        by_uid[pair.uid].append(bool(right))
        by_field[pair.field][pair.uid].append(bool(right))
    field_of = {pair.uid: pair.field for pair in pairs}
    return {
        "overall": fmean(fmean(answers) for answers in by_uid.values()),
        "by_uid": {
            uid: {"accuracy": fmean(answers), "num_pairs": len(answers), "field": field_of[uid]}
            for uid, answers in sorted(by_uid.items())
        },
        "by_field": {
            field: {
                "accuracy": fmean(fmean(answers) for answers in uids.values()),
                "num_pairs": sum(map(len, uids.values())),
            }
            for field, uids in sorted(by_field.items())
        },
    }


def format_table(results: Mapping[str, Any], aggregate: str = "sum") -> str:
    """The result of `evaluate_pairs` as aligned plain text: rows are UIDs, fields and overall; columns are read-outs.

    Args:
        results: what `evaluate_pairs` returned, or minimal_pairs.json.
        aggregate: "sum" or "mean" of a sentence's log-probabilities.
    """
    if aggregate not in AGGREGATES:
        raise InputError(f"aggregate must be 'sum' or 'mean'; got {aggregate!r}")
    tables = {name: by_aggregate[aggregate] for name, by_aggregate in results["read_outs"].items()}

    def rows(key: str) -> list[list[str]]:
        names = sorted({name for table in tables.values() for name in table[key]})
        return [[name, *_cells([table[key][name] for table in tables.values()])] for name in names]

    overall = [{"accuracy": table["overall"], "num_pairs": results["num_pairs"]} for table in tables.values()]
    sections = [
        [["UID", "pairs", *tables], *rows("by_uid")],
        [["field", "pairs", *tables], *rows("by_field")],
        [["overall", *_cells(overall)]],
    ]
    widths = [max(map(len, column)) for column in zip(*(row for section in sections for row in section), strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [f"minimal pairs ({results['source']}): accuracy in %, {aggregate} of log-probabilities, chance 50.0"]
    for section in sections:
        lines.append(rule)
        lines.extend(_aligned(row, widths) for row in section)
    return "\n".join(lines)


def _cells(columns: list[dict[str, Any]]) -> list[str]:
    """Number of pairs, then one accuracy per read-out."""
    return [str(columns[0]["num_pairs"]), *(f"{100 * column['accuracy']:.1f}" for column in columns)]


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells)
