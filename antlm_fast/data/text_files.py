"""Text files to documents: plain text, BabyLM files and JSONL, each also gzipped. One document is held at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from antlm_fast.types import InputError
from antlm_fast.user_text import read_lines

UNITS = ("auto", "line", "paragraph", "file")
ENDINGS = (".txt", ".train", ".dev", ".jsonl")
# A paragraph that grows past this ends at its next line: files without one blank line exist, and so do large ones.
LONGEST_PARAGRAPH_CHARS = 8192
# Longer documents are cut, since a tokenizer takes 200 bytes of memory for each character of one text.
LONGEST_DOCUMENT_CHARS = 1 << 18
TEXT_FIELD = "data.text_field (--text-field of eval)"
_BABYLM_ENDINGS = (".train", ".dev", ".test")
_JSON_LINES_ENDINGS = (".jsonl", ".ndjson", ".json")
# Decoded without an error, and yet no text: commas and tags would be trained on.
_OTHER_FORMS = (".csv", ".tsv", ".xml", ".html", ".htm", ".ipynb", ".rtf")


def expand_home(argument: str, path: str | Path) -> Path:
    """The path with ~ and ~user written out.

    Raises:
        InputError: there is no such home folder; names the argument.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{argument} must begin with a home folder that is known (set HOME); got {str(path)!r}"
        ) from None


def ending(path: Path) -> str:
    """The ending that tells what a file is, in small letters, ".gz" left aside."""
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


def read_documents(path: Path, *, unit: str, text_field: str) -> Iterator[str]:
    """The documents of one file, in order; line endings become "\\n", blank documents are left out.

    Args:
        path: its ending decides the form: .jsonl (or .ndjson, .json) is one object a line (always one document each),
            everything else is plain text.
        unit: "line", "paragraph" (between blank lines; its line breaks are kept), "file" (held whole), or "auto":
            "line" for BabyLM's endings, "paragraph" for other plain text.
        text_field: where a JSON object has its text.

    Raises:
        InputError: it is not UTF-8, a JSON line is wrong, its gzip data ends too early, or its ending says that it is
            neither plain text nor JSONL.
    """
    if ending(path) in _OTHER_FORMS:
        raise InputError(f"corpus file must be plain text or JSONL (one object a line); got {path}")
    for document in _read_any(path, unit=unit, text_field=text_field):
        if document and not document.isspace():
            yield document


def cut(document: str) -> Iterator[str]:
    """The document in parts of at most LONGEST_DOCUMENT_CHARS, each ended at its last blank, if it has one."""
    if len(document) <= LONGEST_DOCUMENT_CHARS:
        yield document
        return
    start = 0
    while len(document) - start > LONGEST_DOCUMENT_CHARS:
        end = start + LONGEST_DOCUMENT_CHARS
        blank = max(document.rfind(sign, start + 1, end) for sign in " \n")
        end = end if blank < 0 else blank
        if part := document[start:end].strip():
            yield part
        start = end
    if part := document[start:].strip():
        yield part


def _read_any(path: Path, *, unit: str, text_field: str) -> Iterator[str]:
    if ending(path) in _JSON_LINES_ENDINGS:
        return _json_texts(path, text_field)
    if unit == "auto":
        unit = "line" if ending(path) in _BABYLM_ENDINGS else "paragraph"
    if unit == "line":
        return (line.strip() for line in _lines(path))
    if unit == "paragraph":
        return _paragraphs(path)
    return iter(("\n".join(_lines(path)),))


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in _lines(path):
        blank = not line or line.isspace()
        if not blank:
            lines.append(line)
            length += len(line)
        if lines and (blank or length > LONGEST_PARAGRAPH_CHARS):
            yield "\n".join(lines).strip()
            lines.clear()
            length = 0
    if lines:
        yield "\n".join(lines).strip()


def _json_texts(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line or line.isspace():
            continue
        place = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"corpus file must hold one JSON object a line; got {place}: {error}") from error
        if not isinstance(item, dict):
            raise InputError(f"corpus file must hold one JSON object a line; got {place}: a {type(item).__name__}")
        if text_field not in item:
            fields = ", ".join(sorted(item)[:8]) or "no field at all"
            raise InputError(
                f"{TEXT_FIELD} must name a field of every object; got {text_field!r} for {place}: {fields}"
            )
        text = item[text_field]
        if not isinstance(text, str):
            raise InputError(f"{TEXT_FIELD} must name a text; got {text_field!r} for {place}: a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise InputError(f"corpus file must hold valid Unicode; got {place}: {error}") from error
        yield text


def _lines(path: Path) -> Iterator[str]:
    return read_lines(path, "corpus file")
