"""Disentangled attention out of torch's own operations.

On the CPU sequences are grouped by length, as plain attention groups them, and a group's probabilities are kept for
the backward while one head's score matrix is small (1 MiB: float32 up to 512 tokens, bfloat16 up to 724). Beyond
that they are formed again, some query rows at a time, so that memory grows with the length alone.

Elsewhere nothing is read from the device: all sequences are padded to the longest, and queries with positions of their
own are put where the queries of those places would be.
"""

from __future__ import annotations

import torch

from antlm_fast.kernels.attention.torch_rows import no_lse, nothing_to_see, pad, parts, unpad, unpad_lse
from antlm_fast.kernels.disentangled_attention.torch_layout import Packing, device_layout, host_layout
from antlm_fast.kernels.disentangled_attention.torch_scores import Call, run_block
from antlm_fast.kernels.tracing import check_no_transform

# of one head's scores: from here on they are formed again in the backward
_MATERIALISED_KIB = 1024


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
    """Packed attention; arguments as in the api, with one prefix length for all (int) or for each sequence."""
    check_no_transform("disentangled_attention")
    heads, total_q, total_k = q.shape[1], q.shape[0], k.shape[0]
    nothing = not (q.numel() and k.numel() and cu_seqlens_q.numel() > 1 and max_seqlen_q and max_seqlen_k)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, total_q, total_k, prefix_len)
    on_host = _host_may_read(q)
    if not nothing:
        layout = host_layout(packing, positions_q, _max_scores(q)) if on_host else device_layout(packing, positions_q)
        plan, nothing = layout.plan, not layout.plan.blocks
    if nothing:
        return nothing_to_see(q, k, v, q_rel, k_rel), no_lse(q, (heads, total_q)) if return_lse else None
    q = _cleared(pad(q, plan.map_q), layout.real_q)
    k, v = (_cleared(pad(x, plan.map_k), layout.real_k) for x in (k, v))
    sizes_q = [block.num_seqs * block.len_q for block in plan.blocks]
    sizes_k = [block.num_seqs * block.len_k for block in plan.blocks]
    outs, lses = [], []
    for block, places, part_q, part_k, part_v in zip(
        plan.blocks, layout.places, parts(q, sizes_q), parts(k, sizes_k), parts(v, sizes_k), strict=True
    ):
        keep = block.len_q * block.len_k <= _max_scores(q)
        call = Call(
            block, places, max_position, softmax_scale, dropout_p, dropout_seed, return_lse, keep=keep, on_host=on_host
        )
        out, lse = run_block(part_q, part_k, part_v, q_rel, k_rel, call)
        outs.append(out)
        if lse is not None:
            lses.append(lse)
    out = unpad(torch.cat(outs) if len(outs) > 1 else outs[0], plan.map_q)
    return out, unpad_lse(torch.cat(lses, 1), plan.map_q) if lses else None


def _host_may_read(x: torch.Tensor) -> bool:
    """Lengths and flags are the host's on the CPU; elsewhere reading one would stall the device."""
    return x.device.type == "cpu"


def _max_scores(q: torch.Tensor) -> int:
    return _MATERIALISED_KIB * 2**10 // q.element_size()


def _cleared(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Padding slots may name slack rows, which hold anything; sums over all rows must not meet them."""
    return x if real is None else x.masked_fill(~real, 0.0)
