"""Attention: the contract, the validation and the table of implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from antlm_fast.kernels.attention import reference, torch_impl
from antlm_fast.kernels.dispatch import Implementation, Table, choose

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BIDIRECTIONAL = 2**31 - 1
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


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


# the order is the preference of impl="auto"
DENSE: Table[AttentionCall] = {
    "torch": Implementation(_serves_everything, torch_impl.attention),
    "reference": Implementation(_serves_everything, reference.attention),
}
VARLEN: Table[AttentionCall] = {
    "torch": Implementation(_serves_everything, torch_impl.attention_varlen),
    "reference": Implementation(_serves_everything, reference.attention_varlen),
}
OPS: dict[str, Table[AttentionCall]] = {"attention": DENSE, "attention_varlen": VARLEN}


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
            device. The mask is a pure function of (seed, head, b * seqlen_q + i, b * seqlen_k + j): see
            kernels/philox.py. Not used where dropout_p is 0.
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
        deterministic. torch.autocast changes nothing here: the arithmetic is that of q's dtype. The flags are read
        when the call runs (once, from device memory on CUDA, without a sync), so changing one in place changes the
        next call.

    Source:
        Vaswani et al., arXiv 1706.03762, section 3.2.1; prefix-LM: Raffel et al., arXiv 1910.10683, section 3.2.1.
    """
    _check_tensors(q, k, v, ("batch", "seqlen"))
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}; got {k.shape[0]}")
    prefix = _visibility(causal, prefix_len, q.shape[0], q.device)
    options = _options(q, softmax_scale, dropout_p, dropout_seed, return_lse)
    chosen = choose("attention", DENSE, impl, _call(q, k, options))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = chosen.forward(q, k, v, prefix, **options)
    return (out, lse) if return_lse else out


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
            total_k. Their values are checked on the CPU; on CUDA, where that would stall the device, they are the
            caller's duty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, in tokens.
        causal: True, False, or a bool tensor () or (num_seqs,) on q's device; exactly one of causal and prefix_len.
        prefix_len: int32 (num_seqs,) on q's device: the first keys of a sequence, which all its queries see.
        softmax_scale, dropout_p, dropout_seed, return_lse, impl: as for `attention`; the dropout mask counts rows over
            the packed layout.

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
    _check_tensors(q, k, v, ("total",))
    num_seqs = _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    prefix = _visibility(causal, prefix_len, num_seqs, q.device)
    options = _options(q, softmax_scale, dropout_p, dropout_seed, return_lse)
    chosen = choose("attention_varlen", VARLEN, impl, _call(q, k, options))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = chosen.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, prefix, **options)
    return (out, lse) if return_lse else out


def _call(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> AttentionCall:
    dropout = options["dropout_seed"] is not None
    return AttentionCall(q.device.type, q.dtype, q.shape[-1], q.shape[-2], k.shape[-2], dropout, options["return_lse"])


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, leading: tuple[str, ...]) -> None:
    for name, x, heads in (("q", q, "heads"), ("k", k, "kv_heads"), ("v", v, "kv_heads")):
        if x.dim() != len(leading) + 2:
            raise ValueError(f"{name} must have shape ({', '.join(leading)}, {heads}, head_dim); got {tuple(x.shape)}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64; got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {x.device}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1] or not k.shape[-1]:
        raise ValueError(f"k must have q's head_dim {q.shape[-1]}, at least 1; got {k.shape[-1]}")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2] or not q.shape[-2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[-2]} heads, at least 1; got {q.shape[-2]}")


