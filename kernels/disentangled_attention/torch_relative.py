"""The two relative terms of a tile of scores, and their gradients, folded out of the scores' gradient.

Along a row of scores the table's row depends on the distance alone, which falls by one from key to key. So a table is
expanded to one row for each distance, a matrix product makes every query's score of every distance, and a view whose
rows are one element shorter than they are (a skew) shows each query the distances of its keys: q_i . k_rel lies with
unit stride along the keys, k_j . q_rel with unit stride along the queries. The way back writes the scores' gradient
through the same views, and a product with the one-hot matrix of distances and buckets sums what shares a bucket.

Queries of some of a sequence's tokens alone have no such order; their terms are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from antlm_fast.kernels.disentangled_attention.buckets import last_distances
from antlm_fast.kernels.disentangled_attention.torch_layout import Places
from antlm_fast.kernels.tracing import kept

# rows (or keys) whose products with their distances are formed at once, by the size of a dtype: of n of them n - 1
# columns are formed that are not shown, so few where products cost most, and more where matrix units make them
_LEAST_ROWS = {2: 128, 4: 64, 8: 64}
# columns of a product are a multiple of it
_COLUMNS = 32
# of scores at a multiple of this distance in memory, few stay in the nearest cache
_CONFLICT_BYTES = 1024


@dataclass(frozen=True)
class Tile:
    """A part of a block's scores: some heads, some sequences, some query rows, and the keys before `stop`."""

    heads: slice
    seqs: slice
    rows: slice
    stop: int


