"""One dense block of attention, in two ways: with its probabilities in memory, or by torch's fused attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from antlm_fast.kernels.attention.torch_plan import Block
from antlm_fast.kernels.philox import keep_mask
from antlm_fast.kernels.tracing import first_order

# scores formed at a time on the CPU: what stays in cache; larger buffers cost page faults each time they are made
_SCORES_MIB = 4
# elements of one boolean mask that is handed to fused attention; longer blocks go through in runs of query rows
_MASK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Dropout:
    """The dropout of one block: its probability, the seed, and what names the mask: packed rows (num_seqs, len_q)."""

    p: float
    seed: torch.Tensor
    rows_q: torch.Tensor
    len_k: int

    def kept(self, seqs: slice, heads: int) -> torch.Tensor:
        """bool (num_seqs, heads, len_q, len_k), for some of the sequences."""
        every_head = torch.arange(heads, device=self.seed.device)[:, None]
        return keep_mask(self.seed, every_head, self.rows_q[seqs, None], self.len_k, self.p)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, softmax_scale: float) -> torch.Tensor:
    """torch's scaled_dot_product_attention, without a mask where the limits allow, else in runs of query rows.

    Args:
        q: (num_seqs, len_q, heads, head_dim).
        k, v: (num_seqs, len_k, kv_heads, head_dim).
        block: which keys each query sees.
        softmax_scale: multiplies the scores.
    """
    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if block.limits is None or block.causal:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=block.causal, scale=softmax_scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)
    step = max(1, _MASK_ELEMENTS // (block.limits.shape[0] * block.len_k))
    parts = []
    for start in range(0, block.len_q, step):
        limits = block.limits[:, start : start + step]
        # reading a limit is free on the CPU alone
        stop = max(int(limits.max()), 1) if limits.device.type == "cpu" else block.len_k
        seen = limits > 0
        # a row that sees nothing would be NaN: it sees everything, and is then cleared
        visible = torch.arange(stop, device=limits.device) < limits.where(seen, stop)[..., None]
        part = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, start : start + step],
            k[:, :, :stop],
            v[:, :, :stop],
            attn_mask=visible[:, None],
            scale=softmax_scale,
            enable_gqa=gqa,
        )
        parts.append(part.masked_fill(~seen[:, None, :, None], 0.0) if block.unseen else part)
    return torch.cat(parts, 2).transpose(1, 2)


def materialised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block: Block,
    softmax_scale: float,
    dropout: Dropout | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Matrix products around a softmax; the probabilities are kept for the backward.

    Args:
        q, k, v, block, softmax_scale: as for `fused`.
        dropout: None is none.
        return_lse: also give lse (num_seqs, heads, len_q).
    """
    keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _Materialised.apply(q, k, v, block, softmax_scale, dropout, return_lse, keep)


