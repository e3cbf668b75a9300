"""Attention as it is defined: one sequence at a time, every score in memory. The specification, not the way to run."""

from __future__ import annotations

import torch

from antlm_fast.kernels.philox import keep_mask


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
    """Dense attention is packed attention over sequences of one length."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    out, lse = attention_varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        torch.arange(batch + 1, device="cpu") * seqlen_q,
        torch.arange(batch + 1, device="cpu") * seqlen_k,
        seqlen_q,
        seqlen_k,
        prefix_len,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    return out.view_as(q), None if lse is None else lse.view(heads, batch, seqlen_q).transpose(0, 1).contiguous()


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
    """Packed attention; rows past the last sequence stay 0, and their lse -inf. Reads the lengths on the host."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    num_seqs = len(starts_q) - 1
    prefixes = [prefix_len] * num_seqs if isinstance(prefix_len, int) else prefix_len.tolist()
    outs, lses = [], []
    for s in range(num_seqs):
        rows_q = torch.arange(starts_q[s], starts_q[s + 1], device=q.device)
        rows_k = torch.arange(starts_k[s], starts_k[s + 1], device=q.device)
        scores = _scores(q[rows_q], k[rows_k], softmax_scale)
        limit = row_limit(rows_q.numel(), rows_k.numel(), prefixes[s], q.device)
        visible = torch.arange(rows_k.numel(), device=q.device) < limit[:, None]
        # a row that sees nothing keeps finite scores, or its softmax and its gradient would be NaN
        scores = scores.masked_fill(~visible & (limit > 0)[:, None], -torch.inf)
        accumulated = torch.promote_types(q.dtype, torch.float32)
        probabilities = torch.softmax(scores, -1, dtype=accumulated).masked_fill(~visible, 0.0)
        if dropout_seed is not None:
            head = torch.arange(q.shape[1], device=q.device)[:, None]
            kept = keep_mask(dropout_seed, head, rows_q, rows_k.numel(), dropout_p)
            probabilities = probabilities * kept / (1.0 - dropout_p)
        values = v[rows_k].repeat_interleave(q.shape[1] // v.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", probabilities.to(q.dtype), values))
        lses.append(torch.logsumexp(scores.detach().to(accumulated), -1).masked_fill(limit <= 0, -torch.inf))
    slack = q[starts_q[-1] :]
    out = torch.cat([*outs, slack.masked_fill(torch.ones_like(slack, dtype=torch.bool), 0.0)])
    out = out + (k[:0].sum() + v[:0].sum())  # 0: where there are no sequences, gradients are 0 and not missing
    if not return_lse:
        return out, None
    dtype = torch.promote_types(q.dtype, torch.float32)
    slack_lse = torch.full((q.shape[1], slack.shape[0]), -torch.inf, dtype=dtype, device=q.device)
    return out, torch.cat([*lses, slack_lse], 1)


def row_limit(len_q: int, len_k: int, prefix_len: int, device: torch.device) -> torch.Tensor:
    """int64 (len_q,): query i sees the keys [0, row_limit[i]), clamp(max(i + 1 + len_k - len_q, prefix), 0, len_k)."""
    rows = torch.arange(len_q, device=device)
    return (rows + 1 + len_k - len_q).clamp(min=prefix_len).clamp(0, len_k)


def _scores(q: torch.Tensor, k: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """(heads, len_q, len_k); each key head serves heads / kv_heads neighbouring query heads."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("qhd,khd->hqk", q, keys) * softmax_scale