class Scratch:
    """Memory by name that is given again and again, because fresh buffers of this size cost page faults."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._held: dict[str, torch.Tensor] = {}
        self._zeroed: dict[str, tuple[tuple[int, ...], int]] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory, of q's dtype if none is given; what was last taken by that name is no longer used."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = self._like.new_empty(size, dtype=dtype)
            self._zeroed.pop(name, None)
        return self._held[name][:size].view(shape)

    def take_zeroed(self, name: str, written: int, *shape: int) -> torch.Tensor:
        """Zeros; when taken again with the same shape and `written`, zeros except where the last taker wrote.

        Args:
            name: as of `take`.
            written: stands, with the shape, for where the taker writes.
            shape: the shape.
        """
        found = self.take(name, *shape)
        if self._zeroed.get(name) != (shape, written):
            self._zeroed[name] = (shape, written)
            found.zero_()
        return found


class Terms:
    """The relative terms of one block, whose q, k and scores are (heads, num_seqs, len, ..).

    Args:
        q_rel, k_rel: (heads, 2 B, head_dim), the last row 0 and of no bucket; None leaves a term out.
        max_position: of the buckets.
        len_q, len_k: the block's sizes.
        places: where the queries are among the keys; positions of their own are for the CPU alone.
        softmax_scale: multiplies the terms.
        scratch: for what lives within a call.
    """

    def __init__(
        self,
        q_rel: torch.Tensor | None,
        k_rel: torch.Tensor | None,
        max_position: int,
        len_q: int,
        len_k: int,
        places: Places,
        softmax_scale: float,
        scratch: Scratch,
    ) -> None:
        self.q_rel, self.k_rel, self._scale, self._scratch = q_rel, k_rel, softmax_scale, scratch
        self._len_q, self._len_k, self._positions = len_q, len_k, places.positions
        table = q_rel if k_rel is None else k_rel
        self.width = 0
        if table is None:
            return
        self.width, self._dtype = table.shape[1], table.dtype
        sizes = (self.width // 2, max_position)
        if places.positions is not None:
            self._rows = table_rows(torch.arange(1 - len_k, len_k, device="cpu"), *sizes)
        elif isinstance(places.offset, int) and table.device.type == "cpu":
            self._by_key, self._by_query = _shared_rows(len_q, len_k, places.offset, *sizes)
        else:
            self._by_key, self._by_query = _rows(len_q, len_k, places.offset, *sizes, table.device)

    def add_to(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, tile: Tile) -> float:
        """Write the terms of a tile to s (heads, num_seqs, rows, stop), of its q and k; what s counts from here on.

        It is 0 if there are no terms: s is uninitialised.
        """
        if self.q_rel is None and self.k_rel is None:
            return 0.0
        if self._positions is not None:
            self._gather(s, q, k, tile)
            return 1.0
        if self.q_rel is not None:
            for keys, distances in self._key_blocks(tile):
                by_key = self._products(k[:, :, keys], self._expanded_q_rel, tile, distances)
                # a transposed copy is quick, a transposed addition is not: so this term comes first
                s[..., keys].copy_(_skewed(by_key, s.shape[2]).mT)
        if self.k_rel is not None:
            for rows, distances in self._row_blocks(tile):
                by_row = self._products(q[:, :, rows], self._expanded_k_rel, tile, distances)
                part, skewed = s[:, :, rows], _skewed(by_row, tile.stop)
                part.copy_(skewed) if self.q_rel is None else part.add_(skewed)
        return 1.0

    def fold(
        self,
        d_s: torch.Tensor,
        tile: Tile,
        d_by_row: torch.Tensor | None,
        d_by_key: torch.Tensor | None,
        adding: bool,
    ) -> None:
        """Write a tile's part of the gradient of each query's product with k_rel, and of each key's with q_rel.

        Args:
            d_s: (heads, num_seqs, rows, stop).
            tile: the tile.
            d_by_row: (heads, num_seqs, rows, 2 B), unscaled; None if k_rel is.
            d_by_key: (heads, num_seqs, stop, 2 B), unscaled; None if q_rel is.
            adding: whether d_by_key holds the parts of other tiles already.
        """
        if d_by_row is None and d_by_key is None:
            return
        if self._positions is not None:
            self._scatter(d_s, tile, d_by_row, d_by_key, adding)
            return
        if d_by_row is not None:
            for rows, distances in self._row_blocks(tile):
                self._fold(d_s[:, :, rows], self._one_hot_by_key, tile, distances, d_by_row[:, :, rows], False)
        if d_by_key is not None:
            for keys, distances in self._key_blocks(tile):
                part = self._transposable(d_s[..., keys]).mT
                self._fold(part, self._one_hot_by_query, tile, distances, d_by_key[:, :, keys], adding)

    def _step(self, columns: int) -> int:
        least = _LEAST_ROWS[self._dtype.itemsize]
        return min(max(least, columns * least // 256), 2 * least)

    def _row_blocks(self, tile: Tile) -> Iterator[tuple[slice, slice]]:
        """Runs of a tile's rows, and their distances in the order of the keys."""
        step = self._step(tile.stop)
        for start in range(tile.rows.start, tile.rows.stop, step):
            stop = min(start + step, tile.rows.stop)
            first = self._len_q - stop
            width = _rounded_up(stop - start + tile.stop - 1)
            yield slice(start - tile.rows.start, stop - tile.rows.start), slice(first, first + width)

    def _key_blocks(self, tile: Tile) -> Iterator[tuple[slice, slice]]:
        """Runs of a tile's keys, and their distances in the order of the queries."""
        step = self._step(tile.rows.stop - tile.rows.start)
        for start in range(0, tile.stop, step):
            stop = min(start + step, tile.stop)
            first = self._len_k - stop + tile.rows.start
            width = _rounded_up(stop - start + tile.rows.stop - tile.rows.start - 1)
            yield slice(start, stop), slice(first, first + width)

    @cached_property
    def _expanded_k_rel(self) -> torch.Tensor:
        assert self.k_rel is not None
        return _expanded(self.k_rel, self._by_key)

    @cached_property
    def _expanded_q_rel(self) -> torch.Tensor:
        assert self.q_rel is not None
        return _expanded(self.q_rel, self._by_query)

    @cached_property
    def _one_hot_by_key(self) -> torch.Tensor:
        return _one_hot(self._by_key, self.width, self._dtype)

    @cached_property
    def _one_hot_by_query(self) -> torch.Tensor:
        return _one_hot(self._by_query, self.width, self._dtype)

    def _products(self, x: torch.Tensor, table: torch.Tensor, tile: Tile, distances: slice) -> torch.Tensor:
        """(heads, num_seqs, rows, distances): each row of x with the table's row of each distance, scaled."""
        heads, num_seqs, rows, head_dim = x.shape
        table = table[tile.heads, tile.seqs if table.shape[1] > 1 else slice(None), :, distances]
        found = self._scratch.take("products", heads, num_seqs, rows, table.shape[3])
        table = table.flatten(0, 1)
        x = x.reshape(table.shape[0], -1, head_dim)
        out = found.view(*x.shape[:2], -1)
        torch.baddbmm(out, x, table, beta=0.0, alpha=self._scale, out=out)
        return found

    def _fold(
        self,
        part: torch.Tensor,
        one_hot: torch.Tensor,
        tile: Tile,
        distances: slice,
        into: torch.Tensor,
        adding: bool,
    ) -> None:
        """Write to `into` (heads, num_seqs, rows, 2 B) the sums of what shares a bucket in (.., rows, n)."""
        width = distances.stop - distances.start
        wide = self._scratch.take_zeroed("by distance", part.shape[3], *part.shape[:3], width)
        _skewed(wide, part.shape[3]).copy_(part)
        if one_hot.shape[0] == 1:
            folded = wide.view(-1, width) @ one_hot[0, distances]
        else:
            folded = wide @ one_hot[tile.seqs, distances]
        folded = folded.view(into.shape)
        into.add_(folded) if adding else into.copy_(folded)

    def _transposable(self, part: torch.Tensor) -> torch.Tensor:
        """A copy whose rows do not share cache sets, if `part`'s do; reading it across the rows is twice as fast."""
        if part.stride(2) * part.element_size() % _CONFLICT_BYTES:
            return part
        found = self._scratch.take("transposable", *part.shape[:3], part.shape[3] + 16)
        return found[..., : part.shape[3]].copy_(part)

    def _index(self, tile: Tile, shape: torch.Size) -> torch.Tensor:
        """The table's row of each query and key, as scores of all heads."""
        assert self._positions is not None
        positions = self._positions[tile.seqs, tile.rows]
        distances = positions[..., None] - torch.arange(tile.stop, device=positions.device)
        return self._rows[distances + (self._len_k - 1)].expand(shape)

    def _gather(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, tile: Tile) -> None:
        index = self._index(tile, s.shape)
        found = []
        if self.k_rel is not None:
            by_row = self._products(q, self.k_rel.mT[:, None], tile, slice(0, self.width))
            found.append(by_row.gather(-1, index))
        if self.q_rel is not None:
            by_key = self._products(k, self.q_rel.mT[:, None], tile, slice(0, self.width))
            found.append(by_key.mT.gather(-2, index))
        s.copy_(found[0]) if len(found) == 1 else torch.add(*found, out=s)

    def _scatter(
        self,
        d_s: torch.Tensor,
        tile: Tile,
        d_by_row: torch.Tensor | None,
        d_by_key: torch.Tensor | None,
        adding: bool,
    ) -> None:
        index = self._index(tile, d_s.shape)
        heads, num_seqs, rows, keys = d_s.shape
        # one thread has a whole row (or key), so that the order of the sums is always the same
        dtype = torch.promote_types(d_s.dtype, torch.float32)
        wide = d_s.to(dtype)
        if d_by_row is not None:
            sums = self._scratch.take("sums", heads, num_seqs, rows, self.width, dtype=dtype).zero_()
            d_by_row.copy_(sums.scatter_add_(-1, index, wide))
        if d_by_key is not None:
            sums = self._scratch.take("sums", heads, num_seqs, keys, self.width, dtype=dtype).zero_()
            sums.mT.scatter_add_(-2, index, wide)
            d_by_key.add_(sums) if adding else d_by_key.copy_(sums)


