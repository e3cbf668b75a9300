"""Token ids on disk: written once, whole or not at all, and read through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antlm_fast.types import InputError

FORMAT_VERSION = 1
TOKENS_FILE, STARTS_FILE, META_FILE = "tokens.bin", "document_starts.bin", "meta.json"
_STARTS_DTYPE = np.dtype("<i8")
_TOKEN_DTYPES = ("<u2", "<u4")
_TOKENS_PER_FLUSH = 1 << 18


class TokenStore:
    """All ids of a corpus, one document after the other. Make one with `TokenStore.write` or `TokenStore.open`.

    Attributes:
        folder: where it lies.
        tokens: uint16 (vocabularies up to 65,536) or uint32 (num_tokens,), memory-mapped, read-only.
        document_starts: int64 (num_documents + 1,), memory-mapped; document d is
            tokens[document_starts[d]:document_starts[d + 1]] and is never empty.
        vocab_size: every id is below it.
        fingerprint: what the ids were made from and how; equal fingerprints mean equal stores.
        tokenizer_fingerprint: the tokenizer's part of it.
        source: the corpus, in words, for messages.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.num_tokens: int = meta["num_tokens"]
        self.num_documents: int = meta["num_documents"]
        self.vocab_size: int = meta["vocab_size"]
        self.fingerprint: str = meta["fingerprint"]
        self.tokenizer_fingerprint: str = meta["tokenizer_fingerprint"]
        self.source: str = meta["source"]
        self._checksums: dict[str, str] = meta["sha256"]
        token_dtype = np.dtype(meta["dtype"])
        self.tokens: NDArray[Any] = np.memmap(folder / TOKENS_FILE, token_dtype, "r", shape=(self.num_tokens,))
        self.document_starts: NDArray[np.int64] = np.memmap(
            folder / STARTS_FILE, _STARTS_DTYPE, "r", shape=(self.num_documents + 1,)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # another process maps the files itself; the default would send every id through the pipe
        return TokenStore.open, (self.folder,)

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Map a store that was written whole.

        Raises:
            InputError: it is missing, damaged, cut short, or of another format version.
        """
        folder = Path(folder)
        hint = f"delete {folder} and prepare the corpus again"
        if not (folder / META_FILE).is_file():
            raise InputError(f"token store must be a folder with {META_FILE}; got {folder}, which has none")
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            version = meta["format_version"]
            if version != FORMAT_VERSION:
                raise InputError(f"token store must have format version {FORMAT_VERSION}; got {version}; {hint}")
            if meta["dtype"] not in _TOKEN_DTYPES or min(meta["num_tokens"], meta["num_documents"]) < 1:
                raise ValueError("it describes no store")
            sizes = {
                TOKENS_FILE: meta["num_tokens"] * np.dtype(meta["dtype"]).itemsize,
                STARTS_FILE: (meta["num_documents"] + 1) * _STARTS_DTYPE.itemsize,
            }
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{META_FILE} cannot be read ({error!r})"
            raise InputError(f"token store {folder} is damaged: {reason}; {hint}") from error
        for name, size in sizes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise InputError(f"token store {folder} is damaged: {name} must have {size} bytes, it {state}; {hint}")
        try:
            store = cls(folder, meta)
        except KeyError as error:
            raise InputError(f"token store {folder} is damaged: {META_FILE} lacks {error}; {hint}") from error
        if store.document_starts[0] != 0 or store.document_starts[-1] != store.num_tokens:
            raise InputError(f"token store {folder} is damaged: {STARTS_FILE} does not span the tokens; {hint}")
        return store

    @classmethod
    def write(
        cls,
        documents: Iterable[Sequence[int]],
        folder: str | Path,
        *,
        vocab_size: int,
        fingerprint: str,
        tokenizer_fingerprint: str = "",
        source: str = "",
    ) -> TokenStore:
        """Write the ids of documents, which are read once and never held together, and open the result.

        The files are written to a temporary sibling folder, synced to the disk, and renamed: `folder` either does not
        exist or is whole. If another process finished the same store meanwhile, that one is opened. Documents without
        ids are left out.

        Raises:
            InputError: no document has an id, or `folder` exists and is not this very store.
            ValueError: an id is outside 0 .. vocab_size - 1.
            OSError: the disk is full or may not be written; the temporary folder is removed.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f"{partial_prefix(folder)}{secrets.token_hex(4)}.partial")
        temporary.mkdir()
        try:
            meta = _write_files(documents, temporary, vocab_size)
            if not meta["num_tokens"]:
                raise InputError(f"corpus must hold at least one document; got none ({source})")
            meta |= {
                "format_version": FORMAT_VERSION,
                "fingerprint": fingerprint,
                "tokenizer_fingerprint": tokenizer_fingerprint,
                "source": source,
            }
            meta_file = _HashedFile(temporary / META_FILE)
            meta_file.append(json.dumps(meta, indent=2, ensure_ascii=False).encode())
            meta_file.finish()
            _sync_folder(temporary)
            try:
                temporary.rename(folder)
            except OSError as error:
                if not folder.exists():
                    raise
                return cls._open_same(folder, fingerprint, error)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def _open_same(cls, folder: Path, fingerprint: str, error: OSError) -> TokenStore:
        store = cls.open(folder)
        if store.fingerprint != fingerprint:
            raise InputError(f"folder must not exist or hold the same token store; got {folder}") from error
        return store

    def verify(self) -> None:
        """Read everything and compare it with the checksums taken while writing.

        Raises:
            InputError: a file was changed.
        """
        for name, expected in self._checksums.items():
            with (self.folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise InputError(
                    f"token store {self.folder} is damaged: the checksum of {name} must be {expected}; got {found}; "
                    f"delete {self.folder} and prepare the corpus again"
                )


def partial_prefix(folder: Path) -> str:
    """How the temporary siblings of a store begin: hidden, and never the name of a store."""
    return f".{folder.name}."


class _HashedFile:
    """A binary file that is hashed while it is written and synced when it is finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # unbuffered: the chunks are large, and nothing is left to write when an abandoned file is closed
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()

    def append(self, data: bytes) -> None:
        self._hash.update(data)
        with _naming(self._path):
            rest = memoryview(data)
            while rest:  # an unbuffered write may take a part only
                rest = rest[self._file.write(rest) :]

    def finish(self) -> str:
        with _naming(self._path):
            os.fsync(self._file.fileno())
            self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._file.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing (a full disk) do not say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_files(documents: Iterable[Sequence[int]], folder: Path, vocab_size: int) -> dict[str, Any]:
    """tokens.bin and document_starts.bin, a flush at a time; what meta.json says of them."""
    dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
    tokens, starts = _HashedFile(folder / TOKENS_FILE), _HashedFile(folder / STARTS_FILE)
    num_tokens = num_documents = 0
    pending: list[int] = []
    ends: list[int] = [0]

    def flush() -> None:
        ids = np.asarray(pending, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(f"ids must lie in 0 .. {vocab_size - 1}; got {ids.min()} .. {ids.max()}")
        tokens.append(ids.astype(dtype).tobytes())
        starts.append(np.asarray(ends, dtype=_STARTS_DTYPE).tobytes())
        pending.clear()
        ends.clear()

    try:
        for ids in documents:
            if not len(ids):
                continue
            pending.extend(ids)
            num_tokens += len(ids)
            num_documents += 1
            ends.append(num_tokens)
            if len(pending) >= _TOKENS_PER_FLUSH:
                flush()
        flush()
        checksums = {TOKENS_FILE: tokens.finish(), STARTS_FILE: starts.finish()}
    except BaseException:
        tokens.abandon()
        starts.abandon()
        raise
    return {
        "dtype": dtype.str,
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "vocab_size": vocab_size,
        "sha256": checksums,
    }


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; systems that cannot open a folder need no such thing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
