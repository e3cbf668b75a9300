"""Disentangled attention as it is defined: one sequence at a time, every score in memory. The specification."""

from __future__ import annotations

from itertools import pairwise

import torch

from antlm_fast.kernels.disentangled_attention.buckets import relative_bucket
from antlm_fast.kernels.philox import keep_mask


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
    prefix_len: int | torch.Tensor,
    positions_q: torch.Tensor | None,
    *,
    max_position: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed attention; rows past the last sequence stay 0, and their lse -inf. Reads the lengths on the host."""
    num_seqs = cu_seqlens_q.numel() - 1
    prefixes = [prefix_len] * num_seqs if isinstance(prefix_len, int) else prefix_len.tolist()
    accumulated = torch.promote_types(q.dtype, torch.float32)
    starts = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), prefixes, strict=True)
    outs, lses = [], []
    for (start_q, stop_q), (start_k, stop_k), prefix in starts:
        len_q, len_k = stop_q - start_q, stop_k - start_k
        rows = torch.arange(start_q, stop_q, device=q.device)
        keys = torch.arange(len_k, device=q.device)
        positions = torch.arange(len_q, device=q.device) + len_k - len_q
        if positions_q is not None:
            positions = positions_q[start_q:stop_q].long()
            rows = start_k + positions
        scores = softmax_scale * _scores(
            q[start_q:stop_q], k[start_k:stop_k], q_rel, k_rel, positions[:, None] - keys, max_position
        )
        limit = (positions + 1).clamp(min=prefix).clamp(0, len_k)
        visible = keys < limit[:, None]
        # a row that sees nothing keeps finite scores, or its softmax and its gradient would be NaN
        scores = scores.masked_fill(~visible & (limit > 0)[:, None], -torch.inf)
        probabilities = torch.softmax(scores, -1, dtype=accumulated).masked_fill(~visible, 0.0)
        if dropout_seed is not None:
            head = torch.arange(q.shape[1], device=q.device)[:, None]
            probabilities = probabilities * keep_mask(dropout_seed, head, rows, len_k, dropout_p) / (1.0 - dropout_p)
        outs.append(torch.einsum("hqk,khd->qhd", probabilities.to(q.dtype), v[start_k:stop_k]))
        lses.append(torch.logsumexp(scores.detach().to(accumulated), -1).masked_fill(limit <= 0, -torch.inf))
    slack = q[cu_seqlens_q[-1] :]
    out = torch.cat([*outs, slack.masked_fill(torch.ones_like(slack, dtype=torch.bool), 0.0)])
    # 0: where there are no sequences, gradients are 0 and not missing
    out = out + sum(x[:0].sum() for x in (k, v, q_rel, k_rel) if x is not None)
    if not return_lse:
        return out, None
    slack_lse = torch.full((q.shape[1], slack.shape[0]), -torch.inf, dtype=accumulated, device=q.device)
    return out, torch.cat([*lses, slack_lse], 1)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    distance: torch.Tensor,
    max_position: int,
) -> torch.Tensor:
    """(heads, len_q, len_k): q_i.k_j + q_i.k_rel[b] + k_j.q_rel[b], b the bucket of distance (len_q, len_k)."""
    scores = torch.einsum("qhd,khd->hqk", q, k)
    table = q_rel if k_rel is None else k_rel
    if table is None:
        return scores
    bucket_size = (int(table.shape[0]) + 1) // 2
    row = relative_bucket(distance, bucket_size=bucket_size, max_position=max_position) + bucket_size - 1
    if k_rel is not None:
        scores = scores + torch.einsum("qhd,qkhd->hqk", q, _rows_of(k_rel, row))
    if q_rel is not None:
        scores = scores + torch.einsum("khd,qkhd->hqk", k, _rows_of(q_rel, row))
    return scores


def _rows_of(table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """table[row], whose gradient is summed in float32 (float64 for float64)."""
    return table.to(torch.promote_types(table.dtype, torch.float32))[row].to(table.dtype)