def table_rows(distances: torch.Tensor, bucket_size: int, max_position: int) -> torch.Tensor:
    """bucket + bucket_size - 1 of each distance, as relative_bucket; unlike it, this stalls no device."""
    ends = last_distances(bucket_size, max_position)[:-1]
    if distances.device.type == "cpu":
        all_ends = torch.tensor(ends, dtype=torch.int64, device="cpu")
    else:
        # a copy from the host can stall: the ends are filled in. Near distances are buckets of their own
        near = min(bucket_size // 2 + 1, len(ends))
        far = [torch.full((1,), end, dtype=torch.int64, device=distances.device) for end in ends[near:]]
        all_ends = torch.cat([torch.arange(near, device=distances.device), *far])
    return torch.sign(distances) * torch.bucketize(distances.abs(), all_ends) + (bucket_size - 1)


@kept(maxsize=16)
def _shared_rows(
    len_q: int, len_k: int, offset: int, bucket_size: int, max_position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """_rows of one offset for all sequences; every layer of a step asks for the same."""
    return _rows(len_q, len_k, offset, bucket_size, max_position, torch.device("cpu"))


def _rows(
    len_q: int, len_k: int, offset: int | torch.Tensor, bucket_size: int, max_position: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's row of every distance, (1 or num_seqs, len_q + len_k - 1 and more): as keys follow one another, and
    as queries do. The further ones, which let columns be rounded up, are the row of no bucket."""
    key_minus_query = torch.arange(1 - len_q, len_k, device=device)
    first = offset if isinstance(offset, int) else offset[:, None]
    by_key = torch.atleast_2d(table_rows(first - key_minus_query, bucket_size, max_position))
    none = by_key.new_full((by_key.shape[0], _COLUMNS), 2 * bucket_size - 1)
    return torch.cat([by_key, none], 1), torch.cat([by_key.flip(-1), none], 1)


def _expanded(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(heads, 1 or num_seqs, head_dim, distances) of a table (heads, 2 B, head_dim)."""
    if rows.shape[0] == 1:
        return table.index_select(1, rows[0])[:, None].mT.contiguous()
    return table[:, rows].mT


def _one_hot(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(1 or num_seqs, distances, width)"""
    return (rows[..., None] == torch.arange(width, device=rows.device)).to(dtype)


def _skewed(wide: torch.Tensor, shown: int) -> torch.Tensor:
    """Of (heads, num_seqs, rows, width) the view (heads, num_seqs, rows, shown) where row r begins at column
    rows - 1 - r."""
    heads, num_seqs, rows, width = wide.shape
    strides = (*wide.stride()[:2], width - 1, 1)
    return wide.as_strided((heads, num_seqs, rows, shown), strides, wide.storage_offset() + rows - 1)


def _rounded_up(width: int) -> int:
    return -(-width // _COLUMNS) * _COLUMNS