def _check_cu_seqlens(
    q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int
) -> int:
    """The number of sequences. Values are looked at on the CPU alone."""
    for side, x, cu, longest in (("q", q, cu_q, max_q), ("k", k, cu_k, max_k)):
        name = f"cu_seqlens_{side}"
        if cu.dtype != torch.int32:
            raise TypeError(f"{name} must be int32; got {cu.dtype}")
        if cu.dim() != 1 or not cu.numel():
            raise ValueError(f"{name} must have shape (num_seqs + 1,); got {tuple(cu.shape)}")
        if cu.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {cu.device}")
        if not isinstance(longest, int) or isinstance(longest, bool):
            raise TypeError(f"max_seqlen_{side} must be an int; got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"max_seqlen_{side} must be at least 0; got {longest}")
        if cu.device.type == "cpu":
            _check_starts(name, cu.tolist(), x.shape[0], longest)
    if cu_q.numel() != cu_k.numel():
        raise ValueError(f"cu_seqlens_k must have cu_seqlens_q's length {cu_q.numel()}; got {cu_k.numel()}")
    return cu_q.numel() - 1


def _check_starts(name: str, starts: list[int], total: int, longest: int) -> None:
    if starts[0] != 0:
        raise ValueError(f"{name} must begin with 0; got {starts[0]}")
    if starts[-1] > total:
        raise ValueError(f"{name} must end at or before row {total}; got {starts[-1]}")
    lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"{name} must never decrease; got a step of {min(lengths)}")
    if lengths and max(lengths) > longest:
        side = name[-1]
        raise ValueError(f"max_seqlen_{side} must be at least the longest sequence, {max(lengths)}; got {longest}")


def _visibility(
    causal: bool | torch.Tensor | None, prefix_len: torch.Tensor | None, num_seqs: int, device: torch.device
) -> int | torch.Tensor:
    """One prefix length for all sequences (int), or one for each (int32 (num_seqs,), on the device)."""
    if (causal is None) == (prefix_len is None):
        got = "neither" if causal is None else "both"
        raise ValueError(f"causal or prefix_len must be given, and not both; got {got}")
    if isinstance(causal, bool):
        return 0 if causal else _BIDIRECTIONAL
    name, flag, dtype = ("prefix_len", prefix_len, torch.int32) if causal is None else ("causal", causal, torch.bool)
    if not isinstance(flag, torch.Tensor) or flag.dtype != dtype:
        rule = "an int32 tensor" if causal is None else "a bool or a bool tensor"
        got = str(flag.dtype) if isinstance(flag, torch.Tensor) else type(flag).__name__
        raise TypeError(f"{name} must be {rule}; got {got}")
    if flag.shape != (num_seqs,) and (causal is None or flag.dim()):
        shapes = f"shape ({num_seqs},)" if causal is None else f"shape () or ({num_seqs},)"
        raise ValueError(f"{name} must have {shapes}; got {tuple(flag.shape)}")
    if flag.device != device:
        raise ValueError(f"{name} must be on q's device {device}; got {flag.device}")
    if causal is None:
        return flag
    return torch.where(flag, 0, _BIDIRECTIONAL).to(torch.int32).expand(num_seqs)


def _options(
    q: torch.Tensor,
    softmax_scale: float | None,
    dropout_p: float,
    dropout_seed: int | torch.Tensor | None,
    return_lse: bool,
) -> dict[str, Any]:
    """The keyword arguments of every implementation; dropout_seed is an int64 tensor () on the device, or None."""
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[-1])
    elif not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite; got {softmax_scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1; got {dropout_p}")
    return {
        "softmax_scale": float(softmax_scale),
        "dropout_p": float(dropout_p),
        "dropout_seed": _seed(dropout_seed, q.device) if dropout_p else None,
        "return_lse": return_lse,
    }


def _seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if seed is None:
        return torch.randint(_INT64_MAX, (), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        if not _INT64_MIN <= seed <= _INT64_MAX:
            raise ValueError(f"dropout_seed must fit 64 bits; got {seed}")
        # a fill runs on the device; building the tensor from the host's value would copy, and a copy can stall
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
        got = str(seed.dtype) if isinstance(seed, torch.Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int or an int64 tensor; got {got}")
    if seed.dim():
        raise ValueError(f"dropout_seed must have shape (); got {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"dropout_seed must be on q's device {device}; got {seed.device}")
    return seed
