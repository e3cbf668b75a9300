"""Attention: the contract and the table of implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from antlm_fast.kernels.attention import reference, torch_impl
from antlm_fast.kernels.attention.unfelt import clear, unfelt_rows
from antlm_fast.kernels.attention.validation import (
    check_cu_seqlens,
    check_tensors,
    in_one_dtype,
    options,
    visibility,
    with_positive_scale,
)
from antlm_fast.kernels.dispatch import Implementation, Table, choose
from antlm_fast.kernels.native import library as native
from antlm_fast.kernels.tracing import check_call
from antlm_fast.kernels.triton_support.availability import unavailable_reason

_MAX_TRITON_HEAD_DIM = 256
_MAX_NATIVE_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionCall:
    """What the choice of an implementation may depend on; the same for every sequence length and every flag."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    heads: int
    kv_heads: int
    dropout: bool = False
    return_lse: bool = False


def _serves_everything(call: AttentionCall) -> str | None:
    return None


def triton_unsupported_reason(call: AttentionCall) -> str | None:
    if call.dtype == torch.float64:
        return "the Triton kernels compute float16, bfloat16 and float32, not float64"
    if call.head_dim > _MAX_TRITON_HEAD_DIM:
        return f"the Triton kernels take a head_dim of at most {_MAX_TRITON_HEAD_DIM}, not {call.head_dim}"
    return unavailable_reason(call.device_type)


def native_unsupported_reason(call: AttentionCall) -> str | None:
    if call.head_dim > _MAX_NATIVE_HEAD_DIM:
        return f"the C++ kernels take a head_dim of at most {_MAX_NATIVE_HEAD_DIM}, not {call.head_dim}"
    return native.unavailable_reason(call.device_type, call.dtype)


