"""Token rows of an epoch: which tokens make a row, and in which order the rows come. Pure in (seed, epoch, index)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from antlm_fast.data.token_store import TokenStore
from antlm_fast.types import InputError, TokenRows

MODES = ("stream", "packed")
# A Feistel network of so few bits visits only a small part of all permutations: tiny epochs walk a larger domain.
_LEAST_HALF_BITS = 3
_FEISTEL_ROUNDS = 6


class Rows:
    """Random access to the rows of every epoch; nothing is drawn ahead and no order is ever stored.

    mode "stream": all ids are one ring, cut every `row_tokens` from an offset drawn per epoch; a row is one sequence
    and crosses document boundaries (BabyLlama). The last num_tokens % row_tokens tokens before the offset are left
    out of that epoch. A share `short_share` of the rows, drawn by (seed, epoch, row), is two sequences instead, cut
    at a random place: short sequences are then met in training, and no token is lost.
    mode "packed": whole documents, in corpus order, fill rows of at most `row_tokens` tokens; each is a sequence of
    its own. A document longer than a row goes on in the next row as a new sequence. Every token appears exactly once
    per epoch. A sequence of one token is possible (it has nothing to predict).

    Args:
        store: the tokens.
        mode: "stream" or "packed".
        row_tokens: the length of a row in tokens ("packed": the longest).
        seed: with the epoch, decides offset and order.
        shuffle: False gives corpus order and offset 0 in every epoch (validation).
        short_share: "stream": share of the rows that are cut in two; "packed" takes only 0.

    Raises:
        InputError: mode, row_tokens or short_share cannot be, or the store has not one row.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        mode: str,
        row_tokens: int,
        seed: int,
        shuffle: bool = True,
        short_share: float = 0.0,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"row_mode must be one of {', '.join(MODES)}; got {mode!r}")
        if row_tokens < 1:
            raise InputError(f"row_tokens must be at least 1; got {row_tokens}")
        if seed < 0:
            raise InputError(f"seed must be at least 0; got {seed}")
        if not 0 <= short_share <= 1 or (short_share and mode != "stream"):
            raise InputError(f"short_share must lie in 0 .. 1, and be 0 where row_mode is 'packed'; got {short_share}")
        if mode == "stream" and store.num_tokens < row_tokens:
            raise InputError(
                f"row_tokens must be at most the {store.num_tokens} tokens of the corpus ({store.source}); "
                f"got {row_tokens}"
            )
        self.store = store
        self.mode = mode
        self.row_tokens = row_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.short_share = short_share
        self._bounds: NDArray[np.int64] | None = None
        if mode == "packed":
            self._bounds = pack(np.asarray(store.document_starts), row_tokens)
            self.rows_per_epoch = len(self._bounds) - 1
        else:
            self.rows_per_epoch = store.num_tokens // row_tokens

    def with_row_tokens(self, row_tokens: int) -> Rows:
        """The same rows in another length."""
        return Rows(
            self.store,
            mode=self.mode,
            row_tokens=row_tokens,
            seed=self.seed,
            shuffle=self.shuffle,
            short_share=self.short_share,
        )

    def read(self, epoch: int, start: int, stop: int) -> TokenRows:
        """Rows start .. stop - 1 of the epoch's order, as packed sequences.

        Raises:
            ValueError: 0 <= start <= stop <= rows_per_epoch or 0 <= epoch does not hold.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0; got {epoch}")
        if not 0 <= start <= stop <= self.rows_per_epoch:
            raise ValueError(f"start and stop must lie in 0 .. {self.rows_per_epoch}, in order; got {start}, {stop}")
        index = np.arange(start, stop, dtype=np.int64)
        if self.shuffle:
            index = permute(index, self.rows_per_epoch, seed=self.seed, epoch=epoch)
        return self._read_packed(index) if self._bounds is not None else self._read_stream(index, epoch)

    def offset(self, epoch: int) -> int:
        """Where the stream's first row begins in this epoch, 0 .. row_tokens - 1."""
        if self.mode == "packed" or not self.shuffle:
            return 0
        draw = np.random.SeedSequence([self.seed, epoch, 1]).generate_state(1, np.uint64)[0]
        return int(draw % np.uint64(self.row_tokens))

    def _read_stream(self, index: NDArray[np.int64], epoch: int) -> TokenRows:
        first = self.offset(epoch) + index * self.row_tokens
        positions = (first[:, None] + np.arange(self.row_tokens)) % self.store.num_tokens
        return TokenRows(
            ids=self.store.tokens[positions.reshape(-1)].astype(np.int64),
            cu_seqlens=self._stream_bounds(index, epoch),
        )

    def _stream_bounds(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int32]:
        """Where the sequences of these rows begin: each row's beginning, and a place inside those that are cut."""
        bounds = np.arange(len(index) + 1, dtype=np.int32) * np.int32(self.row_tokens)
        if not self.short_share or self.row_tokens < 2:
            return bounds
        keys = np.random.SeedSequence([self.seed, epoch, 3]).generate_state(2, np.uint64)
        chosen, place = (_scramble(_scramble(index.astype(np.uint64)) ^ key) for key in keys)
        is_cut = (chosen >> np.uint64(11)) * 2.0**-53 < self.short_share
        cuts = bounds[:-1] + 1 + (place % np.uint64(self.row_tokens - 1)).astype(np.int32)  # both parts keep a token
        return np.sort(np.concatenate([bounds, cuts[is_cut]]))

    def _read_packed(self, index: NDArray[np.int64]) -> TokenRows:
        assert self._bounds is not None
        begins, ends = self._bounds[index], self._bounds[index + 1]
        starts = self.store.document_starts
        # the documents that begin strictly inside each row
        inner_begins = np.searchsorted(starts, begins, side="right")
        inner_ends = np.searchsorted(starts, ends, side="left")
        ids, lengths = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        for begin, end, inner_begin, inner_end in zip(begins, ends, inner_begins, inner_ends, strict=True):
            ids.append(self.store.tokens[begin:end].astype(np.int64))
            lengths.append(np.diff(starts[inner_begin:inner_end], prepend=begin, append=end))
        cu_seqlens = np.cumsum(np.concatenate(lengths)).astype(np.int32)
        return TokenRows(ids=np.concatenate(ids), cu_seqlens=cu_seqlens)