class _Materialised(torch.autograd.Function):
    """Inside, tensors are (num_seqs * kv_heads, group * len, head_dim): query heads that share keys are one product."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block: Block,
        softmax_scale: float,
        dropout: Dropout | None,
        return_lse: bool,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads, kv_heads = q.shape[2], k.shape[2]
        q, k, v = (_by_kv_head(x, kv_heads) for x in (q, k, v))
        out = torch.empty_like(q)
        step = _seqs_at_a_time(q, k, kv_heads)
        scores = q.new_empty(min(step, block.num_seqs) * kv_heads, q.shape[1], k.shape[1])
        probabilities = q.new_empty(q.shape[0], *scores.shape[1:]) if keep else torch.empty_like(scores)
        kept, lses = [], []
        for start in range(0, block.num_seqs, step):
            seqs = slice(start, min(start + step, block.num_seqs))
            part = slice(seqs.start * kv_heads, seqs.stop * kv_heads)
            s = scores[: part.stop - part.start]
            by_head = (seqs.stop - seqs.start, heads, block.len_q, block.len_k)
            torch.baddbmm(s, q[part], k[part].mT, beta=0.0, alpha=softmax_scale, out=s)
            limits = None
            if block.limits is not None:
                limits = block.limits[seqs] if block.limits.shape[0] > 1 else block.limits
                # adding 0 or -inf is several times faster than filling by a mask
                s.view(by_head).add_(_bias(limits, block, s.dtype))
            p = torch.softmax(s, -1, out=probabilities[part] if keep else probabilities[: s.shape[0]])
            if limits is not None and block.unseen:
                p.view(by_head).mul_((limits > 0).to(p.dtype)[:, None, :, None])
            if return_lse:
                lses.append(_lse(s.view(by_head), limits))
            if dropout is not None:
                kept.append(dropout.kept(seqs, heads).view(p.shape))
                p = p * _as_numbers(kept[-1], p.dtype)
            kept_scale = 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)
            torch.baddbmm(out[part], p, v[part], beta=0.0, alpha=kept_scale, out=out[part])
        if keep:
            ctx.save_for_backward(q, k, v, probabilities, torch.cat(kept) if kept else None)
            ctx.softmax_scale, ctx.dropout_p = softmax_scale, 0.0 if dropout is None else dropout.p
            ctx.num_seqs, ctx.heads, ctx.kv_heads = block.num_seqs, heads, kv_heads
        lse = torch.cat(lses) if lses else None
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return _by_row(out, block.num_seqs, heads, kv_heads), lse

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, d_out: torch.Tensor, _: Any) -> Any:
        q, k, v, probabilities, kept = ctx.saved_tensors
        scale, kept_scale = ctx.softmax_scale, 1.0 / (1.0 - ctx.dropout_p)
        with torch.autocast(q.device.type, enabled=False):
            d_out = _by_kv_head(d_out, ctx.kv_heads)
            d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            rows = _seqs_at_a_time(q, k, ctx.kv_heads) * ctx.kv_heads
            d_p_buffer = q.new_empty(min(rows, q.shape[0]), *probabilities.shape[1:])
            d_s_buffer = torch.empty_like(d_p_buffer)
            for start in range(0, q.shape[0], rows):
                part = slice(start, min(start + rows, q.shape[0]))
                p, g = probabilities[part], d_out[part]
                d_p, d_s = d_p_buffer[: p.shape[0]], d_s_buffer[: p.shape[0]]
                numbers, dropped = None, p
                if kept is not None:
                    numbers = _as_numbers(kept[part], p.dtype)
                    dropped = torch.mul(p, numbers, out=d_s)  # free until later
                torch.baddbmm(d_v[part], dropped.mT, g, beta=0.0, alpha=kept_scale, out=d_v[part])
                torch.baddbmm(d_p, g, v[part].mT, beta=0.0, alpha=kept_scale, out=d_p)
                if numbers is not None:
                    d_p.mul_(numbers)
                # one pass with float32 sums; what autograd itself runs for a softmax
                torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_s)
                torch.baddbmm(d_q[part], d_s, k[part], beta=0.0, alpha=scale, out=d_q[part])
                torch.baddbmm(d_k[part], d_s.mT, q[part], beta=0.0, alpha=scale, out=d_k[part])
            d_q = _by_row(d_q, ctx.num_seqs, ctx.heads, ctx.kv_heads)
            d_k, d_v = (_by_row(x, ctx.num_seqs, ctx.kv_heads, ctx.kv_heads) for x in (d_k, d_v))
        return d_q, d_k, d_v, None, None, None, None, None


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(num_seqs, len, heads, head_dim) -> (num_seqs * kv_heads, heads / kv_heads * len, head_dim)."""
    num_seqs, length, heads, head_dim = x.shape
    grouped = x.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)
    return grouped.reshape(num_seqs * kv_heads, heads // kv_heads * length, head_dim)


def _by_row(x: torch.Tensor, num_seqs: int, heads: int, kv_heads: int) -> torch.Tensor:
    """The way back, as a view with the strides of (num_seqs, heads, len, head_dim)."""
    length = x.shape[1] // (heads // kv_heads)
    return x.view(num_seqs, heads, length, x.shape[2]).transpose(1, 2)


def _as_numbers(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 and 1; from bytes, since bools are converted one at a time."""
    return kept.view(torch.uint8).to(dtype)


def _seqs_at_a_time(q: torch.Tensor, k: torch.Tensor, kv_heads: int) -> int:
    num_seqs = q.shape[0] // kv_heads
    if q.device.type != "cpu":
        return max(1, num_seqs)
    scores_of_one = kv_heads * q.shape[1] * k.shape[1] * q.element_size()
    return max(1, _SCORES_MIB * 2**20 // max(1, scores_of_one))


def _bias(limits: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """(sequences, 1, len_q, len_k): 0 where a key is seen, else -inf; all 0 for a row that sees nothing."""
    if block.unseen:
        limits = limits.masked_fill(limits <= 0, block.len_k)
    visible = torch.arange(block.len_k, device=limits.device) < limits[..., None]
    zero, hidden = torch.zeros((), dtype=dtype, device=limits.device), float("-inf")
    return torch.where(visible, zero, hidden)[:, None]


def _lse(scores: torch.Tensor, limits: torch.Tensor | None) -> torch.Tensor:
    """(sequences, heads, len_q), -inf for a row that sees nothing."""
    if not scores.shape[-1]:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return torch.full(scores.shape[:-1], -torch.inf, dtype=dtype, device=scores.device)
    lse = torch.logsumexp(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)
    return lse if limits is None else lse.masked_fill((limits <= 0)[:, None], -torch.inf)
