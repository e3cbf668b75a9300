"""What others offer for attention, disentangled attention, head and loss, and layers, behind one call signature each.

Imports stand inside the calls: what is not installed, or refuses this device, raises there, and becomes a row's reason.

    attention(q, k, v, *, causal)               (batch, seqlen, heads, head_dim), "heads first": (batch, heads, ...)
    disentangled(q, k, v, q_rel, k_rel, *, causal)   tables (2B - 1, heads, head_dim)
    cross_entropy(hidden, weight, *, targets)   mean over the labelled rows
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peers import eager_ltg_bert

MAX_POSITION = 512


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def flex_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Compiled, as it is meant to be; its block mask is made once for a length, outside what is timed."""
    return compiled_flex()(q, k, v, block_mask=_block_mask(q.shape[-2], str(q.device)) if causal else None)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention, dynamic=False)


@functools.cache
def _block_mask(seqlen: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen, device=device)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)


def xformers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else None)


# name -> (function, whether heads come before the length)
ATTENTION: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "SDPA": (sdpa, True),
    "eager bmm + softmax": (eager_attention, True),
    "FlexAttention": (flex_attention, True),
    "flash-attn": (flash_attn, False),
    "xformers": (xformers, False),
}


def eager_disentangled(
    q: Tensor, k: Tensor, v: Tensor, q_rel: Tensor, k_rel: Tensor, *, causal: bool, form: str
) -> Tensor:
    rows = eager_ltg_bert.bucket_rows(q.shape[1], (q_rel.shape[0] + 1) // 2, MAX_POSITION, str(q.device))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q_rel, k_rel = (x.transpose(0, 1) for x in (q_rel, k_rel))
    out = eager_ltg_bert.disentangled_attention(q, k, v, q_rel, k_rel, rows, causal=causal, form=form)
    return out.transpose(1, 2)


def flash_deberta(q: Tensor, k: Tensor, v: Tensor, q_rel: Tensor, k_rel: Tensor, *, causal: bool) -> Tensor:
    """FlashDeBERTa 0.0.8."""
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    buckets = (q_rel.shape[0] + 1) // 2
    c2p, p2c = (_with_a_row_before(x)[None] for x in (k_rel, q_rel))
    scale = (3 * q.shape[-1]) ** -0.5
    out = flash_attention_with_disentangled(q, k, v, None, c2p, p2c, causal, scale, buckets, MAX_POSITION)
    return out.transpose(1, 2)


def disentangled_flash(q: Tensor, k: Tensor, v: Tensor, q_rel: Tensor, k_rel: Tensor, *, causal: bool) -> Tensor:
    """DisentangledFlash 1.1.1, by its training function; it is bidirectional only."""
    from disentangled_flash.position import pad_position_table
    from disentangled_flash.training._kernels import training_attention

    if causal:
        raise RuntimeError("DisentangledFlash is bidirectional only")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    plan = _disentangled_flash_plans((q_rel.shape[0] + 1) // 2).compact(q.shape[2], q.device)
    c2p, p2c = (
        pad_position_table(_with_a_row_before(x).index_select(1, plan.active_slots)).contiguous()
        for x in (k_rel, q_rel)
    )
    mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    out = training_attention(
        q,
        k,
        v,
        c2p,
        p2c,
        plan.delta_to_local,
        mask,
        score_scale=(3 * q.shape[-1]) ** -0.5,
        has_padding=False,
        strict_fp32=True,
        gradient_band=plan.gradient_band,
    )
    return out.transpose(1, 2)


@functools.cache
def _disentangled_flash_plans(buckets: int) -> Any:
    from disentangled_flash.position import SharedPositionPlanCache

    return SharedPositionPlanCache(
        position_buckets=buckets, max_relative_positions=MAX_POSITION, position_embedding_size=buckets
    )


def _with_a_row_before(table: Tensor) -> Tensor:
    """(heads, 2B, head_dim) of a table (2B - 1, heads, head_dim): DeBERTa has a row for bucket -B too, unused here."""
    return F.pad(table, (0, 0, 0, 0, 1, 0)).transpose(0, 1)


def flex_disentangled(q: Tensor, k: Tensor, v: Tensor, q_rel: Tensor, k_rel: Tensor, *, causal: bool) -> Tensor:
    """FlexAttention with both terms as a score modification that reads the two products with the table."""
    rows = eager_ltg_bert.bucket_rows(q.shape[1], (q_rel.shape[0] + 1) // 2, MAX_POSITION, str(q.device))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    to_place, to_content = q @ k_rel.permute(1, 2, 0), k @ q_rel.permute(1, 2, 0)
    scale = (3 * q.shape[-1]) ** -0.5

    def add_terms(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + (to_place[b, h, i, rows[i, j]] + to_content[b, h, j, rows[i, j]]) * scale

    mask = _block_mask(q.shape[-2], str(q.device)) if causal else None
    return compiled_flex()(q, k, v, score_mod=add_terms, block_mask=mask, scale=scale).transpose(1, 2)


DISENTANGLED: dict[str, Callable[..., Tensor]] = {
    "gathered into the scores": functools.partial(eager_disentangled, form="gathered"),
    "einsum over gathered tables": functools.partial(eager_disentangled, form="einsum"),
    "FlexAttention": flex_disentangled,
    "FlashDeBERTa": flash_deberta,
    "DisentangledFlash": disentangled_flash,
}


def full_logits(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_chunked(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    """torch's own linear_cross_entropy (torch >= 2.13); without options it is the logits of all rows."""
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def of_labelled_rows(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    kept = (targets != -100).nonzero().squeeze(1)
    return function(hidden.index_select(0, kept), weight, targets=targets.index_select(0, kept))


def compiled_logits(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    """Inductor's, on labelled rows."""
    return of_labelled_rows(_compiled_full_logits(), hidden, weight, targets=targets)


@functools.cache
def _compiled_full_logits() -> Callable[..., Tensor]:
    return torch.compile(full_logits, dynamic=False)


def liger_loss(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets)


# "logits of all rows" is what stock models do; the others may leave out the rows without a label
CROSS_ENTROPY: dict[str, Callable[..., Tensor]] = {
    "logits of all rows": full_logits,
    "logits of labelled rows": functools.partial(of_labelled_rows, full_logits),
    "logits of labelled rows, compiled": compiled_logits,
    "F.linear_cross_entropy": functools.partial(of_labelled_rows, torch_chunked),
    "Liger": functools.partial(of_labelled_rows, liger_loss),
    "cut-cross-entropy": cut_cross_entropy,
}


def liger_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    total = x + residual
    return LigerRMSNormFunction.apply(total, weight, eps), total


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def liger_geglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)