def pack(document_starts: NDArray[np.int64], row_tokens: int) -> NDArray[np.int64]:
    """Row boundaries (num_rows + 1,) of documents packed in order into rows of at most row_tokens tokens.

    A row ends at the last document boundary within reach; a document longer than a row is cut at full rows, and what
    remains of it shares its last row with the documents that follow.

    Args:
        document_starts: int64 (num_documents + 1,), strictly ascending from 0; the last is the number of tokens.
        row_tokens: the longest row.
    """
    lengths = np.diff(document_starts)
    # Of the row that a document d opens: the full rows it fills alone, then the document that opens the next row.
    full_rows = np.where(lengths > row_tokens, lengths // row_tokens, 0)
    rest = document_starts[:-1] + full_rows * row_tokens
    following = np.searchsorted(document_starts, rest + row_tokens, side="right") - 1
    # a long document that is an exact multiple needs no further row
    following = np.where(rest == document_starts[1:], np.arange(1, len(document_starts)), following)
    opens = np.zeros(len(lengths), dtype=np.bool_)
    document, num_documents = 0, len(lengths)
    following_of = following.data  # a memoryview: three times as fast as indexing the array one by one
    while document < num_documents:
        opens[document] = True
        document = following_of[document]
    opening = np.flatnonzero(opens)
    # an opening document gives its full rows, and one row more unless it ended with the last full one
    rows_of = full_rows[opening] + (rest[opening] < document_starts[opening + 1])
    first_row = np.cumsum(rows_of) - rows_of
    row_in_document = np.arange(rows_of.sum()) - np.repeat(first_row, rows_of)
    bounds = np.repeat(document_starts[opening], rows_of) + row_in_document * row_tokens
    return np.append(bounds, document_starts[-1]).astype(np.int64)


def permute(index: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each index goes under a pseudo-random bijection of 0 .. size - 1, keyed by (seed, epoch).

    A balanced Feistel network permutes 0 .. 4**half_bits - 1, the smallest such range that holds `size`; an image
    outside 0 .. size - 1 is sent through it again until it falls inside (cycle walking), which keeps the bijection.
    Memory is that of `index`; the expected number of passes is below 4 (below 64 for a size under 16).
    """
    if size <= 1:
        return index.copy()
    half_bits = max(_LEAST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch, 2]).generate_state(_FEISTEL_ROUNDS, np.uint64)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)

    def network(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        return (left << shift) | right

    image = network(index.astype(np.uint64))
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = network(image[outside])
        outside = outside[image[outside] >= size]
    return image.astype(np.int64)


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
