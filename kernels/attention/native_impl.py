"""Attention by the C++ kernels (kernels/native/attention.cpp), as differentiable ops.

Sequences are packed; a dense batch is a view of packed rows. Strided inputs (parts of one projection, say) are read
where they lie. The ops are opaque to torch.compile.
"""

from __future__ import annotations

import torch

from antlm_fast.kernels.disentangled_attention.buckets import relative_bucket
from antlm_fast.kernels.native.library import library
from antlm_fast.kernels.native.ops import differentiable, opaque
from antlm_fast.kernels.philox import drop_threshold
from antlm_fast.kernels.tracing import kept

# a sum over sequences (a table's gradient) is made of so many parts, whatever the number of threads
_PARTS = 16


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_len: int | torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention; arguments as in api.attention, with one prefix length for all (int) or for each sequence."""
    batch, len_q, heads, _ = q.shape
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = attention_varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        counts * len_q,
        counts * k.shape[1],
        len_q,
        k.shape[1],
        prefix_len,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    return out.view(q.shape), None if lse is None else lse.view(heads, batch, len_q).transpose(0, 1).contiguous()


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_len: int | torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed attention; arguments as in api.attention_varlen, with one prefix length for all (int) or for each."""
    return attend(
        q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, prefix_len, None, 2,
        softmax_scale, dropout_p, dropout_seed, return_lse,
    )  # fmt: skip


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    prefix_len: int | torch.Tensor,
    positions_q: torch.Tensor | None,
    max_position: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed attention with relative tables or without (None), for other ops too."""
    if isinstance(prefix_len, int):
        prefix_len = torch.full((cu_q.numel() - 1,), prefix_len, dtype=torch.int32, device=q.device)
    else:
        prefix_len = prefix_len.clone()  # a flag may be changed in place before the backward reads it again
    dropout_seed = None if dropout_seed is None else dropout_seed.clone()
    longest = min(max(max_q, max_k), max(q.shape[0], k.shape[0]))  # a caller may name any bound
    out, sums = _attend(
        q, k, v, q_rel, k_rel, cu_q, cu_k, prefix_len, positions_q, dropout_seed,
        softmax_scale, dropout_p, max_position, longest,
    )  # fmt: skip
    if not return_lse:
        return out, None
    largest, total = sums.detach()
    return out, largest * softmax_scale + total.log()


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    positions_q: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    max_position: int,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, (2, heads, total_q): the largest product, the sum of weights relative to it; 0 where no key is seen)."""
    out, sums = _new_forward(q)
    tensors = (q, k, v, q_rel, k_rel, cu_q, cu_k, prefix_len, positions_q, dropout_seed)
    arguments, kept = _arguments(tensors, softmax_scale, dropout_p, max_position, longest)
    library().call("attention_forward", *arguments, out, sums)
    del kept
    return out, sums


def _new_forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((2, q.shape[1], q.shape[0]), dtype=torch.float32)


def _gradients(
    d_out: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    positions_q: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    max_position: int,
    longest: int,
) -> list[torch.Tensor]:
    """The gradients of q, k, v and of the tables that are there."""
    gradients = _new_gradients(q, k, v, q_rel, k_rel)
    tensors = (q, k, v, q_rel, k_rel, cu_q, cu_k, prefix_len, positions_q, dropout_seed)
    arguments, kept = _arguments(tensors, softmax_scale, dropout_p, max_position, longest)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    num_seqs = prefix_len.numel()
    parts = max(num_seqs if q_rel is None and k_rel is None else min(num_seqs, _PARTS), 1)
    d_tables = [None if table is None else _parts_of(table, parts) for table in (q_rel, k_rel)]
    library().call(
        "attention_backward", *arguments, d_out, d_out.stride(0), d_out.stride(1), out, sums, *gradients[:3], *d_tables,
        parts,
    )  # fmt: skip
    del kept
    for gradient, part in zip(gradients[3:], (part for part in d_tables if part is not None), strict=True):
        gradient.copy_(part.sum(0).transpose(0, 1))
    return gradients


def _parts_of(table: torch.Tensor, parts: int) -> torch.Tensor:
    rows, heads, head_dim = table.shape
    return table.new_empty((parts, heads, rows, head_dim), dtype=torch.float32)


def _new_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rel: torch.Tensor | None, k_rel: torch.Tensor | None
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, q_rel, k_rel) if x is not None]


def _arguments(
    tensors: tuple[torch.Tensor | None, ...], softmax_scale: float, dropout_p: float, max_position: int, longest: int
) -> tuple[list[torch.Tensor | float | None], list[torch.Tensor | None]]:
    """What both kernels are given first, and what has to live until they are done."""
    *rows, dropout_seed = tensors
    q, k, v, q_rel, k_rel = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in rows[:5])
    cu_q, cu_k, prefix_len, positions_q = (None if x is None else x.contiguous() for x in rows[5:])
    assert q is not None
    assert k is not None
    assert v is not None
    assert cu_q is not None
    table = q_rel if k_rel is None else k_rel
    buckets = buckets_back = None
    table_rows, span = 0, 0
    if table is not None:
        table_rows, span = table.shape[0], _span(longest)
        buckets, buckets_back = _bucket_rows((table_rows + 1) // 2, max_position, span)
    strides = [stride for x in (q, k, v, q_rel, k_rel) for stride in ((0, 0) if x is None else x.stride()[:2])]
    drops = dropout_seed is not None
    kept = [q, k, v, q_rel, k_rel, cu_q, cu_k, prefix_len, positions_q, buckets, buckets_back]
    arguments = [
        *kept, *strides, q.dtype == torch.bfloat16, cu_q.numel() - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1],
        q.shape[2], table_rows, span, drops, int(dropout_seed) if dropout_seed is not None else 0,
        drop_threshold(dropout_p), softmax_scale, 1.0 / (1.0 - dropout_p),
    ]  # fmt: skip
    return arguments, kept


def _span(longest: int) -> int:
    """Distances of padded blocks included; powers of two, so that few tables are made."""
    return 1 << (longest + 64).bit_length()


@kept(maxsize=16)
def _bucket_rows(bucket_size: int, max_position: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int16 (2 * span + 1,): the table's row of distance d, and of distance -d, at d + span."""
    distance = torch.arange(-span, span + 1, device="cpu")
    rows = relative_bucket(distance, bucket_size=bucket_size, max_position=max_position) + bucket_size - 1
    rows = rows.to(torch.int16)
    return rows, rows.flip(0).contiguous()


_gradients_of = opaque(
    "native_attention_backward",
    _gradients,
    lambda d_out, out, sums, q, k, v, q_rel, k_rel, *rest: _new_gradients(q, k, v, q_rel, k_rel),
)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.settings = inputs[10:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    *tensors, out, sums = ctx.saved_tensors
    d_q, d_k, d_v, *rest = _gradients_of(d_out, out, sums, *tensors, *ctx.settings)
    d_tables = [None if table is None else rest.pop(0) for table in tensors[3:5]]
    return d_q, d_k, d_v, *d_tables, *[None] * 9


_attend = differentiable(
    "native_attention_forward",
    _forward,
    public="attention",
    fake=lambda q, *rest: _new_forward(q),
    save=_save,
    backward=_backward,
)
