"""Rows of an epoch: what they hold, in which order they come, and that both follow from (seed, epoch) alone."""

from __future__ import annotations

import pickle
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antlm_fast.data.rows import Rows, pack, permute
from antlm_fast.data.token_store import TokenStore
from antlm_fast.types import InputError, TokenRows

LENGTHS = [3, 1, 4, 20, 1, 5, 9, 8, 16, 2, 6, 1, 1, 30, 7]


def make_store(folder: Path, lengths: list[int]) -> TokenStore:
    """Documents whose ids count up over the corpus, so that an id says where it came from."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = (range(begin, end) for begin, end in pairwise(starts))
    return TokenStore.write(documents, folder, vocab_size=int(starts[-1]), fingerprint="f", source="counting")


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make_store(tmp_path / "store", LENGTHS)


def sequences(rows: TokenRows) -> list[list[int]]:
    bounds = rows.cu_seqlens
    return [rows.ids[begin:end].tolist() for begin, end in pairwise(bounds)]


def everything(rows: Rows, epoch: int) -> TokenRows:
    return rows.read(epoch, 0, rows.rows_per_epoch)


def test_stream_in_corpus_order(store: TokenStore) -> None:
    rows = Rows(store, mode="stream", row_tokens=10, seed=0, shuffle=False)
    assert rows.rows_per_epoch == 114 // 10
    found = rows.read(5, 2, 4)
    assert sequences(found) == [list(range(20, 30)), list(range(30, 40))]
    assert (found.ids.dtype, found.cu_seqlens.dtype) == (np.int64, np.int32)
    assert found.cu_seqlens.tolist() == [0, 10, 20]


def test_stream_offset_moves_with_the_epoch(store: TokenStore) -> None:
    rows = Rows(store, mode="stream", row_tokens=10, seed=0)
    offsets = {rows.offset(epoch) for epoch in range(200)}
    assert offsets == set(range(10))
    for epoch in range(20):
        parts = sequences(everything(rows, epoch))
        # consecutive on the ring of 114 ids, each row begins at the offset plus a multiple of 10
        for part in parts:
            assert [(token - part[0]) % 114 for token in part] == list(range(10))
        places = sorted((part[0] - rows.offset(epoch)) % 114 for part in parts)
        assert places == list(range(0, 110, 10))
        assert len({token for part in parts for token in part}) == 110


def test_stream_of_exactly_one_row(tmp_path: Path) -> None:
    rows = Rows(make_store(tmp_path / "one", [3, 4]), mode="stream", row_tokens=7, seed=3)
    assert rows.rows_per_epoch == 1
    for epoch in range(5):
        assert sorted(everything(rows, epoch).ids) == list(range(7))


def test_packed_rows_by_hand(store: TokenStore) -> None:
    rows = Rows(store, mode="packed", row_tokens=10, seed=0, shuffle=False)
    # lengths 3 1 4 | 20 = 10 | 10 | 1 5 | 9 | 8 | 16 = 10 | 6 2 | 6 1 1 | 30 = 10 | 10 | 10 | 7
    by_row = [[len(part) for part in sequences(rows.read(0, row, row + 1))] for row in range(rows.rows_per_epoch)]
    expected = [[3, 1, 4], [10], [10], [1, 5], [9], [8], [10], [6, 2], [6, 1, 1], [10], [10], [10], [7]]
    assert by_row == expected
    assert everything(rows, 0).ids.tolist() == list(range(114))
    assert np.diff(everything(rows, 0).cu_seqlens).tolist() == [length for row in expected for length in row]


@pytest.mark.parametrize("row_tokens", [1, 2, 7, 10, 30, 114, 1000])
def test_packed_epoch_has_every_token_once(store: TokenStore, row_tokens: int) -> None:
    rows = Rows(store, mode="packed", row_tokens=row_tokens, seed=1)
    for epoch in range(3):
        assert sorted(everything(rows, epoch).ids) == list(range(114))
        for row in range(rows.rows_per_epoch):
            assert 1 <= len(rows.read(epoch, row, row + 1).ids) <= row_tokens


def test_packed_sequences_never_cross_documents(store: TokenStore) -> None:
    rows = Rows(store, mode="packed", row_tokens=12, seed=1)
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for part in sequences(everything(rows, 0)):
        assert len(set(document_of[part])) == 1
        assert part == list(range(part[0], part[0] + len(part)))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    row_tokens=st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_packing_equals_the_greedy_rule(lengths: list[int], row_tokens: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    expected = [0]
    while expected[-1] < starts[-1]:
        begin = expected[-1]
        reach = max(start for start in starts.tolist() if start <= begin + row_tokens)
        expected.append(reach if reach > begin else begin + row_tokens)
    assert pack(starts, row_tokens).tolist() == expected


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_access_is_random_and_pure(store: TokenStore, mode: str) -> None:
    rows = Rows(store, mode=mode, row_tokens=10, seed=7)
    whole = everything(rows, 3)
    again = Rows(store, mode=mode, row_tokens=10, seed=7)
    for size in (1, 2, 3, 5):
        chunks = range(0, again.rows_per_epoch, size)
        parts = {start: again.read(3, start, min(start + size, again.rows_per_epoch)) for start in reversed(chunks)}
        assert np.array_equal(np.concatenate([parts[start].ids for start in chunks]), whole.ids)
        assert [part for start in chunks for part in sequences(parts[start])] == sequences(whole)
    sent = pickle.loads(pickle.dumps(rows))
    assert np.array_equal(everything(sent, 3).ids, whole.ids)
    assert not np.array_equal(everything(rows, 4).ids, whole.ids)
    assert not np.array_equal(everything(Rows(store, mode=mode, row_tokens=10, seed=8), 3).ids, whole.ids)


def test_short_share_cuts_rows_in_two_and_loses_nothing(store: TokenStore) -> None:
    whole = Rows(store, mode="stream", row_tokens=10, seed=7)
    cut = Rows(store, mode="stream", row_tokens=10, seed=7, short_share=0.4)
    counts, places, patterns = 0, [0] * 10, set()
    for epoch in range(400):
        plain, found = everything(whole, epoch), everything(cut, epoch)
        assert np.array_equal(plain.ids, found.ids)
        assert set(plain.cu_seqlens) <= set(found.cu_seqlens)
        inside = found.cu_seqlens[found.cu_seqlens % 10 != 0]
        assert len(set(inside // 10)) == len(inside)  # at most one cut a row
        counts += len(inside)
        for place in inside % 10:
            places[place] += 1
        patterns.add(tuple(found.cu_seqlens.tolist()))
    total = 400 * 11
    assert abs(counts - 0.4 * total) < 5 * (total * 0.4 * 0.6) ** 0.5
    assert places[0] == 0
    expected = counts / 9
    chi_squared = sum((count - expected) ** 2 / expected for count in places[1:])
    assert chi_squared < 8 + 5 * 16**0.5  # 8 degrees of freedom, variance 16
    assert len(patterns) > 300


def test_what_is_cut_follows_from_seed_epoch_and_row_alone(store: TokenStore) -> None:
    cut = Rows(store, mode="stream", row_tokens=10, seed=7, short_share=0.5)
    whole = sequences(everything(cut, 3))
    parts = [part for row in range(11) for part in sequences(cut.read(3, row, row + 1))]
    assert parts == whole
    assert sequences(everything(pickle.loads(pickle.dumps(cut)), 3)) == whole
    other = Rows(store, mode="stream", row_tokens=10, seed=8, short_share=0.5)
    assert [len(part) for part in sequences(everything(other, 3))] != [len(part) for part in whole]
    everyone = Rows(store, mode="stream", row_tokens=2, seed=0, short_share=1.0)
    assert {len(part) for part in sequences(everything(everyone, 0))} == {1}
    longer = cut.with_row_tokens(20)
    assert (longer.row_tokens, longer.short_share, longer.seed) == (20, 0.5, 7)
    assert np.array_equal(
        everything(longer, 1).ids, everything(Rows(store, mode="stream", row_tokens=20, seed=7), 1).ids
    )


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_no_rows(store: TokenStore, mode: str) -> None:
    found = Rows(store, mode=mode, row_tokens=10, seed=7).read(0, 4, 4)
    assert found.ids.shape == (0,)
    assert found.cu_seqlens.tolist() == [0]


def test_order_is_pinned() -> None:
    """A resumed run must meet the rows in the order that it began with, also under a later version."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [5, 3, 9, 2, 0, 8, 6, 7, 4, 1]
    assert permute(np.arange(5), 1_000_000, seed=42, epoch=3).tolist() == [667581, 242250, 660772, 389097, 952437]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 100_003])
