"""FlashAttention-2 in its plainest Triton form: dense, causal or not as a constexpr, and nothing else.

The yardstick for the instructions, registers and spills of the package's attention, whose mask is data. It has none of
what that one offers (packed sequences, grouped heads, dropout, head_dim padding, lengths that fill no tile), so what
those cost shows. Tensors are (batch, seqlen, heads, head_dim) with the same strides; lse and delta are
(batch, heads, seqlen) fp32, lse in natural units, delta the row sums of out * grad_out. seqlen is a multiple of both
tile sides and head_dim a power of two.

The masked loop's number of turns is known, so the compiler often unrolls it: the tightest form. With KEEP_LOOP its end
is a minimum with seqlen, which changes no result and keeps it a loop that can be counted beside another's.

Source: Dao, FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2; the backward in two kernels without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def plain_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_token,
    stride_head,
    seqlen,
    num_heads,
    softmax_scale,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEEP_LOOP: tl.constexpr = False,
):
    """Outputs and lse of BLOCK_M queries; grid (seqlen / BLOCK_M, batch * heads)."""
    tl.static_assert(not CAUSAL or BLOCK_M % BLOCK_N == 0)
    first_row = tl.program_id(0) * BLOCK_M
    batch_head = tl.program_id(1)
    base = _base(batch_head, stride_token, stride_head, seqlen, num_heads)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    cols = tl.arange(0, BLOCK_N)
    row_offsets = rows[:, None] * stride_token + dims[None, :]
    q = tl.load(q_ptr + base + row_offsets)
    k_ptrs = k_ptr + base + cols[:, None] * stride_token + dims[None, :]
    v_ptrs = v_ptr + base + cols[:, None] * stride_token + dims[None, :]
    scale = softmax_scale * _LOG2E
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    # tiles that every row sees whole
    unmasked_end = first_row if CAUSAL else seqlen
    acc, running_sum, running_max, k_ptrs, v_ptrs = _forward_keys(
        acc, running_sum, running_max, q, k_ptrs, v_ptrs, stride_token, scale, rows, 0, unmasked_end, False, BLOCK_N
    )
    # tiles on the diagonal
    if CAUSAL:
        end = first_row + BLOCK_M
        if KEEP_LOOP:
            end = tl.minimum(end, seqlen)
        acc, running_sum, running_max, k_ptrs, v_ptrs = _forward_keys(
            acc,
            running_sum,
            running_max,
            q,
            k_ptrs,
            v_ptrs,
            stride_token,
            scale,
            rows,
            first_row,
            end,
            True,
            BLOCK_N,
        )
    acc = acc / running_sum[:, None]
    tl.store(out_ptr + base + row_offsets, acc.to(out_ptr.dtype.element_ty))
    lse = (running_max + tl.log2(running_sum)) / _LOG2E
    tl.store(lse_ptr + batch_head.to(tl.int64) * seqlen + rows, lse)


@triton.jit
def _forward_keys(
    acc,
    running_sum,
    running_max,
    q,
    k_ptrs,
    v_ptrs,
    stride_token,
    scale,
    rows,
    begin,
    end,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    for start in range(begin, end, BLOCK_N):
        k = tl.load(k_ptrs)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = rows[:, None] >= start + tl.arange(0, BLOCK_N)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_max[:, None])
        correction = tl.exp2(running_max - new_max)
        running_sum = running_sum * correction + tl.sum(p, 1)
        running_max = new_max
        v = tl.load(v_ptrs)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        k_ptrs += BLOCK_N * stride_token
        v_ptrs += BLOCK_N * stride_token
    return acc, running_sum, running_max, k_ptrs, v_ptrs


@triton.jit
def plain_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    stride_token,
    stride_head,
    seqlen,
    num_heads,
    softmax_scale,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEEP_LOOP: tl.constexpr = False,
):
    """Gradient of BLOCK_M queries; grid (seqlen / BLOCK_M, batch * heads)."""
    tl.static_assert(not CAUSAL or BLOCK_M % BLOCK_N == 0)
    first_row = tl.program_id(0) * BLOCK_M
    batch_head = tl.program_id(1)
    base = _base(batch_head, stride_token, stride_head, seqlen, num_heads)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    cols = tl.arange(0, BLOCK_N)
    row_offsets = rows[:, None] * stride_token + dims[None, :]
    q = tl.load(q_ptr + base + row_offsets)
    grad_out = tl.load(grad_out_ptr + base + row_offsets)
    row_at = batch_head.to(tl.int64) * seqlen + rows
    lse = tl.load(lse_ptr + row_at) * _LOG2E
    delta = tl.load(delta_ptr + row_at)
    k_ptrs = k_ptr + base + cols[:, None] * stride_token + dims[None, :]
    v_ptrs = v_ptr + base + cols[:, None] * stride_token + dims[None, :]
    scale = softmax_scale * _LOG2E
    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    unmasked_end = first_row if CAUSAL else seqlen
    dq, k_ptrs, v_ptrs = _dq_keys(
        dq, q, grad_out, lse, delta, k_ptrs, v_ptrs, stride_token, scale, rows, 0, unmasked_end, False, BLOCK_N
    )
    if CAUSAL:
        end = first_row + BLOCK_M
        if KEEP_LOOP:
            end = tl.minimum(end, seqlen)
        dq, k_ptrs, v_ptrs = _dq_keys(
            dq,
            q,
            grad_out,
            lse,
            delta,
            k_ptrs,
            v_ptrs,
            stride_token,
            scale,
            rows,
            first_row,
            end,
            True,
            BLOCK_N,
        )
    tl.store(dq_ptr + base + row_offsets, (dq * softmax_scale).to(dq_ptr.dtype.element_ty))


@triton.jit
def _dq_keys(
    dq,
    q,
    grad_out,
    lse,
    delta,
    k_ptrs,
    v_ptrs,
    stride_token,
    scale,
    rows,
    begin,
    end,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    for start in range(begin, end, BLOCK_N):
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            visible = rows[:, None] >= start + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        k_ptrs += BLOCK_N * stride_token
        v_ptrs += BLOCK_N * stride_token
    return dq, k_ptrs, v_ptrs


@triton.jit
def plain_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_token,
    stride_head,
    seqlen,
    num_heads,
    softmax_scale,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEEP_LOOP: tl.constexpr = False,
):
    """Gradients of BLOCK_N keys and values; grid (seqlen / BLOCK_N, batch * heads)."""
    tl.static_assert(not CAUSAL or BLOCK_N % BLOCK_M == 0)
    first_col = tl.program_id(0) * BLOCK_N
    batch_head = tl.program_id(1)
    base = _base(batch_head, stride_token, stride_head, seqlen, num_heads)
    cols = first_col + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    col_offsets = cols[:, None] * stride_token + dims[None, :]
    k = tl.load(k_ptr + base + col_offsets)
    v = tl.load(v_ptr + base + col_offsets)
    begin = first_col if CAUSAL else 0
    rows = begin + tl.arange(0, BLOCK_M)
    q_ptrs = q_ptr + base + rows[:, None] * stride_token + dims[None, :]
    grad_out_ptrs = grad_out_ptr + base + rows[:, None] * stride_token + dims[None, :]
    row_at = batch_head.to(tl.int64) * seqlen
    lse_ptr += row_at
    delta_ptr += row_at
    scale = softmax_scale * _LOG2E
    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    if CAUSAL:
        end = begin + BLOCK_N
        if KEEP_LOOP:
            end = tl.minimum(end, seqlen)
        dk, dv, q_ptrs, grad_out_ptrs = _dkdv_queries(
            dk,
            dv,
            k,
            v,
            q_ptrs,
            grad_out_ptrs,
            lse_ptr,
            delta_ptr,
            stride_token,
            scale,
            cols,
            begin,
            end,
            True,
            BLOCK_M,
        )
        begin += BLOCK_N
    dk, dv, q_ptrs, grad_out_ptrs = _dkdv_queries(
        dk,
        dv,
        k,
        v,
        q_ptrs,
        grad_out_ptrs,
        lse_ptr,
        delta_ptr,
        stride_token,
        scale,
        cols,
        begin,
        seqlen,
        False,
        BLOCK_M,
    )
    tl.store(dk_ptr + base + col_offsets, (dk * softmax_scale).to(dk_ptr.dtype.element_ty))
    tl.store(dv_ptr + base + col_offsets, dv.to(dv_ptr.dtype.element_ty))


@triton.jit
def _dkdv_queries(
    dk,
    dv,
    k,
    v,
    q_ptrs,
    grad_out_ptrs,
    lse_ptr,
    delta_ptr,
    stride_token,
    scale,
    cols,
    begin,
    end,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = tl.load(q_ptrs)
        lse = tl.load(lse_ptr + rows) * _LOG2E
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M), as every tile below
        p = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)
        grad_out = tl.load(grad_out_ptrs)
        dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + rows)
        dp = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_ptrs += BLOCK_M * stride_token
        grad_out_ptrs += BLOCK_M * stride_token
    return dk, dv, q_ptrs, grad_out_ptrs


@triton.jit
def _base(batch_head, stride_token, stride_head, seqlen, num_heads):
    """Offset of one sequence's head, in int64 before it is multiplied."""
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)
    return batch * seqlen * stride_token + head * stride_head
