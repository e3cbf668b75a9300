"""Disentangled attention: the contract and the table of implementations."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, overload

import torch

from antlm_fast.kernels.attention.api import AttentionCall, native_unsupported_reason, triton_unsupported_reason
from antlm_fast.kernels.attention.unfelt import clear, unfelt_rows
from antlm_fast.kernels.attention.validation import (
    check_cu_seqlens,
    check_tensors,
    in_one_dtype,
    options,
    visibility,
    with_positive_scale,
)
from antlm_fast.kernels.disentangled_attention import reference, torch_impl
from antlm_fast.kernels.disentangled_attention.buckets import check_sizes
from antlm_fast.kernels.dispatch import Implementation, Table, choose
from antlm_fast.kernels.tracing import check_call


def _serves_everything(call: AttentionCall) -> str | None:
    return None


def _native(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from antlm_fast.kernels.disentangled_attention import native_impl

    return native_impl.disentangled_attention_varlen(*args, **options)


def _triton(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from antlm_fast.kernels.disentangled_attention import triton_impl

    return triton_impl.disentangled_attention_varlen(*args, **options)


# the order is the preference of impl="auto"
VARLEN: Table[AttentionCall] = {
    "triton": Implementation(triton_unsupported_reason, _triton),
    "native": Implementation(native_unsupported_reason, _native),
    "torch": Implementation(_serves_everything, torch_impl.disentangled_attention_varlen),
    "reference": Implementation(_serves_everything, reference.disentangled_attention_varlen),
}
OPS: dict[str, Table[AttentionCall]] = {"disentangled_attention_varlen": VARLEN}


@overload
def disentangled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    *,
    max_position: int = ...,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[False] = False,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def disentangled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    *,
    max_position: int = ...,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def disentangled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    *,
    max_position: int = 512,
    causal: bool | torch.Tensor | None = None,
    prefix_len: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Disentangled attention over a dense batch: `disentangled_attention_varlen` of sequences of one length.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, heads, head_dim), of q's dtype.
        q_rel, k_rel, max_position, causal, prefix_len, softmax_scale, dropout_p, dropout_seed, return_lse, impl: as
            for `disentangled_attention_varlen`, with batch in place of num_seqs.

    Returns:
        out, of q's shape and dtype; or (out, lse) with lse float32 (float64 for float64) (batch, heads, seqlen_q).

    Raises, Gradients and determinism, Source:
        as for `disentangled_attention_varlen`.
    """
    flags = {"causal": causal, "prefix_len": prefix_len, "dropout_seed": dropout_seed}
    check_call("disentangled_attention", impl, q=q, k=k, v=v, q_rel=q_rel, k_rel=k_rel, **flags)
    q, k, v, q_rel, k_rel = in_one_dtype(q, k, v, q_rel, k_rel)
    check_tensors(q, k, v, ("batch", "seqlen"))
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}; got {k.shape[0]}")
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    cu_seqlens_q = counts * seqlen_q
    cu_seqlens_k = cu_seqlens_q if seqlen_k == seqlen_q else counts * seqlen_k
    out, lse = _attend(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        q_rel,
        k_rel,
        (cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k),
        visibility(causal, prefix_len, batch, q.device),
        None,
        max_position,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        impl,
    )
    out = out.view(q.shape)
    return out if lse is None else (out, lse.view(heads, batch, seqlen_q).transpose(0, 1).contiguous())