def test_permutation_is_a_bijection(size: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (123, 7)):
        image = permute(np.arange(size), size, seed=seed, epoch=epoch)
        assert np.array_equal(np.sort(image), np.arange(size))


@given(size=st.integers(1, 2**40), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), data=st.data())
@settings(max_examples=100, deadline=None)
def test_permutation_stays_inside_and_is_injective(size: int, seed: int, epoch: int, data: Any) -> None:
    index = np.asarray(data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True)), dtype=np.int64)
    image = permute(index, size, seed=seed, epoch=epoch)
    assert len(set(image.tolist())) == len(index)
    assert all(0 <= value < size for value in image.tolist())


def test_permutation_looks_random() -> None:
    size, epochs = 30, 3000
    images = np.stack([permute(np.arange(size), size, seed=5, epoch=epoch) for epoch in range(epochs)])
    # Every place meets every row equally often: 900 cells of mean 100, variance 100 (1 - 1/30).
    counts = np.stack([np.bincount(images[:, place], minlength=size) for place in range(size)])
    chi_squared = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    degrees = (size - 1) ** 2
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)
    # neighbours do not stay neighbours: 2 (size - 1) / (size (size - 1)) of the pairs are
    adjacent = (np.abs(np.diff(images, axis=1)) == 1).mean()
    assert abs(adjacent - 2 / size) < 0.005
    large = permute(np.arange(100_000), 100_000, seed=5, epoch=0)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


