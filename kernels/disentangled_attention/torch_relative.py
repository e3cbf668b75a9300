"""The two relative terms of a tile of scores, added to it, and their gradients, folded out of the scores' gradient.

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

# a product of n rows or keys with their distances is n - 1 columns wider than what is shown of it: costly where products
# are; where matrix units make them, few large ones are quickest
_SKEWED_ROWS = {torch.bfloat16: 128, torch.float16: 128}
_SKEWED_ROWS_WIDE = 64
# columns of a product are a multiple of it
_COLUMNS = 32


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
        self._zeroed: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised memory of q's dtype; what was last taken by that name is no longer used."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = self._like.new_empty(size)
            self._zeroed.pop(name, None)
        return self._held[name][:size].view(shape)

    def take_zeroed(self, name: str, *shape: int) -> torch.Tensor:
        """Zeros; when the same shape is taken again, zeros except where its last taker wrote."""
        found = self.take(name, *shape)
        if self._zeroed.get(name) != shape:
            self._zeroed[name] = shape
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
    ) -> None:
        self.q_rel, self.k_rel, self.scale = q_rel, k_rel, softmax_scale
        self.len_q, self.len_k, self.positions = len_q, len_k, places.positions
        table = q_rel if k_rel is None else k_rel
        if table is None:
            return
        self._width = table.shape[1]
        device, sizes = table.device, (self._width // 2, max_position)
        if places.positions is not None:
            self._rows = _table_rows(torch.arange(1 - len_k, len_k, device=device), *sizes)
            return
        key_minus_query = torch.arange(1 - len_q, len_k, device=device)
        first = places.offset if isinstance(places.offset, int) else places.offset[:, None]
        # (1 or num_seqs, len_q + len_k - 1): as keys follow one another, and as queries do
        by_key = _table_rows(first - key_minus_query, *sizes).view(-1, len_q + len_k - 1)
        no_row = (0, _COLUMNS)
        self._by_key = torch.nn.functional.pad(by_key, no_row, value=self._width - 1)
        self._by_query = torch.nn.functional.pad(by_key.flip(-1), no_row, value=self._width - 1)
        self._step = _SKEWED_ROWS.get(table.dtype, _SKEWED_ROWS_WIDE)

    def add_to(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, tile: Tile, scratch: Scratch) -> float:
        """Write the terms of a tile to s (heads, num_seqs, rows, stop), of its q and k. The factor of s from here on.

        It is 0 if there are no terms: s is uninitialised.
        """
        if self.q_rel is None and self.k_rel is None:
            return 0.0
        if self.positions is not None:
            self._gather(s, q, k, tile)
            return 1.0
        if self.q_rel is not None:
            for keys, distances in self._key_blocks(tile):
                by_key = self._products(k[:, :, keys], self._expanded_q_rel, tile, distances, scratch)
                # a transposed copy is quick, a transposed addition is not: so this term comes first
                s[..., keys].copy_(_skewed(by_key, s.shape[2]).mT)
        if self.k_rel is not None:
            for rows, distances in self._row_blocks(tile):
                by_row = self._products(q[:, :, rows], self._expanded_k_rel, tile, distances, scratch)
                part, skewed = s[:, :, rows], _skewed(by_row, tile.stop)
                part.copy_(skewed) if self.q_rel is None else part.add_(skewed)
        return 1.0

    def fold(self, d_s: torch.Tensor, tile: Tile, scratch: Scratch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradient of each query's products with k_rel, (heads, num_seqs, rows, 2 B), and each key's with q_rel.

        Unscaled; each is None where its term is left out.
        """
        if self.positions is not None:
            return self._scatter(d_s, tile)
        d_by_row, d_by_key = [], []
        if self.k_rel is not None:
            for rows, distances in self._row_blocks(tile):
                d_by_row.append(self._folded(d_s[:, :, rows], self._one_hot_by_key, tile, distances, scratch))
        if self.q_rel is not None:
            for keys, distances in self._key_blocks(tile):
                d_by_key.append(self._folded(d_s[..., keys].mT, self._one_hot_by_query, tile, distances, scratch))
        return _joined(d_by_row), _joined(d_by_key)

    def _row_blocks(self, tile: Tile) -> Iterator[tuple[slice, slice]]:
        """Runs of a tile's rows, and their distances in the order of the keys."""
        for start in range(tile.rows.start, tile.rows.stop, self._step):
            stop = min(start + self._step, tile.rows.stop)
            first = self.len_q - stop
            width = _rounded_up(stop - start + tile.stop - 1)
            yield slice(start - tile.rows.start, stop - tile.rows.start), slice(first, first + width)

    def _key_blocks(self, tile: Tile) -> Iterator[tuple[slice, slice]]:
        """Runs of a tile's keys, and their distances in the order of the queries."""
        for start in range(0, tile.stop, self._step):
            stop = min(start + self._step, tile.stop)
            first = self.len_k - stop + tile.rows.start
            width = _rounded_up(stop - start + tile.rows.stop - tile.rows.start - 1)
            yield slice(start, stop), slice(first, first + width)

    @cached_property
    def _expanded_k_rel(self) -> torch.Tensor:
        return _expanded(self.k_rel, self._by_key)

    @cached_property
    def _expanded_q_rel(self) -> torch.Tensor:
        return _expanded(self.q_rel, self._by_query)

    @cached_property
    def _one_hot_by_key(self) -> torch.Tensor:
        return _one_hot(self._by_key, self._width, self.k_rel.dtype)

    @cached_property
    def _one_hot_by_query(self) -> torch.Tensor:
        return _one_hot(self._by_query, self._width, self.q_rel.dtype)

    def _products(
        self, x: torch.Tensor, table: torch.Tensor, tile: Tile, distances: slice, scratch: Scratch
    ) -> torch.Tensor:
        """(heads, num_seqs, rows, distances): each row of x with the table's row of each distance, scaled."""
        heads, num_seqs, rows, head_dim = x.shape
        table = table[tile.heads, tile.seqs if table.shape[1] > 1 else slice(None), :, distances]
        found = scratch.take("products", heads, num_seqs, rows, table.shape[3])
        batch = heads * table.shape[1]
        table, x = table.flatten(0, 1), x.reshape(batch, -1, head_dim)
        out = found.view(batch, x.shape[1], table.shape[2])
        torch.baddbmm(out, x, table, beta=0.0, alpha=self.scale, out=out)
        return found

    def _folded(
        self, part: torch.Tensor, one_hot: torch.Tensor, tile: Tile, distances: slice, scratch: Scratch
    ) -> torch.Tensor:
        """(heads, num_seqs, rows, 2 B) of (heads, num_seqs, rows, n): the sums of what shares a bucket."""
        width = distances.stop - distances.start
        wide = scratch.take_zeroed("by distance", *part.shape[:3], width)
        _skewed(wide, part.shape[3]).copy_(part)
        if one_hot.shape[0] == 1:
            return (wide.view(-1, width) @ one_hot[0, distances]).view(*part.shape[:3], -1)
        return wide @ one_hot[tile.seqs, distances]

    def _index(self, tile: Tile, shape: torch.Size) -> torch.Tensor:
        """The table's row of each query and key, as scores of all heads."""
        positions = self.positions[tile.seqs, tile.rows]
        distances = positions[..., None] - torch.arange(tile.stop, device=positions.device)
        return self._rows[distances + (self.len_k - 1)].expand(shape)

    def _gather(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, tile: Tile) -> None:
        index = self._index(tile, s.shape)
        parts = []
        if self.k_rel is not None:
            parts.append((q * self.scale @ self.k_rel[tile.heads, None].mT).gather(-1, index))
        if self.q_rel is not None:
            parts.append((self.q_rel[tile.heads, None] @ (k * self.scale).mT).gather(-2, index))
        s.copy_(parts[0]) if len(parts) == 1 else torch.add(*parts, out=s)

    def _scatter(self, d_s: torch.Tensor, tile: Tile) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        index = self._index(tile, d_s.shape)
        heads, num_seqs, rows, keys = d_s.shape
        d_by_row = d_by_key = None
        # one thread has a whole row (or key), so that the order of the sums is always the same
        wide = d_s.to(torch.promote_types(d_s.dtype, torch.float32))
        if self.k_rel is not None:
            d_by_row = wide.new_zeros(heads, num_seqs, rows, self._width).scatter_add_(-1, index, wide)
        if self.q_rel is not None:
            d_by_key = wide.new_zeros(heads, num_seqs, self._width, keys).scatter_add_(-2, index, wide).mT
        return d_by_row, d_by_key


