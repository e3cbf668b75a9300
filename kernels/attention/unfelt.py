"""Keys that no query sees and queries that see no key: cleared, so that nothing feels them, whatever they hold.

A kernel multiplies what is masked by 0, and NaN would stay. Where every sequence has as many keys as queries, each sees
and is seen, and nothing is done.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from antlm_fast.kernels.tracing import is_plain


def clear(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """x (..., heads, head_dim) with 0 where the mask (...) is; its gradient is 0 there. None is x itself."""
    return x if mask is None else x.masked_fill(mask[..., None, None], 0.0)


def unfelt_rows(
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: int | torch.Tensor,
    positions_q: torch.Tensor | None,
    total_q: int,
    total_k: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(bool (total_q,): queries that see nothing, bool (total_k,): keys that nobody sees); None where there are none.

    Give the same tensor for both where queries and keys have one packing: then nothing is looked at.

    Args: as of api.attention_varlen and api.disentangled_attention_varlen, with one prefix length for all (int) or for
        each. Values are read on the CPU alone.
    """
    if (cu_q is cu_k and positions_q is None) or cu_q.numel() == 1:
        return None, None
    # what is read here would be a constant of a graph that is recorded
    if cu_q.device.type == "cpu" and is_plain(cu_q, cu_k, prefix_len, positions_q):
        return _on_host(cu_q, cu_k, prefix_len, positions_q, total_q, total_k)
    len_q, len_k = cu_q.diff(), cu_k.diff()
    last = len_k
    if positions_q is not None:
        of_last = positions_q[(cu_q[1:] - 1).clamp(min=0)] if total_q else torch.zeros_like(len_q)
        last = (of_last + 1).clamp(min=prefix_len).minimum(len_k)
    last = last.where(len_q > 0, 0)
    blind = None
    if positions_q is None:
        row, seq = _rows(cu_q, total_q)
        blind = row < (len_q - len_k)[seq]
        blind = blind & ((prefix_len if isinstance(prefix_len, int) else prefix_len[seq]) <= 0) | (len_k[seq] == 0)
    key, seq = _rows(cu_k, total_k)
    return blind, key >= last[seq]


def _rows(cu: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's place in its sequence, and the sequence; slack is of the last."""
    row = torch.arange(total, dtype=cu.dtype, device=cu.device)
    seq = torch.searchsorted(cu[1:], row, right=True).clamp(max=cu.numel() - 2)
    return row - cu[seq], seq


def _on_host(
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: int | torch.Tensor,
    positions_q: torch.Tensor | None,
    total_q: int,
    total_k: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    if starts_q == starts_k and positions_q is None:
        return None, None
    positions = None if positions_q is None else positions_q.tolist()
    prefixes = [prefix_len] * (len(starts_q) - 1) if isinstance(prefix_len, int) else prefix_len.tolist()
    blind, unseen = [], []
    for (start_q, stop_q), (start_k, stop_k), prefix in zip(
        pairwise(starts_q), pairwise(starts_k), prefixes, strict=True
    ):
        len_q, len_k = stop_q - start_q, stop_k - start_k
        if positions is None and len_q > len_k and (prefix <= 0 or len_k == 0):
            blind.append(slice(start_q, stop_q - len_k))
        seen = 0
        if len_q:
            seen = len_k if positions is None else min(max(positions[stop_q - 1] + 1, prefix), len_k)
        if seen < len_k:
            unseen.append(slice(start_k + seen, stop_k))
    return _mask(blind, total_q), _mask(unseen, total_k)


def _mask(runs: list[slice], total: int) -> torch.Tensor | None:
    if not runs:
        return None
    mask = torch.zeros(total, dtype=torch.bool, device="cpu")
    for run in runs:
        mask[run] = True
    return mask
