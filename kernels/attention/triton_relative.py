"""Relative positions in the attention kernels: two more terms of a score, and their gradients.

A score may hold c2p[i, b] and p2c[j, b] beside q_i . k_j, with b the bucket of the distance from key j to query i. The
terms are products with the relative tables (c2p = q k_rel^T, p2c = k q_rel^T), one row of TABLE_ROWS numbers for each
query and each key; the kernels look numbers of them up. Where a call has neither term, nothing of this is compiled.
A term that is not there is None, which a jitted function may take but not return: Triton below 3.7 cannot compile that.

The bucket never decreases with the distance. So along a tile's axis the pairs of a bucket lie side by side, and a sum
over a bucket is the difference of two running sums: no atomics, one order, and a bucket without a distance gets 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antlm_fast.kernels.attention.triton_visibility import offset


@triton.jit
def term_rows(
    ptr, head, total, start, rows, length, TABLE_ROWS: tl.constexpr, CLAMPED: tl.constexpr, WIDE: tl.constexpr
):
    """Pointers to the rows of a term (heads, total, TABLE_ROWS), which must be there.

    CLAMPED: a row past the sequence's end is read as its last one. Nothing may come of it, but it must be there.
    """
    if CLAMPED:
        rows = tl.maximum(tl.minimum(rows, length - 1), 0)
    return ptr + (head.to(tl.int64) * total + start) * TABLE_ROWS + offset(rows, TABLE_ROWS, WIDE)


@triton.jit
def relative_scores(c2p_ptrs, p2c_ptrs, buckets_ptr, distances):
    """The relative terms of pairs, float32; c2p_ptrs and p2c_ptrs (term_rows) are shaped to meet the distances.

    Distances are from axis 0 to axis 1, and buckets_ptr a table of such: where they grow along the inner axis and their
    buckets are as wide as the terms' numbers, the compiler gives all three loads one layout, and moves no pointers.
    """
    buckets = tl.load(buckets_ptr + distances).to(tl.int32)
    if c2p_ptrs is None:
        terms = tl.load(p2c_ptrs + buckets).to(tl.float32)
    else:
        terms = tl.load(c2p_ptrs + buckets).to(tl.float32)
        if p2c_ptrs is not None:
            terms += tl.load(p2c_ptrs + buckets).to(tl.float32)
    return terms


@triton.jit
def first_sums(values, counts, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Of each row the sum of its first `counts` values, none where that is below 1, at most all: of counts' shape.

    The running sums are a product with a triangle of ones where matrix units make it (their factors' dtype is DTYPE).
    """
    LENGTH: tl.constexpr = values.shape[1]
    if DTYPE.primitive_bitwidth == 32 and PRECISION == "ieee":
        sums = tl.cumsum(values, 1)
    else:
        at = tl.arange(0, LENGTH)
        sums = tl.dot(values.to(DTYPE), (at[:, None] <= at[None, :]).to(DTYPE), input_precision=PRECISION)
    last = tl.minimum(tl.maximum(counts, 1), LENGTH) - 1
    return tl.where(counts > 0, tl.gather(sums, last, 1), 0.0)


@triton.jit
def less_next(sums, TABLE_ROWS: tl.constexpr):
    """Each column less the one after it; of the last, 0."""
    after = tl.minimum(tl.arange(0, TABLE_ROWS) + 1, TABLE_ROWS - 1)
    after = tl.broadcast_to(after[None, :], sums.shape)
    return sums - tl.gather(sums, after, 1)
