"""Attention out of torch's own operations.

On the CPU sequences are grouped by length, and a group's probabilities are kept for the backward while one head's
score matrix is small (512 KiB: float32 up to 362 tokens, bfloat16 up to 512); beyond that torch's fused attention keeps
memory linear. Without gradients fused attention serves small groups too, if they are unmasked or plainly causal.
Fused attention gives no lse and has a dropout of its own, so return_lse and dropout_p keep probabilities at any length.

On CUDA nothing is read from the device. A dense batch with a Python flag (and as many keys as queries, if causal) runs
fused attention without a mask; a tensor flag, prefix lengths, other shapes and packed sequences (padded to the longest)
build a boolean mask on the device and run fused attention with it, in runs of query rows; return_lse and dropout_p keep
the probabilities.
"""

from __future__ import annotations

import torch

from antlm_fast.kernels.attention.torch_dense import Dropout, fused, materialised
from antlm_fast.kernels.attention.torch_plan import Block, Plan, dense_device_plan, device_plan, host_plan, prefixes
from antlm_fast.kernels.attention.torch_rows import (
    is_trivial,
    no_lse,
    nothing_to_see,
    packed_rows,
    pad,
    parts,
    unpad,
    unpad_lse,
)
from antlm_fast.kernels.tracing import check_no_transform

# of one head's scores: from here on, on the CPU, fused attention wins
_MATERIALISED_KIB = 512


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
    check_no_transform("attention")
    batch, len_q, heads, _ = q.shape
    len_k = k.shape[1]
    if not q.numel() or not k.numel():
        return nothing_to_see(q, k, v), no_lse(q, (batch, heads, len_q)) if return_lse else None
    if _host_may_read(q):
        starts_q, starts_k = tuple(range(0, (batch + 1) * len_q, len_q)), tuple(range(0, (batch + 1) * len_k, len_k))
        plan = host_plan(starts_q, starts_k, prefixes(prefix_len, batch), batch * len_q, batch * len_k, _max_scores(q))
    else:
        plan = dense_device_plan(batch, len_q, len_k, prefix_len, q.device)
    if is_trivial(plan):
        return _run_block(q, k, v, plan.blocks[0], softmax_scale, dropout_p, dropout_seed, return_lse, None)
    out, lse = _run(
        plan, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), softmax_scale, dropout_p, dropout_seed, return_lse
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
    check_no_transform("attention")
    num_seqs = cu_seqlens_q.numel() - 1
    if not (q.numel() and k.numel() and num_seqs and max_seqlen_q and max_seqlen_k):
        return nothing_to_see(q, k, v), no_lse(q, (q.shape[1], q.shape[0])) if return_lse else None
    if _host_may_read(q):
        starts_q, starts_k = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())
        plan = host_plan(starts_q, starts_k, prefixes(prefix_len, num_seqs), q.shape[0], k.shape[0], _max_scores(q))
    else:
        plan = device_plan(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, prefix_len, q.shape[0], k.shape[0])
    return _run(plan, q, k, v, softmax_scale, dropout_p, dropout_seed, return_lse)


def _run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A plan over packed rows: pad, run each block, unpad."""
    if not plan.blocks:
        return nothing_to_see(q, k, v), no_lse(q, (q.shape[1], q.shape[0])) if return_lse else None
    q, k, v = pad(q, plan.map_q), pad(k, plan.map_k), pad(v, plan.map_k)
    sizes_q = [block.num_seqs * block.len_q for block in plan.blocks]
    sizes_k = [block.num_seqs * block.len_k for block in plan.blocks]
    outs, lses = [], []
    first_q = 0
    for block, part_q, part_k, part_v in zip(
        plan.blocks, parts(q, sizes_q), parts(k, sizes_k), parts(v, sizes_k), strict=True
    ):
        rows_q = None
        if dropout_seed is not None:
            rows_q = packed_rows(plan.map_q, first_q, block, q.device)
        first_q += part_q.shape[0]
        out, lse = _run_block(
            part_q.unflatten(0, (block.num_seqs, block.len_q)),
            part_k.unflatten(0, (block.num_seqs, block.len_k)),
            part_v.unflatten(0, (block.num_seqs, block.len_k)),
            block,
            softmax_scale,
            dropout_p,
            dropout_seed,
            return_lse,
            rows_q,
        )
        outs.append(out.flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    out = unpad(torch.cat(outs) if len(outs) > 1 else outs[0], plan.map_q)
    if not lses:
        return out, None
    return out, unpad_lse(torch.cat(lses, 1), plan.map_q)


def _run_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block: Block,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
    rows_q: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One block, q (num_seqs, len_q, heads, head_dim); rows_q name its packed rows, None: they count up from 0."""
    if dropout_seed is None and not return_lse and _fused_is_better(q, k, v, block):
        return fused(q, k, v, block, softmax_scale), None
    dropout = None
    if dropout_seed is not None:
        if rows_q is None:
            rows_q = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(q.shape[:2])
        dropout = Dropout(dropout_p, dropout_seed, rows_q, k.shape[1])
    return materialised(q, k, v, block, softmax_scale, dropout, return_lse)


def _host_may_read(x: torch.Tensor) -> bool:
    """Lengths and flags are the host's on the CPU; elsewhere reading one would stall the device."""
    return x.device.type == "cpu"


def _fused_is_better(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> bool:
    if not _host_may_read(q) or block.len_q * block.len_k > _max_scores(q):
        return True
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    unmasked = block.limits is None or block.causal
    return unmasked and not trains and block.len_q > 0 and block.len_k > 0


def _max_scores(q: torch.Tensor) -> int:
    return _MATERIALISED_KIB * 2**10 // q.element_size()
