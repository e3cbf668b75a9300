"""Where the text comes from: files, folders, the built-in corpus, Hugging Face datasets; as streams of documents."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from antlm_fast.data.rows import MODES
from antlm_fast.data.text_files import (
    LONGEST_DOCUMENT_CHARS,
    TEXT_FIELD,
    UNITS,
    cut,
    ending,
    expand_home,
    read_documents,
)
from antlm_fast.data.text_folders import NoText, find_files, what_is_not_read
from antlm_fast.types import InputError

SPLITS = ("train", "validation")
BUILTIN = "builtin"
HUGGING_FACE = "hf:"
# Counts the changes in how files become documents and ids: what was prepared another way must not be taken.
READING = 2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus and how it is cut.

    Args:
        train: a text file (.txt, BabyLM's .train/.dev, .jsonl, each also .gz), a folder of them, "builtin", or
            "hf:NAME[:CONFIG][:SPLIT]" for a Hugging Face dataset. None: still to be given. A file named here may
            have any other ending: .json and .ndjson are JSONL, .csv and markup are refused, the rest is plain text.
        validation: the same for validation; None takes the folder's *.dev files where `train` is a folder that has
            both, else holds out `validation_share` of the training documents.
        validation_share: share of the documents held out, 0 (none) to 0.5; which ones depends on their place alone.
        documents: what a document is in plain text: "line", "paragraph", "file", or "auto" (line for BabyLM's files,
            paragraph for other text). An object of a .jsonl file is always one. Whatever has more than 262,144
            characters is cut at blanks.
        text_field: where a JSON object or a dataset's row has its text.
        row_mode: "stream" or "packed"; see `antlm_fast.data.rows.Rows`.
        row_tokens: tokens in a row; batch.length_ramp makes later rows longer.
        short_share: share of the rows, 0 to 1, that are cut in two sequences at a random place (LTG-BERT has a tenth
            of its items shorter); no token is lost. For "stream" alone: packed documents have their own lengths.
        cache_dir: where token stores are kept; None is $XDG_CACHE_HOME/antlm-fast or ~/.cache/antlm-fast.
        builtin_words: size of the built-in corpus, in words.
    """

    train: str | None = BUILTIN
    validation: str | None = None
    validation_share: float = 0.02
    documents: str = "auto"
    text_field: str = "text"
    row_mode: str = "stream"
    row_tokens: int = 128
    short_share: float = 0.0
    cache_dir: str | None = None
    builtin_words: int = 300_000

    def __post_init__(self) -> None:
        for name in ("train", "validation", "text_field", "cache_dir"):
            value = getattr(self, name)
            optional = name != "text_field"
            if (value is not None or not optional) and (not isinstance(value, str) or not value):
                raise InputError(f"{name} must be a text that is not empty; got {value!r}")
        if not _is_number(self.validation_share) or not 0 <= self.validation_share <= 0.5:
            raise InputError(f"validation_share must lie in 0 .. 0.5; got {self.validation_share!r}")
        if self.documents not in UNITS:
            raise InputError(f"documents must be one of {', '.join(UNITS)}; got {self.documents!r}")
        if self.row_mode not in MODES:
            raise InputError(f"row_mode must be one of {', '.join(MODES)}; got {self.row_mode!r}")
        if not _is_number(self.short_share) or not 0 <= self.short_share <= 1:
            raise InputError(f"short_share must lie in 0 .. 1; got {self.short_share!r}")
        if self.short_share and self.row_mode != "stream":
            raise InputError(
                f"short_share must be 0 where row_mode is {self.row_mode!r}, whose sequences are documents; "
                f"got {self.short_share}"
            )
        # a row of one token has nothing to predict
        for name, least in (("row_tokens", 2), ("builtin_words", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split of a corpus, found but not yet read. `open_source` makes it.

    Attributes:
        name: the path or name as the user gave it.
        files: what is read, in order; empty for the built-in corpus and for datasets.
        held_out: None reads everything; "kept" and "held" are the two parts of a corpus that shares its documents.
        config: how to read.
        builtin_seed, builtin_words: of the built-in corpus.
    """

    name: str
    config: DataConfig
    files: tuple[Path, ...] = ()
    held_out: str | None = None
    builtin_seed: int = 0
    builtin_words: int = 0

    def documents(self, note: Callable[[str], None] | None = None) -> Iterator[str]:
        """The documents, streaming.

        Args:
            note: is given, at the end, a sentence for each kind of thing that was left out or cut; not for documents
                held out of others, where it would be said twice.

        Raises:
            InputError: a file cannot be read as text, or this split has no document.
        """
        numerator, denominator = Fraction(self.config.validation_share).limit_denominator(1_000_000).as_integer_ratio()
        seen = given = 0
        notes: list[str] = []
        has_lines = False
        for document in self._all_documents(notes):
            held = self.held_out is not None and is_held_out(seen, numerator, denominator)
            seen += 1
            has_lines = has_lines or "\n" in document
            if self.held_out is None or held == (self.held_out == "held"):
                given += 1
                yield document
        if not given and seen:
            ways = ["name a text for it (data.validation)"]
            if seen > 1:
                ways.append(f"hold out more (data.validation_share={math.ceil(100 / seen) / 100:g})")
            if has_lines and self.config.documents != "line":
                ways.append("make documents smaller (data.documents=line)")
            raise InputError(
                f"data.validation_share must leave a document for training and one for validation; got "
                f"{self.config.validation_share} of {seen} documents in {self.name}; {', or '.join(ways)}"
            )
        if not given:
            raise InputError(f"corpus must hold at least one document; got none in {self.name}")
        if note is not None and self.held_out != "held":
            for sentence in notes:
                note(sentence)

    def contents(self) -> dict[str, Any]:
        """What the documents follow from, for a fingerprint: every byte of the files, and how they are read.

        Of a file's name only the ending counts, of a dataset only the name: what lies behind it is not looked at.
        """
        share = self.config.validation_share if self.held_out else None
        how = {"reading": READING, "documents": self.config.documents, "held_out": self.held_out, "share": share}
        if self.name == BUILTIN:
            # the grammar is code: another version of it writes another corpus
            code = hashlib.sha256()
            for path in sorted((Path(__file__).parent / "builtin").glob("*.py")):
                code.update(path.read_bytes())
            return how | {"builtin": [self.builtin_words, self.builtin_seed, code.hexdigest()]}
        if self.name.startswith(HUGGING_FACE):
            return how | {"dataset": self.name, "field": self.config.text_field}
        hashes = []
        for path in self.files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes.append([ending(path), digest])
        return how | {"files": hashes, "field": self.config.text_field}

    def what_is_not_read(self) -> str:
        """The kinds of files that a folder has and that are no text, in words; "" where there are none."""
        folder = _path(self.name)
        return what_is_not_read(folder) if self.files and folder.is_dir() else ""

    def __str__(self) -> str:
        parts = {None: "", "kept": ", without the held-out documents", "held": ", the held-out documents"}
        count = f" ({len(self.files)} files)" if len(self.files) > 1 else ""
        return f"{self.name}{count}{parts[self.held_out]}"

    def _all_documents(self, notes: list[str]) -> Iterator[str]:
        if self.name == BUILTIN:
            from antlm_fast.data.builtin.corpus import documents as builtin_documents

            yield from builtin_documents(self.builtin_words, seed=self.builtin_seed)
            return
        streams: list[tuple[str, Iterator[str]]] = [
            (str(path), read_documents(path, unit=self.config.documents, text_field=self.config.text_field))
            for path in self.files
        ]
        if self.name.startswith(HUGGING_FACE):
            streams = [(self.name, _dataset_documents(self.name, self.config.text_field))]
        empty, num_cut = [], 0
        for place, texts in streams:
            found = False
            for text in texts:
                found = True
                num_cut += len(text) > LONGEST_DOCUMENT_CHARS
                yield from cut(text)
            if not found:
                empty.append(place)
        if empty and len(self.files) == 1:
            raise InputError(f"corpus file must hold text; got {empty[0]}, which is empty")
        if empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            notes.append(f"left out because they are empty: {', '.join(empty[:5])}{more}")
        if num_cut:
            notes.append(f"documents of more than {LONGEST_DOCUMENT_CHARS:,} characters, cut at blanks: {num_cut}")


def documents(config: DataConfig, split: str) -> Iterator[str]:
    """The documents of a split ("train" or "validation"), streaming, in a fixed order.

    Raises:
        InputError: the source does not exist, cannot be read, or has no document for this split.
    """
    return open_source(config, split).documents()


def open_source(config: DataConfig, split: str) -> Source:
    """Decide what a split consists of; no text is read yet.

    Raises:
        InputError: the path does not exist, the folder has no usable file, or there is no validation at all.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if config.train is None:
        raise InputError("data.train must be given (--data PATH, a file or folder of text); got none")
    validation = split == "validation"
    if validation and config.validation is not None:
        # another seed and size: the same ones would be the training documents
        return _find(config.validation, config, validation=True, seed=1, words=max(1, config.builtin_words // 10))
    source = _find(config.train, config, validation=False, seed=0, words=config.builtin_words)
    if config.validation is not None:
        return source
    root = _path(config.train)
    if source.files and root.is_dir() and ending(source.files[0]) != ".dev":
        development = find_files(root, validation=True)
        if ending(development[0]) == ".dev":
            return _replace_files(source, development) if validation else source
    if config.validation_share == 0:
        if validation:
            raise InputError(
                f"data.validation must be given or data.validation_share above 0; got neither for {config.train}"
            )
        return source
    return Source(
        name=source.name,
        config=config,
        files=source.files,
        held_out="held" if validation else "kept",
        builtin_seed=source.builtin_seed,
        builtin_words=source.builtin_words,
    )


def check_splits(config: DataConfig) -> None:
    """Raises InputError where training or validation has no document; no more than the first ones are read."""
    for split in SPLITS:
        next(open_source(config, split).documents())


def is_held_out(index: int, numerator: int, denominator: int) -> bool:
    """Whether the document at this place is for validation: a share of numerator / denominator, spread evenly.

    Document numbers are cut in blocks of denominator / numerator; a hash of the block's number picks one document of
    each. So the share is exact whatever the size, and no period of the corpus is met.
    """
    if not numerator:
        return False
    block = index * numerator // denominator
    first = -(-block * denominator // numerator)
    size = -(-(block + 1) * denominator // numerator) - first
    draw = int.from_bytes(hashlib.blake2b(block.to_bytes(8, "little"), digest_size=8).digest(), "little")
    return index == first + draw % size


def _find(name: str, config: DataConfig, *, validation: bool, seed: int, words: int) -> Source:
    if name == BUILTIN:
        return Source(name=name, config=config, builtin_seed=seed, builtin_words=words)
    if name.startswith(HUGGING_FACE):
        return Source(name=name, config=config)
    path = _path(name, "data.validation" if validation else "data.train")
    if path.is_dir():
        return Source(name=name, config=config, files=tuple(find_files(path, validation=validation)))
    if not path.is_file():
        # a pipe can be read only once, and the fingerprint reads the text too
        kind, state = (InputError, "is not a regular file") if path.exists() else (NoText, "does not exist")
        raise kind(f"corpus must be a file, a folder, {BUILTIN!r} or 'hf:NAME'; got {name}, which {state}")
    return Source(name=name, config=config, files=(path,))


def _path(name: str, argument: str = "data.train") -> Path:
    path = Path(name)
    return path if path.exists() else expand_home(argument, name)  # a folder may be called ~name


def _replace_files(source: Source, files: list[Path]) -> Source:
    return Source(name=source.name, config=source.config, files=tuple(files))


def _dataset_documents(name: str, text_field: str) -> Iterator[str]:
    """The texts of "hf:NAME[:CONFIG][:SPLIT]", streamed; an empty CONFIG is the default one, SPLIT is "train"."""
    parts = name.removeprefix(HUGGING_FACE).split(":")
    if not parts[0] or len(parts) > 3:
        raise InputError(f"dataset must be hf:NAME[:CONFIG][:SPLIT]; got {name}")
    dataset_name, configuration, split = (*parts, "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"dataset needs the package datasets (pip install datasets); got {name}") from error
    try:
        rows = load_dataset(dataset_name, configuration or None, split=split or "train", streaming=True)
    except Exception as error:  # the library's own kinds, and those of the network
        raise InputError(f"dataset must be one that can be loaded; got {name}: {error}") from error
    for number, row in enumerate(rows):
        text = row.get(text_field)
        if not isinstance(text, str):
            fields = ", ".join(sorted(row))
            raise InputError(f"{TEXT_FIELD} must name a text; got {text_field!r} for {name}, row {number}: {fields}")
        if text and not text.isspace():
            yield text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