def test_order_of_an_epoch_is_never_stored() -> None:
    size = 10**12
    tracemalloc.start()
    try:
        image = permute(np.arange(size - 100, size, dtype=np.int64), size, seed=0, epoch=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(image.tolist())) == 100
    assert peak < 100_000


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"mode": "padded"}, "row_mode must be one of stream, packed; got 'padded'"),
        ({"row_tokens": 0}, "row_tokens must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"short_share": 1.5}, "short_share must lie in 0 .. 1, .*; got 1.5"),
        ({"short_share": 0.1, "mode": "packed"}, "short_share must .* be 0 where row_mode is 'packed'; got 0.1"),
        ({"row_tokens": 115}, r"row_tokens must be at most the 114 tokens of the corpus \(counting\); got 115"),
    ],
)
def test_arguments_are_checked(store: TokenStore, settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rows(store, **({"mode": "stream", "row_tokens": 10, "seed": 0} | settings_))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((-1, 0, 1), "epoch must be at least 0; got -1"),
        ((0, -1, 1), r"start and stop must lie in 0 .. 11, in order; got -1, 1"),
        ((0, 2, 1), r"start and stop must lie in 0 .. 11, in order; got 2, 1"),
        ((0, 0, 12), r"start and stop must lie in 0 .. 11, in order; got 0, 12"),
    ],
)
def test_places_are_checked(store: TokenStore, place: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(store, mode="stream", row_tokens=10, seed=0).read(*place)
