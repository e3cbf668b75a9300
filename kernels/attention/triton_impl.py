"""Fused attention in Triton, as custom ops: forward, delta, dQ, dK/dV.

Sequences are packed; a dense batch is a view of packed rows. No value of a flag or a length is read on the host, so a
call neither waits for the device nor compiles anew when a flag changes, and a CUDA graph that holds it replays with the
flags' values of the moment. The ops are opaque to torch.compile.
"""

from __future__ import annotations

import torch

from antlm_fast.kernels.attention.triton_launches import AttentionLaunches, delta_launch
from antlm_fast.kernels.attention.triton_tables import relative_terms
from antlm_fast.kernels.tracing import first_order
from antlm_fast.kernels.triton_support.launch import log2_scale


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
    len_k = k.shape[1]
    rows = max(batch * len_q, batch * len_k)
    if rows >= 2**31:
        raise ValueError(f"q and k must have fewer than 2**31 rows; got {rows}")
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = attend(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        counts * len_q,
        counts * len_k,
        len_q,
        len_k,
        prefix_len,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        slack=False,
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
        q,
        k,
        v,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        prefix_len,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        slack=True,
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    prefix_len: int | torch.Tensor,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
    *,
    slack: bool,
    c2p: torch.Tensor | None = None,
    p2c: torch.Tensor | None = None,
    bucket_size: int = 0,
    max_position: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed attention, for other ops too: `slack` is False where no row lies past the last sequence.

    c2p, p2c, bucket_size, max_position: relative terms of the scores, see triton_tables.relative_terms; they need heads
    that are not grouped. The kernels scale the maximum, not the scores: softmax_scale is above 0.
    """
    if isinstance(prefix_len, int):
        prefix_len = torch.full((1,), prefix_len, dtype=torch.int32, device=q.device).expand(cu_q.numel() - 1)
    else:
        prefix_len = prefix_len.clone()  # a flag may be changed in place before the backward reads it again
    dropout_seed = None if dropout_seed is None else dropout_seed.clone()
    out, log2_sums = forward_op(
        q, k, v, cu_q, cu_k, prefix_len, dropout_seed, c2p, p2c, bucket_size, max_position, softmax_scale, dropout_p,
        max_q, max_k, slack,
    )  # fmt: skip
    if not return_lse:
        return out, None
    lse = log2_sums.detach() / log2_scale(1.0)
    return out, lse.masked_fill(torch.isposinf(lse), -torch.inf)


@torch.library.custom_op("antlm_fast::attention_forward", mutates_args=())
def forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    dropout_seed: torch.Tensor | None,
    c2p: torch.Tensor | None,
    p2c: torch.Tensor | None,
    bucket_size: int,
    max_position: int,
    softmax_scale: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    slack: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log2 of the softmax's denominators (heads, total_q): +inf where a row sees no key)."""
    out, log2_sums = _new_forward(q)
    relative = relative_terms(c2p, p2c, bucket_size, max_position, _longest(q, k, max_q, max_k))
    call = AttentionLaunches(
        q, k, v, cu_q, cu_k, prefix_len, dropout_seed, relative, softmax_scale, dropout_p, max_q, max_k, slack
    )
    call.forward(out, log2_sums).run(q.device)
    return out, log2_sums


@forward_op.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return _new_forward(q)


def _longest(q: torch.Tensor, k: torch.Tensor, max_q: int, max_k: int) -> int:
    """No sequence has more tokens; a caller may name any bound."""
    return min(max(max_q, max_k), max(q.shape[0], k.shape[0]))


def _new_forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("antlm_fast::attention_delta", mutates_args=())
def delta_op(out: torch.Tensor, d_out: torch.Tensor) -> torch.Tensor:
    """float32 (heads, total_q): each row's product of output and upstream gradient."""
    delta = _new_delta(out)
    delta_launch(out, d_out, delta).run(out.device)
    return delta


@delta_op.register_fake
def _(out, d_out):  # type: ignore[no-untyped-def]
    return _new_delta(out)


def _new_delta(out: torch.Tensor) -> torch.Tensor:
    return out.new_empty((out.shape[1], out.shape[0]), dtype=torch.float32)


@torch.library.custom_op("antlm_fast::attention_backward_q", mutates_args=())
def backward_q_op(
    d_out: torch.Tensor,
    log2_sums: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    dropout_seed: torch.Tensor | None,
    c2p: torch.Tensor | None,
    p2c: torch.Tensor | None,
    bucket_size: int,
    max_position: int,
    softmax_scale: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    slack: bool,
) -> list[torch.Tensor]:
    """The gradients of q and, where it is there, c2p."""
    gradients = _new_backward_q(q, c2p)
    relative = relative_terms(c2p, p2c, bucket_size, max_position, _longest(q, k, max_q, max_k))
    call = AttentionLaunches(
        q, k, v, cu_q, cu_k, prefix_len, dropout_seed, relative, softmax_scale, dropout_p, max_q, max_k, slack
    )
    call.dq(d_out, log2_sums, delta, *gradients).run(q.device)
    return gradients


@backward_q_op.register_fake
def _(d_out, log2_sums, delta, q, k, v, cu_q, cu_k, prefix_len, dropout_seed, c2p, *rest):  # type: ignore[no-untyped-def]
    return _new_backward_q(q, c2p)


def _new_backward_q(q: torch.Tensor, c2p: torch.Tensor | None) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in (q, c2p) if x is not None]


@torch.library.custom_op("antlm_fast::attention_backward_kv", mutates_args=())
def backward_kv_op(
    d_out: torch.Tensor,
    log2_sums: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    dropout_seed: torch.Tensor | None,
    c2p: torch.Tensor | None,
    p2c: torch.Tensor | None,
    bucket_size: int,
    max_position: int,
    softmax_scale: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    slack: bool,
) -> list[torch.Tensor]:
    """The gradients of k, v and, where it is there, p2c."""
    gradients = _new_backward_kv(k, v, p2c)
    relative = relative_terms(c2p, p2c, bucket_size, max_position, _longest(q, k, max_q, max_k))
    call = AttentionLaunches(
        q, k, v, cu_q, cu_k, prefix_len, dropout_seed, relative, softmax_scale, dropout_p, max_q, max_k, slack
    )
    call.dkdv(d_out, log2_sums, delta, *gradients).run(q.device)
    return gradients


@backward_kv_op.register_fake
def _(d_out, log2_sums, delta, q, k, v, cu_q, cu_k, prefix_len, dropout_seed, c2p, p2c, *rest):  # type: ignore[no-untyped-def]
    return _new_backward_kv(k, v, p2c)


def _new_backward_kv(k: torch.Tensor, v: torch.Tensor, p2c: torch.Tensor | None) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in (k, v, p2c) if x is not None]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, ctx.settings = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    *tensors, out, log2_sums = ctx.saved_tensors
    arguments = (d_out, log2_sums, delta_op(out, d_out), *tensors, *ctx.settings)
    wants_q, wants_k, wants_v, *_, wants_c2p, wants_p2c = ctx.needs_input_grad[:9]
    dq = dk = dv = dc2p = dp2c = None
    if wants_q or wants_c2p:
        dq, *rest = backward_q_op(*arguments)
        dc2p = rest[0] if rest else None
    if wants_k or wants_v or wants_p2c:
        dk, dv, *rest = backward_kv_op(*arguments)
        dp2c = rest[0] if rest else None
    return dq, dk, dv, *[None] * 4, dc2p, dp2c, *[None] * 7


forward_op.register_autograd(first_order("attention")(_backward), setup_context=_save)
