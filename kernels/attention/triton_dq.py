"""Fused attention backward, the rows' side: delta, then dQ by a walk like the forward's; no atomics.

delta_kernel reduces gradient and output to one number a row. With P the probabilities (recomputed from the forward's
log-sums), K the kept ones, c = 1 / (1 - dropout_p), and dO the upstream gradient: dP = c K (dO V^T);
delta_i = dO_i . O_i; dS = P (dP - delta); dQ = scale dS K.

Source: Dao, arXiv 2307.08691, algorithm 2, with dQ in a pass of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antlm_fast.kernels.attention.triton_relative import first_sums, less_next, relative_scores, term_rows
from antlm_fast.kernels.attention.triton_visibility import (
    kept_keys,
    load_rows,
    offset,
    row_limit,
    sequence_rows,
    zero_slack,
)


@triton.jit(do_not_specialize=["heads", "total_q"], do_not_specialize_on_alignment=["delta_ptr"])
def delta_kernel(
    out_ptr,  # (total_q, heads, HEAD_DIM), contiguous
    d_out_ptr,  # as out
    delta_ptr,  # float32 (heads, total_q)
    heads,
    total_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % heads
    rows = program // heads * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < total_q)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * (heads * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    out = tl.load(out_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * total_q + rows, tl.sum(out * d_out, 1), mask=rows < total_q)


@triton.jit
def _walk_keys(
    dq,
    runs,
    q,
    d_out,
    log2_sums,
    delta,
    k_ptrs,
    v_ptrs,
    stride_kt,
    stride_vt,
    limits,
    first_col,
    stop_col,
    len_k,
    scale_log2,
    seed,
    packed_rows,
    head,
    drop_below,
    inverse_keep,
    positions,
    run_starts,
    c2p_ptrs,
    p2c_ptr,
    buckets_ptr,
    start_k,
    total_k,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dS K of the key tiles [first_col, stop_col) added to dq, sums of dS over buckets to runs."""
    tile_cols = tl.arange(0, BLOCK_N)
    for col in tl.range(first_col, stop_col, BLOCK_N):
        cols = col + tile_cols
        k = load_rows(k_ptrs + offset(col, stride_kt, WIDE), cols, len_k, HEAD_DIM, BLOCK_D, MASKED)
        v = load_rows(v_ptrs + offset(col, stride_vt, WIDE), cols, len_k, HEAD_DIM, BLOCK_D, MASKED)
        if buckets_ptr is not None:
            p2c_ptrs = p2c_ptr
            if p2c_ptr is not None:
                p2c_ptrs = term_rows(p2c_ptr, head, total_k, start_k, cols[None, :], len_k, TABLE_ROWS, MASKED, WIDE)
            terms = relative_scores(c2p_ptrs, p2c_ptrs, buckets_ptr, cols[None, :] - positions[:, None])
            scores = tl.dot(q, tl.trans(k), terms, input_precision=PRECISION)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - log2_sums[:, None])
        if MASKED:
            p = tl.where(cols[None, :] < limits[:, None], p, 0.0)
        dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = kept_keys(seed, packed_rows, col, head, drop_below, BLOCK_N, False)
            dp = tl.where(kept, dp * inverse_keep, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if run_starts is not None:
            # the keys at least run_starts[b] away: those of bucket b and beyond
            runs += first_sums(ds, (positions + 1 - col)[:, None] - run_starts[None, :], k.dtype, PRECISION)
    return dq, runs


@triton.jit(
    do_not_specialize=[
        "stride_prefix", "drop_below", "num_seqs", "heads", "group", "total_q", "total_k", "max_seqlen_q", "reach"
    ],
    do_not_specialize_on_alignment=[
        "log2_sums_ptr", "delta_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "prefix_len_ptr", "dropout_seed_ptr",
        "buckets_ptr", "run_starts_ptr",
    ],
)  # fmt: skip
def dq_kernel(
    q_ptr,  # (total_q, heads, HEAD_DIM), strides (stride_qt, stride_qh, 1)
    k_ptr,  # (total_k, heads / group, HEAD_DIM)
    v_ptr,
    d_out_ptr,  # (total_q, heads, HEAD_DIM), contiguous
    log2_sums_ptr,  # float32 (heads, total_q), of the forward
    delta_ptr,  # float32 (heads, total_q)
    dq_ptr,  # (total_q, heads, HEAD_DIM), contiguous
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    prefix_len_ptr,
    dropout_seed_ptr,
    c2p_ptr,  # (heads, total_q, TABLE_ROWS), or None: triton_relative
    p2c_ptr,  # (heads, total_k, TABLE_ROWS), or None
    buckets_ptr,  # (2 * reach + 1,): the terms' column for each (key - query) from -reach on; None without terms
    run_starts_ptr,  # int32 (TABLE_ROWS,): the smallest distance of each column; None without terms
    dc2p_ptr,  # as c2p
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_prefix,
    softmax_scale,
    scale_log2,  # softmax_scale * log2(e)
    drop_below,
    inverse_keep,  # 1 / (1 - dropout_p)
    num_seqs,
    heads,
    group,
    total_q,
    total_k,
    max_seqlen_q,
    reach,  # no two tokens' distance is larger, those of a tile past the ends included; None without terms
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    # One program for each (sequence, head, tile of rows), as in the forward.
    num_tiles = tl.maximum(tl.cdiv(max_seqlen_q, BLOCK_M), 1)
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    head = program // num_tiles % heads
    seq = program // num_tiles // heads
    start_q, len_q = sequence_rows(cu_seqlens_q_ptr, seq, num_seqs)
    start_k, len_k = sequence_rows(cu_seqlens_k_ptr, seq, num_seqs)
    prefix_len = tl.load(prefix_len_ptr + seq * stride_prefix, mask=seq < num_seqs, other=0)

    # Where the two loops end.
    top = tile * BLOCK_M
    rows = top + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    stop_col = row_limit(tl.minimum(top + BLOCK_M, len_q) - 1, len_q, len_k, prefix_len)
    stop_col = tl.where(top < len_q, stop_col, 0)
    stop_unmasked = tl.minimum(row_limit(top, len_q, len_k, prefix_len), stop_col) // BLOCK_N * BLOCK_N
    limits = row_limit(rows, len_q, len_k, prefix_len)

    # Pointers; the offset of a row may pass 2**31.
    kv_head = (head // group).to(tl.int64)
    packed_rows = start_q + rows
    inside = (rows < len_q)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + head.to(tl.int64) * stride_qh + packed_rows.to(tl.int64)[:, None] * stride_qt + dims[None, :]
    row_offsets = packed_rows.to(tl.int64)[:, None] * (heads * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    k_ptr += start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_ptr += start_k.to(tl.int64) * stride_vt + kv_head * stride_vh
    tile_cols = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + offset(tile_cols, stride_kt, WIDE)[:, None] + dims[None, :]
    v_ptrs = v_ptr + offset(tile_cols, stride_vt, WIDE)[:, None] + dims[None, :]
    sums_offsets = head.to(tl.int64) * total_q + packed_rows
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    d_out = tl.load(d_out_ptr + row_offsets, mask=inside, other=0.0)
    log2_sums = tl.load(log2_sums_ptr + sums_offsets, mask=rows < len_q, other=float("inf"))
    delta = tl.load(delta_ptr + sums_offsets, mask=rows < len_q, other=0.0)
    seed = tl.load(dropout_seed_ptr) if DROPOUT else 0

    # Relative positions.
    positions = rows + len_k - len_q
    if buckets_ptr is not None:
        buckets_ptr += reach
    c2p_ptrs = c2p_ptr
    run_starts = None
    runs = tl.zeros([1], tl.float32)  # stands for no sums: the walk hands it back, and the compiler drops it
    if c2p_ptr is not None:
        c2p_ptrs = term_rows(c2p_ptr, head, total_q, start_q, rows[:, None], len_q, TABLE_ROWS, True, WIDE)
        buckets = tl.arange(0, TABLE_ROWS)
        run_starts = tl.load(run_starts_ptr + buckets)
        runs = tl.zeros([BLOCK_M, TABLE_ROWS], tl.float32)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq, runs = _walk_keys(
        dq, runs, q, d_out, log2_sums, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, limits, 0, stop_unmasked, len_k,
        scale_log2, seed, packed_rows, head, drop_below, inverse_keep,
        positions, run_starts, c2p_ptrs, p2c_ptr, buckets_ptr, start_k, total_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, False, TABLE_ROWS, DROPOUT, PRECISION, WIDE,
    )  # fmt: skip
    dq, runs = _walk_keys(
        dq, runs, q, d_out, log2_sums, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, limits, stop_unmasked, stop_col,
        len_k, scale_log2, seed, packed_rows, head, drop_below, inverse_keep,
        positions, run_starts, c2p_ptrs, p2c_ptr, buckets_ptr, start_k, total_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, TABLE_ROWS, DROPOUT, PRECISION, WIDE,
    )  # fmt: skip

    tl.store(dq_ptr + row_offsets, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=inside)
    first_slack = tl.where(seq == num_seqs, start_q + top, total_q)
    zero_slack(
        dq_ptr + head * HEAD_DIM, first_slack, total_q, num_tiles * BLOCK_M, heads * HEAD_DIM,
        HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    if c2p_ptr is not None:
        dc2p_ptr += head.to(tl.int64) * total_q * TABLE_ROWS
        dc2p = (less_next(runs, TABLE_ROWS) * softmax_scale).to(dc2p_ptr.dtype.element_ty)
        dc2p_ptrs = dc2p_ptr + packed_rows.to(tl.int64)[:, None] * TABLE_ROWS + buckets[None, :]
        tl.store(dc2p_ptrs, dc2p, mask=(rows < len_q)[:, None])
        zero_slack(
            dc2p_ptr, first_slack, total_q, num_tiles * BLOCK_M, TABLE_ROWS, TABLE_ROWS, TABLE_ROWS, BLOCK_M,
        )  # fmt: skip
