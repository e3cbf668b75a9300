"""From a DataConfig to a token store: encoded once, kept in a cache folder, found again by fingerprint."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from antlm_fast.data.corpus import DataConfig, Source, open_source
from antlm_fast.data.text_files import expand_home
from antlm_fast.data.text_folders import NoText
from antlm_fast.data.token_store import FORMAT_VERSION, TokenStore, partial_prefix
from antlm_fast.data.tokenizer import Tokenizer
from antlm_fast.types import InputError

_DOCUMENTS_PER_BATCH = 2000
_CHARS_PER_BATCH = 1 << 20
# Left by a process that was killed; a writer that is alive touches its folder far more often.
_STALE_SECONDS = 24 * 3600.0
_WAYS_OUT = "choose one by --set data.cache_dir=FOLDER, or set XDG_CACHE_HOME"


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    *,
    cache_dir: str | Path | None = None,
    fingerprint: str | None = None,
) -> TokenStore:
    """The token store of a split ("train" or "validation"); tokenized only if the cache does not have it.

    The cache folder's name follows from the text (every byte of the files), how it is read, and the tokenizer.

    Args:
        cache_dir: before `config.cache_dir`, which is before the user's cache folder.
        fingerprint: the one that the text must have, of a run that is resumed. Text that is no longer there is then
            no error if the cache has its store.

    Raises:
        InputError: the corpus cannot be read or has another fingerprint, the cached store is damaged, or there is no
            folder for the cache.
        OSError: the cache cannot be written; names the path.
    """
    root = cache_root(config, cache_dir)
    try:
        source = open_source(config, split)
    except NoText as error:
        if fingerprint is None:
            raise
        return _without_text(root / f"{split}-{fingerprint[:24]}", split, error)
    found = corpus_fingerprint(source, tokenizer)
    if fingerprint not in (None, found):
        raise InputError(
            f"data must be what the run began with; got other {split} text in {source}: fingerprint {found[:12]} "
            f"instead of {str(fingerprint)[:12]}"
        )
    folder = root / f"{split}-{found[:24]}"
    if folder.exists():
        return TokenStore.open(folder)
    if (split == "train" or config.validation is not None) and (others := source.what_is_not_read()):
        print(f"note: not read in {source.name}: {others}", file=sys.stderr)
    _check_writable(root)
    _remove_stale(folder)
    return TokenStore.write(
        _encoded(source, tokenizer, split),
        folder,
        vocab_size=tokenizer.vocab_size,
        fingerprint=found,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source=str(source),
    )


def _without_text(folder: Path, split: str, error: NoText) -> TokenStore:
    """The store of a text that was moved or deleted since."""
    if not folder.exists():
        option = "--data PATH" if split == "train" else "--data PATH, or --set data.validation=PATH"
        raise InputError(f"{error}; what was prepared from it is not in {folder.parent} either: give {option}")
    print(f"note: {error}; what was prepared from it is in {folder.parent} and is taken", file=sys.stderr)
    return TokenStore.open(folder)


def corpus_fingerprint(source: Source, tokenizer: Tokenizer) -> str:
    """SHA-256 of everything that decides the ids."""
    parts = {"format": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, "corpus": source.contents()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/antlm-fast, or ~/.cache/antlm-fast where that is not set (or relative, which XDG forbids)."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (configured if configured.is_absolute() else Path.home() / ".cache") / "antlm-fast"
    except RuntimeError:
        raise InputError(f"data.cache_dir must be given where the user has no home folder; {_WAYS_OUT}") from None


def cache_root(config: DataConfig, cache_dir: str | Path | None = None) -> Path:
    """The folder that holds the token stores, as `prepare` chooses it.

    Raises:
        InputError: it would be in a home folder, and there is none.
    """
    return expand_home("data.cache_dir", cache_dir or config.cache_dir or default_cache_dir())


def _check_writable(root: Path) -> None:
    reason = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise InputError(f"data.cache_dir must be a folder that can be written; got {root} ({reason}); {_WAYS_OUT}")


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if len(batch) >= _DOCUMENTS_PER_BATCH or chars >= _CHARS_PER_BATCH:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encoded(source: Source, tokenizer: Tokenizer, split: str) -> Iterator[Sequence[int]]:
    """The ids of each document; says on stderr what is going on: a bar on a terminal, else a line at each end."""
    started = time.perf_counter()
    num_tokens = num_documents = 0
    notes: list[str] = []
    end = tokenizer.document_end
    bar = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(desc=f"preparing {split} data", unit=" tokens", unit_scale=True, leave=False)
    else:
        print(f"preparing {split} data: {source}", file=sys.stderr)
    try:
        for batch in _batches(source.documents(notes.append)):
            encoded = tokenizer.encode_batch(batch)
            if end:
                encoded = [ids + end if ids else ids for ids in encoded]
            num_documents += len(batch)
            for ids in encoded:
                num_tokens += len(ids)
                yield ids
            if bar is not None:
                bar.update(sum(map(len, encoded)))
    finally:
        if bar is not None:
            bar.close()
    if not end and not tokenizer.encode(""):
        notes.append("the tokenizer has no template and no end token, so documents run together")
    seconds = time.perf_counter() - started
    counts = f"{num_documents:,} documents, {num_tokens:,} tokens, {seconds:.1f} s"
    print(f"prepared {split} data: {counts}", file=sys.stderr)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _remove_stale(folder: Path) -> None:
    """Delete what killed writers of the same store left behind."""
    if not folder.parent.is_dir():
        return
    for path in folder.parent.glob(f"{partial_prefix(folder)}*.partial"):
        with suppress(OSError):  # its writer may finish, or another process may delete it, at this moment
            newest = max((file.stat().st_mtime for file in path.iterdir()), default=path.stat().st_mtime)
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
