"""Fused attention forward: one tile of query rows walks over the keys it may see, scores never leave the chip.

The walk has two loops. All rows of a tile see the keys before the first row's limit, so the first loop needs no mask;
the second goes on to the last row's limit and compares. Where the limits lie is data (triton_visibility.row_limit).

Source: Dao, arXiv 2307.08691, algorithm 1; Rabe and Staats, arXiv 2112.05682, for the running softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from antlm_fast.kernels.attention.triton_relative import relative_scores, term_rows
from antlm_fast.kernels.attention.triton_visibility import (
    kept_keys,
    load_rows,
    offset,
    row_limit,
    sequence_rows,
    zero_slack,
)


@triton.jit
def _attend(
    acc,
    running_max,
    running_sum,
    q,
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
    positions,
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
    """Key tiles [first_col, stop_col) added to the running softmax; scores are in powers of two."""
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
        if MASKED:
            scores = tl.where(cols[None, :] < limits[:, None], scores * scale_log2, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, 1))
            # a row that has seen no key yet has no maximum: -inf - -inf would be NaN
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores - safe_max[:, None])
            alpha = tl.exp2(running_max - safe_max)
        else:
            new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)
            p = tl.exp2(scores * scale_log2 - new_max[:, None])
            alpha = tl.exp2(running_max - new_max)
        running_sum = running_sum * alpha + tl.sum(p, 1)
        running_max = new_max
        if DROPOUT:
            p = tl.where(kept_keys(seed, packed_rows, col, head, drop_below, BLOCK_N, False), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, running_max, running_sum


@triton.jit(
    do_not_specialize=[
        "stride_prefix", "drop_below", "num_seqs", "heads", "group", "total_q", "total_k", "max_seqlen_q", "reach"
    ],
    do_not_specialize_on_alignment=[
        "log2_sums_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "prefix_len_ptr", "dropout_seed_ptr",
        "buckets_ptr",
    ],
)  # fmt: skip
def forward_kernel(
    q_ptr,  # (total_q, heads, HEAD_DIM), strides (stride_qt, stride_qh, 1)
    k_ptr,  # (total_k, heads / group, HEAD_DIM)
    v_ptr,
    out_ptr,  # (total_q, heads, HEAD_DIM), contiguous
    log2_sums_ptr,  # float32 (heads, total_q): log2 of the softmax's denominator; +inf where a row sees no key
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    prefix_len_ptr,
    dropout_seed_ptr,
    c2p_ptr,  # (heads, total_q, TABLE_ROWS), or None: triton_relative
    p2c_ptr,  # (heads, total_k, TABLE_ROWS), or None
    buckets_ptr,  # (2 * reach + 1,): the terms' column for each (key - query) from -reach on; None without terms
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_prefix,
    scale_log2,  # softmax_scale * log2(e), at least 0
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
    # One program for each (sequence, head, tile of rows); causal tiles that see most keys start first.
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
    q_ptr += start_q.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    k_ptr += start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_ptr += start_k.to(tl.int64) * stride_vt + kv_head * stride_vh
    inside = (rows < len_q)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * stride_qt + dims[None, :], mask=inside, other=0.0)
    tile_cols = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + offset(tile_cols, stride_kt, WIDE)[:, None] + dims[None, :]
    v_ptrs = v_ptr + offset(tile_cols, stride_vt, WIDE)[:, None] + dims[None, :]
    seed = tl.load(dropout_seed_ptr) if DROPOUT else 0
    packed_rows = start_q + rows
    positions = rows + len_k - len_q
    if buckets_ptr is not None:
        buckets_ptr += reach
    c2p_ptrs = c2p_ptr
    if c2p_ptr is not None:
        c2p_ptrs = term_rows(c2p_ptr, head, total_q, start_q, rows[:, None], len_q, TABLE_ROWS, True, WIDE)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, running_max, running_sum = _attend(
        acc, running_max, running_sum, q, k_ptrs, v_ptrs, stride_kt, stride_vt, limits, 0, stop_unmasked, len_k,
        scale_log2, seed, packed_rows, head, drop_below,
        positions, c2p_ptrs, p2c_ptr, buckets_ptr, start_k, total_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, False, TABLE_ROWS, DROPOUT, PRECISION, WIDE,
    )  # fmt: skip
    acc, running_max, running_sum = _attend(
        acc, running_max, running_sum, q, k_ptrs, v_ptrs, stride_kt, stride_vt, limits, stop_unmasked, stop_col, len_k,
        scale_log2, seed, packed_rows, head, drop_below,
        positions, c2p_ptrs, p2c_ptr, buckets_ptr, start_k, total_k,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, TABLE_ROWS, DROPOUT, PRECISION, WIDE,
    )  # fmt: skip

    # A row that saw no key gives 0 (a NaN among its inputs stays a NaN).
    saw_none = running_sum == 0.0
    inverse_sum = tl.where(saw_none, 0.0, 1.0 / running_sum)
    if DROPOUT:
        inverse_sum *= inverse_keep
    log2_sum = tl.where(saw_none, float("inf"), running_max + tl.log2(running_sum))
    out_ptr += head * HEAD_DIM
    log2_sums_ptr += head.to(tl.int64) * total_q
    out_ptrs = out_ptr + packed_rows.to(tl.int64)[:, None] * (heads * HEAD_DIM) + dims[None, :]
    tl.store(out_ptrs, (acc * inverse_sum[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(log2_sums_ptr + packed_rows, log2_sum, mask=rows < len_q)

    # Slack rows, past the last sequence, are written too; the programs of sequence num_seqs share them.
    first_slack = tl.where(seq == num_seqs, start_q + top, total_q)
    step = num_tiles * BLOCK_M
    zero_slack(out_ptr, first_slack, total_q, step, heads * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_M)
    for slack in tl.range(first_slack, total_q, step):
        slack_rows = slack + tl.arange(0, BLOCK_M)
        nothing = tl.full([BLOCK_M], float("inf"), tl.float32)
        tl.store(log2_sums_ptr + slack_rows, nothing, mask=slack_rows < total_q)
