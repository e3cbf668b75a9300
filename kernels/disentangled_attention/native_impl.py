"""Disentangled attention by the C++ kernels: attention's own, which form the relative terms where they are needed."""

from __future__ import annotations

import torch

from antlm_fast.kernels.attention.native_impl import attend


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
    """Arguments as in api.disentangled_attention_varlen, with one prefix length for all (int) or for each sequence."""
    return attend(
        q,
        k,
        v,
        q_rel,
        k_rel,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        prefix_len,
        positions_q,
        max_position,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
    )