def _table_rows(distances: torch.Tensor, bucket_size: int, max_position: int) -> torch.Tensor:
    """The row of a table for each distance: bucket + bucket_size - 1."""
    ends = last_distances(bucket_size, max_position)[:-1]
    near = min(bucket_size // 2 + 1, len(ends))
    # filled on the device: a copy from the host can stall. Near distances are buckets of their own
    far = [torch.full((1,), end, device=distances.device) for end in ends[near:]]
    all_ends = torch.cat([torch.arange(near, device=distances.device), *far])
    return torch.sign(distances) * torch.bucketize(distances.abs(), all_ends) + (bucket_size - 1)


def _expanded(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(heads, 1 or num_seqs, head_dim, distances) of a table (heads, 2 B, head_dim)."""
    return table.mT[:, :, rows].transpose(1, 2)


def _one_hot(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(1 or num_seqs, distances, width)"""
    return (rows[..., None] == torch.arange(width, device=rows.device)).to(dtype)


def _skewed(wide: torch.Tensor, shown: int) -> torch.Tensor:
    """Of (heads, num_seqs, rows, width) the view (heads, num_seqs, rows, shown) where row r begins at column
    rows - 1 - r."""
    heads, num_seqs, rows, width = wide.shape
    strides = (*wide.stride()[:2], width - 1, 1)
    return wide.as_strided((heads, num_seqs, rows, shown), strides, wide.storage_offset() + rows - 1)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _rounded_up(width: int) -> int:
    return -(-width // _COLUMNS) * _COLUMNS
