"""Linear cross-entropy's two kernels: what the loss needs of the logits, and the gradient by them.

Neither writes a logit to memory. The forward's programs share a tile of rows' vocabulary among them and each leaves a
maximum, a sum of exponentials and the target's logit, which are few enough to be put together afterwards; the
gradient's programs form their logits again, turn them into the gradient and round it once. No program waits for another
and no two write the same place, so results are the same bit for bit every time.

Source: Wijmans et al., arXiv 2411.09009, sections 4.2 and 4.3, without its locks and without its filter of gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(program, row_tiles, col_tiles, GROUP: tl.constexpr):
    """A program's (row tile, column tile): GROUP row tiles take the same columns before the next columns' turn.

    So what runs at one time reads few rows of hidden and few of the weight, and finds them in the L2 cache.
    """
    per_group = GROUP * col_tiles
    first = program // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def load_counted(counts_ptr, at, rows, num_rows, COUNTED: tl.constexpr):
    """Which rows of a tile there are, and count."""
    counted = rows < num_rows
    if COUNTED:
        counted &= tl.load(counts_ptr + at) != 0
    return counted


@triton.jit
def logits_tile(
    hidden_ptrs,  # (BLOCK_M,), the first number of each row
    weight_ptr,
    bias_ptr,
    stride_w,
    cols,
    vocab_size,
    softcap,
    inverse_cap,  # 1 / softcap
    hidden_size,
    stop_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 (BLOCK_M, BLOCK_N): the logits of some rows for the classes `cols`; past the vocabulary, the last one's.

    EVEN says that hidden_size is a multiple of BLOCK_K. It is no constant: the loop over it would be unrolled whole.
    stop_dim is hidden_size too; 0 multiplies nothing.
    """
    # clamped, so that no load of the loop needs a mask; the offset of a class may pass 2**31
    at = tl.minimum(cols, vocab_size - 1)
    weight_ptrs = weight_ptr + at.to(tl.int64) * stride_w
    tile_dims = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for dim in tl.range(0, stop_dim, BLOCK_K):
        dims = dim + tile_dims
        if EVEN:
            x = tl.load(hidden_ptrs[:, None] + dims[None, :])
            w = tl.load(weight_ptrs[:, None] + dims[None, :])
        else:
            x = tl.load(hidden_ptrs[:, None] + dims[None, :], mask=(dims < hidden_size)[None, :], other=0.0)
            w = tl.load(weight_ptrs[:, None] + dims[None, :], mask=(dims < hidden_size)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if BIASED:
        acc += tl.load(bias_ptr + at).to(tl.float32)[None, :]
    if CAPPED:
        acc = softcap * tanh(acc * inverse_cap)
    return acc


@triton.jit
def tanh(x):
    """Out of one exp2, which cannot overflow; Triton has no tanh that every target and the interpreter know."""
    shrunk = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


@triton.jit(
    do_not_specialize=["num_rows", "vocab_size", "split_cols", "num_splits"],
    do_not_specialize_on_alignment=["targets_ptr", "counts_ptr", "partials_ptr"],
)
def forward_kernel(
    hidden_ptr,  # (num_rows, hidden_size), strides (stride_h, 1)
    weight_ptr,  # (vocab_size, hidden_size), strides (stride_w, 1)
    bias_ptr,  # (vocab_size,)
    targets_ptr,  # int64 (num_rows,)
    counts_ptr,  # uint8 (num_rows,)
    partials_ptr,  # float32 (3 or 4, num_splits, num_rows): maximum, sum of exponentials, target's logit, sum of logits
    stride_h,
    stride_w,
    softcap,
    inverse_cap,  # 1 / softcap
    hidden_size,
    num_rows,
    vocab_size,
    split_cols,  # a multiple of BLOCK_N
    num_splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BIASED: tl.constexpr,
    COUNTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program for each (tile of rows, split of the vocabulary).
    tile, split = place(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_splits, GROUP)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.minimum(rows, num_rows - 1)
    hidden_ptrs = hidden_ptr + at.to(tl.int64) * stride_h
    targets = tl.load(targets_ptr + at).to(tl.int32)
    first_col = split * split_cols
    stop_col = tl.minimum(first_col + split_cols, vocab_size)
    if COUNTED:  # a tile of which no row counts computes nothing
        counted = load_counted(counts_ptr, at, rows, num_rows, COUNTED)
        stop_col = tl.where(tl.max(counted.to(tl.int32), 0) > 0, stop_col, first_col)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    target_logit = tl.zeros([BLOCK_M], tl.float32)
    logit_sum = tl.zeros([BLOCK_M], tl.float32)
    # a tile's columns are compared where they are constants: counted from the vocabulary's start they take registers
    tile_cols = tl.arange(0, BLOCK_N)
    for col in tl.range(first_col, stop_col, BLOCK_N):
        logits = logits_tile(
            hidden_ptrs, weight_ptr, bias_ptr, stride_w, col + tile_cols, vocab_size, softcap, inverse_cap,
            hidden_size, hidden_size, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, BIASED, CAPPED, PRECISION,
        )  # fmt: skip
        inside = (tile_cols < vocab_size - col)[None, :]
        target_logit += tl.sum(tl.where(tile_cols[None, :] == (targets - col)[:, None], logits, 0.0), 1)
        if SMOOTHED:
            logit_sum += tl.sum(tl.where(inside, logits, 0.0), 1)
        logits = tl.where(inside, logits, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        # a bias of -inf may leave a row without a maximum so far: -inf - -inf would be NaN
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        # the difference is scaled, not the logits: a large logit would lose what tells it from the maximum
        p = tl.exp2((logits - safe_max[:, None]) * _LOG2_E)
        running_sum = running_sum * tl.exp2((running_max - safe_max) * _LOG2_E) + tl.sum(p, 1)
        running_max = new_max

    plane = num_splits.to(tl.int64) * num_rows
    partials_ptrs = partials_ptr + split.to(tl.int64) * num_rows + rows
    tl.store(partials_ptrs, running_max, mask=rows < num_rows)
    tl.store(partials_ptrs + plane, running_sum, mask=rows < num_rows)
    tl.store(partials_ptrs + 2 * plane, target_logit, mask=rows < num_rows)
    if SMOOTHED:
        tl.store(partials_ptrs + 3 * plane, logit_sum, mask=rows < num_rows)


@triton.jit(
    do_not_specialize=["num_rows", "vocab_size", "stride_u"],
    do_not_specialize_on_alignment=["targets_ptr", "counts_ptr", "lse_ptr", "upstream_ptr"],
)
def d_logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    counts_ptr,
    lse_ptr,  # float32 (num_rows,)
    upstream_ptr,  # float32 (num_rows,), stride stride_u: 0 where all rows have one
    d_logits_ptr,  # (num_rows, stride_d), contiguous: columns from vocab_size on are padding, and become 0
    stride_h,
    stride_w,
    stride_u,
    stride_d,
    softcap,
    inverse_cap,  # 1 / softcap
    twice_z_loss,
    share,  # label_smoothing / vocab_size: what smoothing gives each class
    certain,  # 1 - label_smoothing: what it leaves the target
    hidden_size,
    num_rows,
    vocab_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BIASED: tl.constexpr,
    COUNTED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program for each tile of the gradient.
    tile, col_tile = place(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(stride_d, BLOCK_N), GROUP)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.minimum(rows, num_rows - 1)
    counted = load_counted(counts_ptr, at, rows, num_rows, COUNTED)
    stop_dim = hidden_size
    if COUNTED:  # a tile of which no row counts multiplies nothing
        stop_dim = tl.where(tl.max(counted.to(tl.int32), 0) > 0, hidden_size, 0)
    hidden_ptrs = hidden_ptr + at.to(tl.int64) * stride_h
    logits = logits_tile(
        hidden_ptrs, weight_ptr, bias_ptr, stride_w, cols, vocab_size, softcap, inverse_cap, hidden_size, stop_dim,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, BIASED, CAPPED, PRECISION,
    )  # fmt: skip

    # In float32 up to the one rounding: p - 1 in bfloat16 would be all error where p is near 1.
    lse = tl.load(lse_ptr + at)
    targets = tl.load(targets_ptr + at).to(tl.int32)
    upstream = tl.load(upstream_ptr + at.to(tl.int64) * stride_u)
    p = tl.exp2((logits - lse[:, None]) * _LOG2_E)
    d_logits = p * (1.0 + twice_z_loss * lse)[:, None] - share
    d_logits = tl.where(cols[None, :] == targets[:, None], d_logits - certain, d_logits)
    if CAPPED:
        level = logits * inverse_cap
        d_logits *= 1.0 - level * level
    # a row that does not count may hold anything, so it is replaced, not multiplied by 0
    valid = counted[:, None] & (cols < vocab_size)[None, :]
    d_logits = tl.where(valid, d_logits * upstream[:, None], 0.0)
    d_logits_ptrs = d_logits_ptr + rows.to(tl.int64)[:, None] * stride_d + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < stride_d)[None, :]
    tl.store(d_logits_ptrs, d_logits.to(d_logits_ptr.dtype.element_ty), mask=inside)
