"""Linear cross-entropy out of torch's own operations: a chunk of rows at a time, so that logits never all exist.

Where a sum is asked for and gradients will be, a chunk's gradients are formed while its logits are at hand, and only
scaled in the backward. Where the loss of each row is asked for, the backward projects again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# float32 logits of one chunk; fewer rows at a time cost passes over the weight's gradient, more cost page faults
CHUNK_WORKSPACE_MIB = 32


@dataclass(frozen=True)
class _Loss:
    """The options of the loss, and the dtype of the products."""

    compute_dtype: torch.dtype
    z_loss: float
    label_smoothing: float
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.compute_dtype, torch.float32)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    *,
    compute_dtype: torch.dtype,
    reduce: bool,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row (n,), or with `reduce` their sum (), and the lse (n,).

    Args:
        hidden, weight, bias, targets: as in the public function, labelled rows alone (n of them).
        counts: bool (n,), which rows count after all; None is all. The others may have any target.
        compute_dtype: of the products.
        reduce: sum over the rows.
        z_loss, label_smoothing, softcap: as in the public function.
    """
    loss = _Loss(compute_dtype, z_loss, label_smoothing, softcap)
    if counts is not None:
        targets = targets.where(counts, 0)
    inputs = (hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    if not any(wanted):
        losses, lse, _ = _losses(hidden, weight, bias, targets, counts, loss, (False, False, False))
        return (losses.sum() if reduce else losses), lse
    function = _SummedLoss if reduce else _RowLosses
    return function.apply(hidden, weight, bias, targets, counts, loss, wanted)


class _SummedLoss(torch.autograd.Function):
    """The sum over rows; gradients are formed in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, counts, loss, wanted):  # type: ignore[no-untyped-def]
        losses, lse, gradients = _losses(hidden, weight, bias, targets, counts, loss, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        ctx.mark_non_differentiable(lse)
        return losses.sum(), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> Any:
        scaled = [
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


class _RowLosses(torch.autograd.Function):
    """The loss of each row; the backward forms each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, counts, loss, wanted):  # type: ignore[no-untyped-def]
        losses, lse, _ = _losses(hidden, weight, bias, targets, counts, loss, (False, False, False))
        ctx.save_for_backward(hidden, weight, bias, targets, counts)
        ctx.loss, ctx.wanted = loss, wanted
        ctx.mark_non_differentiable(lse)
        return losses, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> Any:
        hidden, weight, bias, targets, counts = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            _, _, gradients = _losses(hidden, weight, bias, targets, counts, ctx.loss, ctx.wanted, upstream)
        cast = [
            None if gradient is None else gradient.to(x.dtype)
            for gradient, x in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return *cast, None, None, None, None


def _losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    loss: _Loss,
    wanted: tuple[bool, bool, bool],
    upstream: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Losses (n,), lse (n,), and the wanted gradients of sum(losses * upstream) by hidden, weight and bias.

    The hidden gradient is in the compute dtype, the others in the loss's.
    """
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    weight = weight.detach().to(loss.compute_dtype)
    bias = None if bias is None else bias.detach().to(loss.compute_dtype)
    losses, lse = (torch.empty(num_rows, dtype=loss.dtype, device=hidden.device) for _ in range(2))
    d_hidden = torch.empty_like(hidden, dtype=loss.compute_dtype) if wanted[0] else None
    new_weight = torch.empty_like if num_rows else torch.zeros_like
    d_weight = new_weight(weight, dtype=loss.dtype) if wanted[1] else None
    d_bias = torch.zeros(vocab_size, dtype=loss.dtype, device=hidden.device) if wanted[2] else None
    chunk_rows = max(1, CHUNK_WORKSPACE_MIB * 2**20 // (4 * vocab_size))
    for start in range(0, num_rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        x = hidden[chunk].detach().to(loss.compute_dtype)
        counted = None if counts is None else counts[chunk]
        log_p, slope = _log_probabilities(x, weight, bias, loss, losses[chunk], lse[chunk], targets[chunk], counted)
        if not any(wanted):
            continue
        scale = None if upstream is None else upstream[chunk].to(loss.dtype)
        if counted is not None:
            scale = counted.to(loss.dtype) if scale is None else scale.where(counted, 0.0)
        d_logits = _d_logits(log_p, slope, lse[chunk], targets[chunk], scale, loss)
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        d_logits = d_logits.to(loss.compute_dtype)
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[chunk])
        if d_weight is not None:
            _add_product(d_weight, d_logits.t(), x, first=start == 0)
    return losses, lse, (d_hidden, d_weight, d_bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total += a @ b; the first product is stored instead, so that total need not be cleared."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _log_probabilities(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    loss: _Loss,
    losses: torch.Tensor,
    lse: torch.Tensor,
    targets: torch.Tensor,
    counted: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One chunk: writes its losses and lse; gives log p (rows, vocab) and, under a softcap, d capped / d logit."""
    logits = torch.nn.functional.linear(x, weight, bias).to(loss.dtype)
    slope = None
    if loss.softcap is not None:
        slope = logits.div_(loss.softcap).tanh_()
        logits = slope * loss.softcap
        slope = slope.square_().neg_().add_(1.0)
    log_p = torch.log_softmax(logits, -1)
    target = targets[:, None]
    target_log_p = log_p.gather(1, target).squeeze(1)
    # the normaliser, from the target's two values: both are finite, whatever the other logits are
    torch.sub(logits.gather(1, target).squeeze(1), target_log_p, out=lse)
    torch.mul(target_log_p, loss.label_smoothing - 1.0, out=losses)
    if loss.label_smoothing:
        losses.sub_(log_p.mean(-1), alpha=loss.label_smoothing)
    if loss.z_loss:
        losses.addcmul_(lse, lse, value=loss.z_loss)
    if counted is not None:
        losses.masked_fill_(~counted, 0.0)
        lse.masked_fill_(~counted, 0.0)
    return log_p, slope


def _d_logits(
    log_p: torch.Tensor,
    slope: torch.Tensor | None,
    lse: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | None,
    loss: _Loss,
) -> torch.Tensor:
    """The gradient by the logits, in the loss's dtype, in log_p's memory.

    Rounding comes after the target's 1 is taken off: p - 1 in bfloat16 would be all error where p is near 1.
    """
    d_logits = log_p.exp_()
    if loss.z_loss:
        d_logits.mul_((1.0 + 2.0 * loss.z_loss * lse)[:, None])
    if loss.label_smoothing:
        d_logits.sub_(loss.label_smoothing / log_p.shape[1])
    target = targets[:, None]
    d_logits.scatter_add_(1, target, d_logits.new_full((), loss.label_smoothing - 1.0).expand(target.shape))
    if slope is not None:
        d_logits.mul_(slope)
    if scale is not None:
        d_logits.mul_(scale[:, None])
    return d_logits