def _native_dense(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from antlm_fast.kernels.attention import native_impl

    return native_impl.attention(*args, **options)


def _native_varlen(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from antlm_fast.kernels.attention import native_impl

    return native_impl.attention_varlen(*args, **options)


def _triton_dense(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from antlm_fast.kernels.attention import triton_impl

    return triton_impl.attention(*args, **options)


def _triton_varlen(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from antlm_fast.kernels.attention import triton_impl

    return triton_impl.attention_varlen(*args, **options)


# the order is the preference of impl="auto"
DENSE: Table[AttentionCall] = {
    "triton": Implementation(triton_unsupported_reason, _triton_dense),
    "native": Implementation(native_unsupported_reason, _native_dense),
    "torch": Implementation(_serves_everything, torch_impl.attention),
    "reference": Implementation(_serves_everything, reference.attention),
}
VARLEN: Table[AttentionCall] = {
    "triton": Implementation(triton_unsupported_reason, _triton_varlen),
    "native": Implementation(native_unsupported_reason, _native_varlen),
    "torch": Implementation(_serves_everything, torch_impl.attention_varlen),
    "reference": Implementation(_serves_everything, reference.attention_varlen),
}
OPS: dict[str, Table[AttentionCall]] = {"attention": DENSE, "attention_varlen": VARLEN}


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[False] = False,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | torch.Tensor | None = None,
    prefix_len: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over a dense batch; each sequence is causal, bidirectional or prefix-LM.

    out[b, i, h] = sum over j < row_limit(i) of softmax_j(softmax_scale * q[b, i, h] . k[b, j, g]) * v[b, j, g], with
    g = h // (heads / kv_heads) and
    row_limit(i) = clamp(max(i + 1 + seqlen_k - seqlen_q, prefix_len[b]), 0, seqlen_k):
    a causal mask is aligned to the bottom right. A row that sees no key gives 0.
    What cannot be seen cannot be felt: a key and value that no query sees, a query that sees nothing and its upstream
    gradient may hold anything, NaN too. What is seen and not finite may reach all rows of its sequence, and no other's.

    Args:
        q: (batch, seqlen_q, heads, head_dim); float16, bfloat16, float32 or float64.
        k, v: (batch, seqlen_k, kv_heads, head_dim), of q's dtype; heads is a multiple of kv_heads.
        causal: True, False, or a bool tensor () or (batch,) on q's device. Exactly one of causal and prefix_len is
            given; causal=True is prefix_len = 0 and causal=False is prefix_len >= seqlen_k.
        prefix_len: int32 (batch,) on q's device: the first keys, which every query sees. Values below 0 are read as 0.
        softmax_scale: None is 1 / sqrt(head_dim).
        dropout_p: the probability, in [0, 1), of dropping a softmax probability; what is kept is scaled by
            1 / (1 - dropout_p).
        dropout_seed: an int or an int64 tensor () on q's device; None draws one from torch's default generator of that
            device. The mask is a pure function of (seed, head, b * seqlen_q + i, j): see kernels/philox.py. Not used
            where dropout_p is 0.
        return_lse: also return the log of the softmax's denominator.
        impl: "auto" or the implementation to use.

    Returns:
        out, of q's shape and dtype; sums are accumulated in float32 (float64 for float64). With return_lse, (out, lse):
        lse is the natural logarithm, float32 (float64 for float64) (batch, heads, seqlen_q), without dropout, detached,
        and -inf for a row that sees no key.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or value is wrong.
        UnsupportedError: the implementation named by `impl` cannot serve the call.

    Gradients and determinism:
        Gradients reach q, k and v, in their dtype; rows that see no key give and get 0. Forward and backward are
        deterministic. Under torch.autocast q, k and v of float32 and a narrower dtype are taken in the narrower; else
        it changes nothing: the arithmetic is that of q's dtype. The flags are read
        when the call runs (once, from device memory on CUDA, without a sync), so changing one in place changes the
        next call.

    Source:
        Vaswani et al., arXiv 1706.03762, section 3.2.1; prefix-LM: Raffel et al., arXiv 1910.10683, section 3.2.1.
    """
    check_call("attention", impl, q=q, k=k, v=v, causal=causal, prefix_len=prefix_len, dropout_seed=dropout_seed)
    q, k, v = in_one_dtype(q, k, v)
    check_tensors(q, k, v, ("batch", "seqlen"))
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}; got {k.shape[0]}")
    prefix = visibility(causal, prefix_len, q.shape[0], q.device)
    settings = options(q, softmax_scale, dropout_p, dropout_seed, return_lse)
    chosen = choose("attention", DENSE, impl, _call(q, k, settings))
    settings["softmax_scale"], (q,) = with_positive_scale(settings["softmax_scale"], q)
    blind = _blind(q, k, prefix)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = chosen.forward(clear(blind, q), k, v, prefix, **settings)
    out = clear(blind, out)
    return (out, lse) if return_lse else out


def _blind(q: torch.Tensor, k: torch.Tensor, prefix_len: int | torch.Tensor) -> torch.Tensor | None:
    """bool (batch, seqlen_q): the queries of a dense batch that see nothing; None where there are none."""
    (batch, len_q), len_k = q.shape[:2], k.shape[1]
    if len_q <= len_k:
        return None
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    blind, _ = unfelt_rows(counts * len_q, counts * len_k, prefix_len, None, batch * len_q, batch * len_k)
    return None if blind is None else blind.view(batch, len_q)


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[False] = False,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | torch.Tensor | None = ...,
    prefix_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | torch.Tensor | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | torch.Tensor | None = None,
    prefix_len: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over packed sequences, which never see one another; visibility is chosen per sequence.

    The equation is that of `attention`, for each sequence s over its own rows: queries
    [cu_seqlens_q[s], cu_seqlens_q[s + 1]) and keys [cu_seqlens_k[s], cu_seqlens_k[s + 1]). Sequences may be empty.

    Args:
        q: (total_q, heads, head_dim); float16, bfloat16, float32 or float64.
        k, v: (total_k, kv_heads, head_dim), of q's dtype; heads is a multiple of kv_heads.
        cu_seqlens_q, cu_seqlens_k: int32 (num_seqs + 1,) on q's device, from 0, never decreasing, at most total_q and
            total_k. Their values are checked on the CPU; on CUDA, where that would stall the device, and under
            torch.compile they are the caller's duty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, in tokens.
        causal: True, False, or a bool tensor () or (num_seqs,) on q's device; exactly one of causal and prefix_len.
        prefix_len: int32 (num_seqs,) on q's device: the first keys of a sequence, which all its queries see.
        softmax_scale, dropout_p, dropout_seed, return_lse, impl: as for `attention`; the dropout mask counts queries
            over the packed layout, and keys within their sequence.

    Returns:
        out, of q's shape and dtype, or (out, lse) with lse float32 (float64 for float64) (heads, total_q), detached.
        Slack rows, those past cu_seqlens_q[-1], are 0 and their lse is -inf; so are the gradients of slack rows.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or value is wrong.
        UnsupportedError: the implementation named by `impl` cannot serve the call.

    Gradients and determinism, Source:
        as for `attention`.
    """
    packing = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "causal": causal, "prefix_len": prefix_len}
    check_call("attention_varlen", impl, q=q, k=k, v=v, **packing, dropout_seed=dropout_seed)
    q, k, v = in_one_dtype(q, k, v)
    check_tensors(q, k, v, ("total",))
    num_seqs = check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    prefix = visibility(causal, prefix_len, num_seqs, q.device)
    settings = options(q, softmax_scale, dropout_p, dropout_seed, return_lse)
    chosen = choose("attention_varlen", VARLEN, impl, _call(q, k, settings))
    settings["softmax_scale"], (q,) = with_positive_scale(settings["softmax_scale"], q)
    blind, unseen = unfelt_rows(cu_seqlens_q, cu_seqlens_k, prefix, None, q.shape[0], k.shape[0])
    q, k, v = clear(blind, q), clear(unseen, k), clear(unseen, v)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = chosen.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, prefix, **settings)
    out = clear(blind, out)
    return (out, lse) if return_lse else out


def _call(q: torch.Tensor, k: torch.Tensor, settings: dict[str, Any]) -> AttentionCall:
    dropout = settings["dropout_seed"] is not None
    return AttentionCall(q.device.type, q.dtype, q.shape[-1], q.shape[-2], k.shape[-2], dropout, settings["return_lse"])
