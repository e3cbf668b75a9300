"""Text files to documents: plain text, BabyLM files and JSONL, each also gzipped. One document is held at a time."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from antlm_fast.types import InputError

UNITS = ("auto", "line", "paragraph", "file")
ENDINGS = (".txt", ".train", ".dev", ".jsonl")
# A paragraph that grows past this ends at its next line: files without one blank line exist, and so do large ones.
LONGEST_PARAGRAPH_CHARS = 8192
_BABYLM_ENDINGS = (".train", ".dev", ".test")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
    """The ending that tells what a file is, ".gz" left aside."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def find_files(folder: Path, *, validation: bool) -> list[Path]:
    """The files of a folder and the folders in it that are read, sorted by name.

    BabyLM's names decide: *.test never, *.dev for validation (for training only where there is nothing else), the
    other endings for training (for validation only where there is no *.dev). Hidden files are left out.

    Raises:
        InputError: there is none.
    """
    paths = [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and ending(Path(name)) in ENDINGS
    ]
    paths.sort(key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise InputError(
            f"corpus folder must hold files that end in {', '.join(ENDINGS)} (or these with .gz); "
            f"got {folder}, which has none"
        )
    development = [path for path in paths if ending(path) == ".dev"]
    others = [path for path in paths if ending(path) != ".dev"]
    return (development or others) if validation else (others or development)


def read_documents(path: Path, *, unit: str, text_field: str) -> Iterator[str]:
    """The documents of one file, in order; line endings become "\\n", blank documents are left out.

    Args:
        path: its ending decides the form: .jsonl is one object a line (always one document each), everything else is
            plain text.
        unit: "line", "paragraph" (between blank lines; its line breaks are kept), "file" (held whole), or "auto":
            "line" for BabyLM's endings, "paragraph" for other plain text.
        text_field: where a JSON object has its text.

    Raises:
        InputError: nothing is in it, it is not UTF-8, a JSON line is wrong, or its gzip data ends too early.
    """
    empty = True
    for document in _read_any(path, unit=unit, text_field=text_field):
        if document and not document.isspace():
            empty = False
            yield document
    if empty:
        raise InputError(f"corpus file must hold text; got {path}, which is empty")


def _read_any(path: Path, *, unit: str, text_field: str) -> Iterator[str]:
    if ending(path) == ".jsonl":
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
            raise InputError(f"text_field must name a field of every object; got {text_field!r} for {place}: {fields}")
        text = item[text_field]
        if not isinstance(text, str):
            raise InputError(f"text_field must name a text; got {text_field!r} for {place}: a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise InputError(f"corpus file must hold valid Unicode; got {place}: {error}") from error
        yield text


def _lines(path: Path) -> Iterator[str]:
    """The decoded lines, without their ends."""
    with _open(path) as file:
        offset = 0
        try:
            for raw in file:
                line = raw.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else raw
                text = line.decode("utf-8")
                yield text.removesuffix("\n").removesuffix("\r")
                offset += len(raw)
        except UnicodeDecodeError as error:
            at = offset + len(raw) - len(line) + error.start
            value = line[error.start]
            raise InputError(f"corpus file must be UTF-8; got {path}, byte {at} is 0x{value:02x}") from error
        except EOFError as error:
            raise InputError(f"corpus file must be whole; got {path}, whose gzip data ends too early") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"corpus file must be gzip data; got {path}: {error}") from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")
