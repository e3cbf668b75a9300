"""Who sees whom, where it lies, what is dropped: the Triton functions that every attention kernel shares.

Visibility is data. A sequence's prefix_len is read from device memory and turned into loop bounds, so one compiled
kernel serves causal, bidirectional and prefix-LM sequences, and a batch that mixes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)  # of Philox: those of kernels/philox.py


@triton.jit
def sequence_rows(cu_seqlens_ptr, seq, num_seqs):
    """First packed row of a sequence, and its length. Sequence num_seqs stands for the slack: it has no length."""
    start = tl.load(cu_seqlens_ptr + seq)
    stop = tl.load(cu_seqlens_ptr + seq + 1, mask=seq < num_seqs, other=0)
    return start, tl.where(seq < num_seqs, stop - start, 0)


@triton.jit
def row_limit(rows, len_q, len_k, prefix_len):
    """Query row i sees the keys [0, row_limit(i)), which never shrink as i grows; causal is aligned bottom right."""
    return tl.minimum(tl.maximum(tl.maximum(rows + 1 + len_k - len_q, prefix_len), 0), len_k)


@triton.jit
def first_row(col, len_q, len_k, prefix_len):
    """The first query row that sees key `col`, len_q if none does: row_limit read the other way round."""
    causal = tl.minimum(tl.maximum(col + len_q - len_k, 0), len_q)
    return tl.where(col < prefix_len, 0, causal)


@triton.jit
def offset(index, stride, WIDE: tl.constexpr):
    """Where a row of a sequence lies, from the sequence's start: 32 bits where the host knows that they are enough."""
    return tl.cast(index, tl.int64 if WIDE else tl.int32) * stride


@triton.jit
def load_rows(ptrs, rows, stop, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """A tile of rows; the padding's columns are 0, and so, if MASKED, are the rows from `stop` on."""
    dims = tl.arange(0, BLOCK_D)
    if MASKED:
        tile = tl.load(ptrs, mask=(rows < stop)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def kept_keys(seed, packed_rows, first_col, head, drop_below, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The dropout mask of kernels/philox.py for the keys [first_col, first_col + BLOCK_N), a multiple of 4 each.

    (rows, keys), or (keys, rows) if KEYS_FIRST. drop_below is the integer threshold moved down by 2**31, since Triton's
    integer arguments are signed. One counter gives the words of four neighbouring keys.
    """
    groups = first_col // 4 + tl.arange(0, BLOCK_N // 4)
    if KEYS_FIRST:
        w0, w1, w2, w3 = tl.philox(seed, groups[:, None], packed_rows[None, :], head, 0, ROUNDS)
    else:
        w0, w1, w2, w3 = tl.philox(seed, groups[None, :], packed_rows[:, None], head, 0, ROUNDS)
    k0, k1 = _is_kept(w0, drop_below), _is_kept(w1, drop_below)
    k2, k3 = _is_kept(w2, drop_below), _is_kept(w3, drop_below)
    four = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # (.., .., 2, 2), its last two axes in the order of the words
    if KEYS_FIRST:
        kept = four.permute(0, 2, 3, 1).reshape(BLOCK_N, packed_rows.shape[0])
    else:
        kept = four.reshape(packed_rows.shape[0], BLOCK_N)
    return kept != 0


@triton.jit
def _is_kept(word, drop_below):
    return ((word ^ 0x80000000).to(tl.int32, bitcast=True) >= drop_below).to(tl.int8)


@triton.jit
def zero_slack(ptr, first, stop, step, stride_t, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the packed rows first + n * step + [0, BLOCK) below stop; no rows at all unless first < stop."""
    dims = tl.arange(0, BLOCK_D)
    for slack in tl.range(first, stop, step):
        rows = slack + tl.arange(0, BLOCK)
        inside = (rows < stop)[:, None] & (dims < HEAD_DIM)[None, :]
        zeros = tl.zeros([BLOCK, BLOCK_D], ptr.dtype.element_ty)
        tl.store(ptr + rows.to(tl.int64)[:, None] * stride_t + dims[None, :], zeros, mask=inside)
