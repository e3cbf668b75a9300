"""What the kernels know of relative positions: the two terms, and the buckets of distances as tables on the device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from antlm_fast.kernels.disentangled_attention.buckets import last_distances
from antlm_fast.kernels.tracing import kept

_BEYOND = 2**30  # further than any distance


@dataclass(frozen=True)
class RelativeTerms:
    """The relative terms of the scores, (heads, total, table_rows) of q's dtype, at least one of them; and the tables.

    Args:
        c2p: for each query, its products with the relative keys.
        p2c: for each key, its products with the relative queries.
        buckets: int32 (2 * reach + 1,): the column of the terms for each distance from -reach on.
        mirrored: the same from distance reach down to -reach.
        run_starts: int32 (table_rows,): the smallest distance of a column, and of those before it that have none.
    """

    c2p: torch.Tensor | None
    p2c: torch.Tensor | None
    buckets: torch.Tensor
    mirrored: torch.Tensor
    run_starts: torch.Tensor

    @property
    def reach(self) -> int:
        return self.buckets.numel() // 2

    @property
    def table_rows(self) -> int:
        return self.run_starts.numel()


def relative_terms(
    c2p: torch.Tensor | None, p2c: torch.Tensor | None, bucket_size: int, max_position: int, longest: int
) -> RelativeTerms | None:
    """The terms with their tables; None if there are none.

    Args:
        c2p, p2c: contiguous.
        bucket_size, max_position: as of relative_bucket.
        longest: no sequence has more tokens.
    """
    term = p2c if c2p is None else c2p
    if term is None:
        return None
    # a power of two, so that lengths share tables; a tile may pass a sequence's end
    reach = 1 << (longest + 256).bit_length()
    return RelativeTerms(c2p, p2c, *_tables(bucket_size, max_position, term.shape[-1], reach, term.device))


def padded_table_rows(bucket_size: int) -> int:
    """Columns of the terms: a power of two above the 2 * bucket_size - 1 that are used."""
    return max(16, 1 << (2 * bucket_size - 2).bit_length())


@kept(maxsize=128)
def _tables(
    bucket_size: int, max_position: int, rows: int, reach: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Buckets, mirrored, run_starts. Made once, and kept for good."""
    furthest = max_position - 1
    near = torch.arange(-furthest, furthest + 1, device="cpu")
    ends = torch.tensor(last_distances(bucket_size, max_position), dtype=torch.int64, device="cpu")
    columns = near.sign() * torch.bucketize(near.abs(), ends[:-1]) + bucket_size - 1
    starts = torch.searchsorted(columns, torch.arange(rows, device="cpu"))
    run_starts = starts - furthest
    run_starts[starts == 0] = -_BEYOND  # all that is further belongs to the outermost columns
    run_starts[starts == columns.numel()] = _BEYOND
    buckets = columns[torch.arange(-reach, reach + 1, device="cpu").clamp(-furthest, furthest) + furthest]
    # on a stream of its own: a memory pool that serves a CUDA graph (and is used again) takes the current stream's
    apart = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with apart:
        return tuple(x.to(device, torch.int32) for x in (buckets, buckets.flip(0), run_starts))
