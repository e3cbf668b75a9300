"""Fused attention backward, the keys' side: dK and dV; no atomics, every sum in a fixed order.

dkdv_kernel holds a tile of keys and walks over the query rows that see it, for every query head of its group: first the
rows that see a part of the tile (and the sequence's last, partial tile), with a mask, then those that see all of it,
without one. With the names of triton_dq: dV = c (K P)^T dO; dK = scale dS^T Q.

Source: Dao, arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antlm_fast.kernels.attention.triton_relative import first_sums, less_next, relative_scores, term_rows
from antlm_fast.kernels.attention.triton_visibility import (
    first_row,
    kept_keys,
    load_rows,
    offset,
    sequence_rows,
    zero_slack,
)


@triton.jit
def _walk_rows(
    dk,
    dv,
    runs,
    k,
    v,
    q_ptr,
    d_out_ptr,
    log2_sums_ptr,
    delta_ptr,
    stride_qt,
    stride_ot,
    left,
    first_rows,
    first_tile,
    num_tiles,
    last_tile,
    len_q,
    scale_log2,
    seed,
    start_q,
    head,
    drop_below,
    inverse_keep,
    len_k,
    run_starts,
    c2p_ptr,
    p2c_ptrs,
    buckets_ptr,
    total_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """num_tiles row tiles from first_tile on, the last one last_tile, added to dk and dv; scores are keys x rows."""
    dims = tl.arange(0, BLOCK_D)
    tile_rows = tl.arange(0, BLOCK_M)
    cols = left + tl.arange(0, BLOCK_N)
    q_ptrs = q_ptr + offset(tile_rows, stride_qt, WIDE)[:, None] + dims[None, :]
    d_out_ptrs = d_out_ptr + offset(tile_rows, stride_ot, WIDE)[:, None] + dims[None, :]
    for index in tl.range(0, num_tiles):
        top = (first_tile + index) * BLOCK_M
        if MASKED:
            top = tl.where(index == num_tiles - 1, last_tile * BLOCK_M, top)
        rows = top + tile_rows
        q = load_rows(q_ptrs + offset(top, stride_qt, WIDE), rows, len_q, HEAD_DIM, BLOCK_D, MASKED)
        d_out = load_rows(d_out_ptrs + offset(top, stride_ot, WIDE), rows, len_q, HEAD_DIM, BLOCK_D, MASKED)
        if MASKED:
            log2_sums = tl.load(log2_sums_ptr + rows, mask=rows < len_q, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=rows < len_q, other=0.0)
        else:
            log2_sums, delta = tl.load(log2_sums_ptr + rows), tl.load(delta_ptr + rows)
        if buckets_ptr is not None:
            c2p_ptrs = c2p_ptr
            if c2p_ptr is not None:
                c2p_ptrs = term_rows(c2p_ptr, head, total_q, start_q, rows[None, :], len_q, TABLE_ROWS, MASKED, WIDE)
            terms = relative_scores(c2p_ptrs, p2c_ptrs, buckets_ptr, (rows + len_k - len_q)[None, :] - cols[:, None])
            scores = tl.dot(k, tl.trans(q), terms, input_precision=PRECISION)
        else:
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - log2_sums[None, :])
        if MASKED:
            p = tl.where(first_rows[:, None] <= rows[None, :], p, 0.0)  # rows past the end have a sum of +inf: p = 0
        dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        if DROPOUT:
            kept = kept_keys(seed, start_q + rows, left, head, drop_below, BLOCK_N, True)
            # a number, not a truth value: it goes to two products, and AMD's compiler moves no single bits
            weight = tl.where(kept, inverse_keep, 0.0)
            dv = tl.dot((p * weight).to(d_out.dtype), d_out, dv, input_precision=PRECISION)
            dp *= weight
        else:
            dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if run_starts is not None:
            # the rows less than run_starts[b] away: those of the buckets before b
            runs += first_sums(ds, (cols - len_k + len_q - top)[:, None] + run_starts[None, :], q.dtype, PRECISION)
    return dk, dv, runs


# one key head for each query head is a binary of its own (Triton specialises the group's size 1): no loop, no spills
@triton.jit(
    do_not_specialize=[
        "stride_prefix", "drop_below", "num_seqs", "heads", "total_q", "total_k", "max_seqlen_k", "reach"
    ],
    do_not_specialize_on_alignment=[
        "log2_sums_ptr", "delta_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "prefix_len_ptr", "dropout_seed_ptr",
        "buckets_ptr", "run_starts_ptr",
    ],
)  # fmt: skip
def dkdv_kernel(
    q_ptr,  # (total_q, heads, HEAD_DIM), strides (stride_qt, stride_qh, 1)
    k_ptr,  # (total_k, heads / group, HEAD_DIM)
    v_ptr,
    d_out_ptr,  # (total_q, heads, HEAD_DIM), contiguous
    log2_sums_ptr,  # float32 (heads, total_q), of the forward
    delta_ptr,  # float32 (heads, total_q)
    dk_ptr,  # (total_k, heads / group, HEAD_DIM), contiguous
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    prefix_len_ptr,
    dropout_seed_ptr,
    c2p_ptr,  # (heads, total_q, TABLE_ROWS), or None: triton_relative
    p2c_ptr,  # (heads, total_k, TABLE_ROWS), or None
    buckets_ptr,  # (2 * reach + 1,): the terms' column for each (query - key) from -reach on; None without terms
    run_starts_ptr,  # int32 (TABLE_ROWS,): the smallest distance of each column; None without terms
    dp2c_ptr,  # as p2c
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
    max_seqlen_k,
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
    # One program for each (sequence, key head, tile of keys); causal tiles that most rows see start first.
    num_tiles = tl.maximum(tl.cdiv(max_seqlen_k, BLOCK_N), 1)
    kv_heads = heads // group
    program = tl.program_id(0)
    left = program % num_tiles * BLOCK_N
    kv_head = program // num_tiles % kv_heads
    seq = program // num_tiles // kv_heads
    start_q, len_q = sequence_rows(cu_seqlens_q_ptr, seq, num_seqs)
    start_k, len_k = sequence_rows(cu_seqlens_k_ptr, seq, num_seqs)
    prefix_len = tl.load(prefix_len_ptr + seq * stride_prefix, mask=seq < num_seqs, other=0)

    # Row tiles that see a part of these keys, then (from all_see on) those that see them all. The last tile of a
    # sequence may be partial: it goes with the masked ones.
    last_col = tl.minimum(left + BLOCK_N, len_k) - 1
    first_masked = first_row(left, len_q, len_k, prefix_len) // BLOCK_M
    all_see = tl.cdiv(first_row(last_col, len_q, len_k, prefix_len), BLOCK_M)
    whole_tiles = len_q // BLOCK_M
    has_tail = (len_q % BLOCK_M != 0) & (all_see <= whole_tiles)
    last_tile = tl.where(has_tail, whole_tiles, all_see - 1)
    num_masked = all_see - first_masked + tl.where(has_tail, 1, 0)
    num_whole = tl.maximum(whole_tiles - all_see, 0)
    # nothing to do past the sequence's last key
    num_masked = tl.where(left < len_k, num_masked, 0)
    num_whole = tl.where(left < len_k, num_whole, 0)

    # Pointers; the offset of a row may pass 2**31.
    cols = left + tl.arange(0, BLOCK_N)
    first_rows = first_row(cols, len_q, len_k, prefix_len)
    dims = tl.arange(0, BLOCK_D)
    packed_cols = (start_k + cols).to(tl.int64)[:, None]
    inside = (cols < len_k)[:, None] & (dims < HEAD_DIM)[None, :]
    k_ptrs = k_ptr + kv_head.to(tl.int64) * stride_kh + packed_cols * stride_kt + dims[None, :]
    v_ptrs = v_ptr + kv_head.to(tl.int64) * stride_vh + packed_cols * stride_vt + dims[None, :]
    k = tl.load(k_ptrs, mask=inside, other=0.0)
    v = tl.load(v_ptrs, mask=inside, other=0.0)
    stride_ot = heads * HEAD_DIM
    q_ptr += start_q.to(tl.int64) * stride_qt
    d_out_ptr += start_q.to(tl.int64) * stride_ot
    log2_sums_ptr += start_q
    delta_ptr += start_q
    seed = tl.load(dropout_seed_ptr) if DROPOUT else 0

    # Relative positions, of one query head for each key head.
    if buckets_ptr is not None:
        buckets_ptr += reach
    p2c_ptrs = p2c_ptr
    run_starts = None
    runs = tl.zeros([1], tl.float32)  # stands for no sums: the walk hands it back, and the compiler drops it
    if p2c_ptr is not None:
        p2c_ptrs = term_rows(p2c_ptr, kv_head, total_k, start_k, cols[:, None], len_k, TABLE_ROWS, True, WIDE)
        buckets = tl.arange(0, TABLE_ROWS)
        run_starts = tl.load(run_starts_ptr + buckets)
        runs = tl.zeros([BLOCK_N, TABLE_ROWS], tl.float32)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        q_head_ptr = q_ptr + head.to(tl.int64) * stride_qh
        d_out_head_ptr = d_out_ptr + head * HEAD_DIM
        sums_ptr = log2_sums_ptr + head.to(tl.int64) * total_q
        deltas_ptr = delta_ptr + head.to(tl.int64) * total_q
        dk, dv, runs = _walk_rows(
            dk, dv, runs, k, v, q_head_ptr, d_out_head_ptr, sums_ptr, deltas_ptr, stride_qt, stride_ot, left,
            first_rows, first_masked, num_masked, last_tile, len_q, scale_log2, seed, start_q, head,
            drop_below, inverse_keep, len_k, run_starts, c2p_ptr, p2c_ptrs, buckets_ptr, total_q,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, TABLE_ROWS, DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
        dk, dv, runs = _walk_rows(
            dk, dv, runs, k, v, q_head_ptr, d_out_head_ptr, sums_ptr, deltas_ptr, stride_qt, stride_ot, left,
            first_rows, all_see, num_whole, last_tile, len_q, scale_log2, seed, start_q, head,
            drop_below, inverse_keep, len_k, run_starts, c2p_ptr, p2c_ptrs, buckets_ptr, total_q,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, TABLE_ROWS, DROPOUT, PRECISION, WIDE,
        )  # fmt: skip

    out_offsets = packed_cols * (kv_heads * HEAD_DIM) + kv_head * HEAD_DIM + dims[None, :]
    tl.store(dk_ptr + out_offsets, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out_offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    first_slack = tl.where(seq == num_seqs, start_k + left, total_k)
    zero_slack(
        dk_ptr + kv_head * HEAD_DIM, first_slack, total_k, num_tiles * BLOCK_N, kv_heads * HEAD_DIM,
        HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    zero_slack(
        dv_ptr + kv_head * HEAD_DIM, first_slack, total_k, num_tiles * BLOCK_N, kv_heads * HEAD_DIM,
        HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if p2c_ptr is not None:
        dp2c_ptr += kv_head.to(tl.int64) * total_k * TABLE_ROWS
        dp2c = (less_next(runs, TABLE_ROWS) * -softmax_scale).to(dp2c_ptr.dtype.element_ty)
        tl.store(dp2c_ptr + packed_cols * TABLE_ROWS + buckets[None, :], dp2c, mask=(cols < len_k)[:, None])
        zero_slack(
            dp2c_ptr, first_slack, total_k, num_tiles * BLOCK_N, TABLE_ROWS, TABLE_ROWS, TABLE_ROWS, BLOCK_N,
        )  # fmt: skip
