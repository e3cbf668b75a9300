"""Ids on disk: what is written is read back, and a folder is either a whole store or none."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antlm_fast.data import token_store
from antlm_fast.data.token_store import TokenStore
from antlm_fast.types import InputError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 0, 9]]


def write(folder: Path, documents: Any = DOCUMENTS, **settings: Any) -> TokenStore:
    return TokenStore.write(documents, folder, **({"vocab_size": 10, "fingerprint": "f", "source": "here"} | settings))


def test_written_ids_are_read_back(tmp_path: Path) -> None:
    written = write(tmp_path / "store", tokenizer_fingerprint="t")
    for store in (written, TokenStore.open(tmp_path / "store"), TokenStore.open(str(tmp_path / "store"))):
        assert store.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0, 9]
        assert store.document_starts.tolist() == [0, 3, 4, 8]
        assert (store.num_tokens, store.num_documents, store.vocab_size) == (8, 3, 10)
        assert (store.fingerprint, store.tokenizer_fingerprint, store.source) == ("f", "t", "here")
        store.verify()
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "document_starts.bin",
        "meta.json",
        "tokens.bin",
    ]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(10, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_smallest_dtype_that_holds_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    store = write(tmp_path / "store", [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [0, vocab_size - 1]
    assert store.document_starts.dtype == np.int64


def test_many_flushes_give_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 10, length).tolist() for length in rng.integers(0, 50, 300)]
    whole = write(tmp_path / "whole", documents)
    monkeypatch.setattr(token_store, "_TOKENS_PER_FLUSH", 64)
    parts = write(tmp_path / "parts", (np.asarray(document) for document in documents))
    assert np.array_equal(whole.tokens, np.concatenate([np.asarray(document, np.int64) for document in documents]))
    assert np.array_equal(whole.tokens, parts.tokens)
    assert np.array_equal(whole.document_starts, parts.document_starts)


def test_writing_does_not_hold_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "_TOKENS_PER_FLUSH", 1 << 12)
    document = list(range(1000))
    tracemalloc.start()
    try:
        store = write(tmp_path / "store", (document for _ in range(2000)), vocab_size=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.tokens.nbytes == 4_000_000
    assert peak < 1_000_000


def test_store_is_mapped_read_only_and_travels_by_its_path(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [list(range(1000)) * 100], vocab_size=1000)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).tokens, store.tokens)


@pytest.mark.parametrize("ids", [[1, 10], [-1]])
def test_ids_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ids must lie in 0 .. 9; got"):
        write(tmp_path / "store", [ids])
    assert list(tmp_path.iterdir()) == []


def test_no_document(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"corpus must hold at least one document; got none \(here\)"):
        write(tmp_path / "store", [[], []])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("encoder broke"), KeyboardInterrupt(), PermissionError(13, "no", "x")])
def test_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(token_store, "_TOKENS_PER_FLUSH", 2)
    seen: list[list[str]] = []

    def documents() -> Iterator[Sequence[int]]:
        yield [1, 2, 3]
        seen.append([path.name for path in tmp_path.iterdir()])
        raise error

    with pytest.raises(type(error)) as caught:
        write(tmp_path / "store", documents())
    assert caught.value is error
    # while it was written it was hidden under another name
    assert len(seen[0]) == 1
    assert seen[0][0].startswith(".store.")
    assert seen[0][0].endswith(".partial")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_not_a_store(tmp_path: Path) -> None:
    """A process that is killed cannot clean up: its folder keeps another name and disturbs nobody."""
    left = tmp_path / ".store.0badcafe.partial"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"\x01\x00")
    with pytest.raises(InputError, match=r"token store must be a folder with meta.json; got .*store, which has none"):
        TokenStore.open(tmp_path / "store")
    assert write(tmp_path / "store").num_tokens == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "store"]


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_store.os, "fsync", full)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*tokens.bin'"):
        write(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "store")


def test_second_writer_of_the_same_store_takes_the_first_ones(tmp_path: Path) -> None:
    def documents() -> Iterator[Sequence[int]]:
        yield [1, 2, 3]
        write(tmp_path / "store")  # another process is faster

    assert write(tmp_path / "store", documents()).num_tokens == 8
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_another_store_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "store")
    with pytest.raises(InputError, match=r"folder must not exist or hold the same token store; got .*store"):
        write(tmp_path / "store", [[1]], fingerprint="g")
    assert TokenStore.open(tmp_path / "store").num_tokens == 8
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def damage_meta(folder: Path, **changes: Any) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in meta.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "tokens.bin", 15), "tokens.bin must have 16 bytes, it has 15 bytes"),
        (lambda f: (f / "tokens.bin").unlink(), "tokens.bin must have 16 bytes, it is missing"),
        (lambda f: os.truncate(f / "document_starts.bin", 0), "document_starts.bin must have 32 bytes, it has 0 bytes"),
        (lambda f: (f / "document_starts.bin").write_bytes(b"\x01" * 32), "document_starts.bin does not span"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json cannot be read"),
        (lambda f: damage_meta(f, dtype="|O"), "meta.json cannot be read"),
        (lambda f: damage_meta(f, num_tokens=0), "meta.json cannot be read"),
        (lambda f: damage_meta(f, num_tokens="8"), "meta.json cannot be read"),
        (lambda f: damage_meta(f, source=None), "meta.json lacks 'source'"),
        (lambda f: damage_meta(f, format_version=99), "must have format version 1; got 99"),
    ],
)
def test_damaged_store_is_refused_with_a_hint(tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "store"
    write(folder)
    damage(folder)
    with pytest.raises(InputError, match=f"{message}.*; delete .*store and prepare the corpus again$"):
        TokenStore.open(folder)


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    data = bytearray((tmp_path / "store" / "tokens.bin").read_bytes())
    data[4] ^= 1
    (tmp_path / "store" / "tokens.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"the checksum of tokens.bin must be [0-9a-f]{64}; got [0-9a-f]{64}; delete"):
        store.verify()