@overload
def disentangled_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    max_position: int = ...,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    positions_q: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[False] = False,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def disentangled_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    max_position: int = ...,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    positions_q: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def disentangled_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    max_position: int = 512,
    causal: bool | torch.Tensor | None = None,
    prefix_len: torch.Tensor | None = None,
    positions_q: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with relative positions over packed sequences; visibility is chosen per sequence, by data.

    For each sequence, over its own rows, with pos_i the place of query i among the sequence's keys:
    score(i, j) = softmax_scale * (q_i . k_j + q_i . k_rel[b] + k_j . q_rel[b]), b = bucket(pos_i - j) + B - 1
    (`relative_bucket`), and out_i = sum over j < row_limit(i) of softmax_j(score(i, j)) * v_j, with
    row_limit(i) = clamp(max(pos_i + 1, prefix_len), 0, len_k). A row that sees no key gives 0.
    What cannot be seen cannot be felt: a key and value that no query sees, a query that sees nothing and its upstream
    gradient may hold anything, NaN too. What is seen and not finite may reach all rows of its sequence, and no other's.

    Args:
        q: (total_q, heads, head_dim); float16, bfloat16, float32 or float64.
        k, v: (total_k, heads, head_dim), of q's dtype; every query head has its own key head.
        q_rel, k_rel: the relative queries and keys, (2 B - 1, heads, head_dim) for B buckets, of q's dtype, row b for
            bucket b - (B - 1); None leaves the term out.
        cu_seqlens_q, cu_seqlens_k: int32 (num_seqs + 1,) on q's device, from 0, never decreasing, at most total_q and
            total_k. Their values are checked on the CPU; on CUDA and under torch.compile they are the caller's duty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, in tokens.
        max_position: distances of max_position - 1 and more share the last bucket.
        causal: True, False, or a bool tensor () or (num_seqs,) on q's device; exactly one of causal and prefix_len.
        prefix_len: int32 (num_seqs,) on q's device: the first keys of a sequence, which all its queries see.
        positions_q: int32 (total_q,) on q's device: pos_i, ascending within a sequence and below its number of keys
            (checked on the CPU), for queries of some of a sequence's tokens alone. None: the last len_q places,
            pos_i = i + len_k - len_q.
        softmax_scale: None is 1 / sqrt(n * head_dim), n the number of terms: 3 with both tables.
        dropout_p: the probability, in [0, 1), of dropping a softmax probability; what is kept is scaled by
            1 / (1 - dropout_p).
        dropout_seed: an int or an int64 tensor () on q's device; None draws one from torch's default generator of that
            device. The mask is a pure function of (seed, head, packed query row, key): see kernels/philox.py. With
            positions_q a query's row is cu_seqlens_k[s] + pos_i, so that asking for fewer rows drops nothing else.
        return_lse: also return the log of the softmax's denominator.
        impl: "auto" or the implementation to use.

    Returns:
        out, of q's shape and dtype; sums are accumulated in float32 (float64 for float64). With return_lse, (out, lse):
        lse is the natural logarithm, float32 (float64 for float64) (heads, total_q), without dropout, detached, -inf
        for a row that sees no key. Slack rows, those past cu_seqlens_q[-1], are 0 and their lse is -inf.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or value is wrong.
        UnsupportedError: the implementation named by `impl` cannot serve the call.

    Gradients and determinism:
        Gradients reach q, k, v, q_rel and k_rel, in their dtype. Forward and backward are deterministic, without
        atomics; memory grows linearly with the length. torch.autocast as for `attention`. The flags are read when
        the call runs (once, from device memory on CUDA, without a sync).

    Source:
        LTG-BERT, arXiv 2303.09859, section 3; He et al., DeBERTa, arXiv 2006.03654, equation 4 (which reads the second
        relative term at bucket(j - i)).
    """
    flags = {"causal": causal, "prefix_len": prefix_len, "dropout_seed": dropout_seed, "positions_q": positions_q}
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    op = "disentangled_attention_varlen"
    check_call(op, impl, q=q, k=k, v=v, q_rel=q_rel, k_rel=k_rel, **packed, **flags)
    q, k, v, q_rel, k_rel = in_one_dtype(q, k, v, q_rel, k_rel)
    check_tensors(q, k, v, ("total",))
    num_seqs = check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if positions_q is not None:
        _check_positions(positions_q, q, cu_seqlens_q, cu_seqlens_k)
    out, lse = _attend(
        q,
        k,
        v,
        q_rel,
        k_rel,
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        visibility(causal, prefix_len, num_seqs, q.device),
        positions_q,
        max_position,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        impl,
    )
    return out if lse is None else (out, lse)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    packing: tuple[torch.Tensor, torch.Tensor, int, int],
    prefix_len: int | torch.Tensor,
    positions_q: torch.Tensor | None,
    max_position: int,
    softmax_scale: float | None,
    dropout_p: float,
    dropout_seed: int | torch.Tensor | None,
    return_lse: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _check_tables(q, k, q_rel, k_rel, max_position)
    settings = options(q, softmax_scale, dropout_p, dropout_seed, return_lse)
    if softmax_scale is None:
        terms = 1 + (q_rel is not None) + (k_rel is not None)
        settings["softmax_scale"] = 1.0 / math.sqrt(terms * q.shape[-1])
    dropout = settings["dropout_seed"] is not None
    call = AttentionCall(q.device.type, q.dtype, q.shape[-1], q.shape[-2], k.shape[-2], dropout, return_lse)
    chosen = choose("disentangled_attention_varlen", VARLEN, impl, call)
    settings["softmax_scale"], (q, q_rel) = with_positive_scale(settings["softmax_scale"], q, q_rel)
    cu_q, cu_k = packing[:2]
    blind, unseen = unfelt_rows(cu_q, cu_k, prefix_len, positions_q, q.shape[0], k.shape[0])
    q, k, v = clear(blind, q), clear(unseen, k), clear(unseen, v)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = chosen.forward(
            q, k, v, q_rel, k_rel, *packing, prefix_len, positions_q, max_position=max_position, **settings
        )
    return clear(blind, out), lse if return_lse else None


def _check_tables(
    q: torch.Tensor, k: torch.Tensor, q_rel: torch.Tensor | None, k_rel: torch.Tensor | None, max_position: int
) -> None:
    if k.shape[-2] != q.shape[-2]:
        raise ValueError(f"k must have q's {q.shape[-2]} heads; got {k.shape[-2]}")
    check_sizes(2, max_position)
    heads, head_dim = q.shape[-2:]
    for name, table in (("q_rel", q_rel), ("k_rel", k_rel)):
        if table is None:
            continue
        if table.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {table.dtype}")
        if table.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {table.device}")
        rows = table.shape[0] if table.dim() else 0
        if table.shape != (rows, heads, head_dim) or rows < 3 or rows % 2 == 0:
            raise ValueError(
                f"{name} must have shape (2 * bucket_size - 1, {heads}, {head_dim}), bucket_size at least 2; "
                f"got {tuple(table.shape)}"
            )
    if q_rel is not None and k_rel is not None and q_rel.shape != k_rel.shape:
        raise ValueError(f"k_rel must have q_rel's shape {tuple(q_rel.shape)}; got {tuple(k_rel.shape)}")


def _check_positions(
    positions_q: torch.Tensor, q: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    if positions_q.dtype != torch.int32:
        raise TypeError(f"positions_q must be int32; got {positions_q.dtype}")
    if positions_q.shape != (q.shape[0],):
        raise ValueError(f"positions_q must have shape ({q.shape[0]},); got {tuple(positions_q.shape)}")
    if positions_q.device != q.device:
        raise ValueError(f"positions_q must be on q's device {q.device}; got {positions_q.device}")
    if positions_q.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts_q, lengths_k = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    positions = positions_q.tolist()
    for (start, stop), length in zip(pairwise(starts_q), lengths_k, strict=True):
        own = positions[start:stop]
        if own and (own[0] < 0 or own[-1] >= length):
            wrong = own[0] if own[0] < 0 else own[-1]
            raise ValueError(f"positions_q must be from 0 to {length - 1} in a sequence of {length} keys; got {wrong}")
        if any(second <= first for first, second in pairwise(own)):
            raise ValueError(f"positions_q must ascend within a sequence; got {own[:8]}")
