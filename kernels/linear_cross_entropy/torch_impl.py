"""Linear cross-entropy out of torch's own operations: a chunk of rows at a time, so that logits never all exist.

A chunk's logits are one product. What follows runs on blocks of rows that stay in cache and turns the logits into their
gradient in place, while they are at hand. Where one chunk holds all rows, that gradient is kept for the backward, whose
two products take the upstream gradient in passing; where there are more, each chunk's products are formed at once and
added up in float32. Where the loss of each row is asked for, the backward projects again.
"""

from __future__ import annotations

from typing import Any

import torch

from antlm_fast.kernels.linear_cross_entropy.contract import LossOptions, RowResults
from antlm_fast.kernels.tracing import check_no_transform, first_order

# logits of one block, in the loss's dtype: what a core's cache holds
_BLOCK_KIB = 1024
# a float16 product sums no more rows than this, or it might pass 65504
_FLOAT16_ROWS = 4096


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    options: LossOptions,
) -> RowResults:
    """The loss of n rows.

    Args:
        hidden, weight, bias, targets: as in the public function, labelled rows alone (n of them).
        counts: bool (n,), which rows count after all; None is all. The others may have any target.
        options: how.
    """
    if counts is not None:
        targets = targets.where(counts, 0)
    inputs = (hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    if not any(wanted):
        run = _Run(hidden, weight, bias, targets, counts, options)
        for chunk in run.chunks():
            run.logits_of(chunk)
        return RowResults(run.losses.sum() if options.reduce else run.losses, run.losses, run.lse, run.correct)
    check_no_transform("linear_cross_entropy")
    function = _SummedLoss if options.reduce else _RowLosses
    return RowResults(*function.apply(hidden, weight, bias, targets, counts, options, wanted))


class _SummedLoss(torch.autograd.Function):
    """The sum over rows; the gradient by the logits is formed in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, counts, options, wanted):  # type: ignore[no-untyped-def]
        run = _Run(hidden, weight, bias, targets, counts, options)
        chunks = run.chunks()
        if len(chunks) == 1:
            ctx.gradients = None
            ctx.save_for_backward(run.hidden, run.weight, run.d_logits_of(chunks[0], None))
        else:
            gradients = run.gradients(chunks, wanted, None)
            ctx.gradients = True
            ctx.save_for_backward(*gradients)
        ctx.options, ctx.wanted = options, wanted
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        return _outputs(ctx, run, run.losses.sum())

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            hidden, weight, d_logits = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                gradients = _products(hidden, weight, d_logits, upstream, ctx.wanted, ctx.options)
        else:
            # in the loss's dtype: a loss scale would take float16 out of range
            gradients = tuple(None if x is None else x.to(ctx.options.dtype) * upstream for x in ctx.saved_tensors)
        return *_cast(gradients, ctx.dtypes), None, None, None, None


class _RowLosses(torch.autograd.Function):
    """The loss of each row; the backward forms each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, counts, options, wanted):  # type: ignore[no-untyped-def]
        run = _Run(hidden, weight, bias, targets, counts, options)
        for chunk in run.chunks():
            run.logits_of(chunk)
        ctx.save_for_backward(hidden, weight, bias, targets, counts)
        ctx.options, ctx.wanted = options, wanted
        return _outputs(ctx, run, run.losses.clone())

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> Any:
        hidden, weight, bias, targets, counts = ctx.saved_tensors
        scale = None
        if ctx.options.compute_dtype == torch.float16 and upstream.numel():
            # what is rounded to float16 must neither overflow nor vanish, whatever the loss is scaled by
            largest = upstream if counts is None else upstream.where(counts, 0.0)
            scale = largest.abs().amax().clamp(min=torch.finfo(upstream.dtype).tiny)
            upstream = upstream / scale
        with torch.autocast(hidden.device.type, enabled=False):
            run = _Run(hidden, weight, bias, targets, counts, ctx.options)
            gradients = run.gradients(run.chunks(), ctx.wanted, upstream)
        if scale is not None:
            gradients = tuple(None if x is None else x.to(ctx.options.dtype) * scale for x in gradients)
        return *_cast(gradients, tuple(None if x is None else x.dtype for x in (hidden, weight, bias))), *[None] * 4


def _outputs(ctx: Any, run: _Run, loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rest = (run.losses, run.lse, run.correct)
    ctx.mark_non_differentiable(*(x for x in rest if x is not None))
    return loss, *rest


def _cast(
    gradients: tuple[torch.Tensor | None, ...], dtypes: tuple[torch.dtype | None, ...]
) -> list[torch.Tensor | None]:
    return [
        None if gradient is None or dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


def _products(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    d_logits: torch.Tensor,
    upstream: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    options: LossOptions,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients by hidden, weight and bias out of one chunk that holds all rows.

    The upstream gradient multiplies what is small, hidden's rows and gradient, not the weight's gradient: but for
    float16, where a loss scale would take hidden out of range.
    """
    d_hidden = d_weight = d_bias = None
    if wanted[0]:
        d_hidden = (d_logits @ weight).to(options.dtype) * upstream
    if wanted[1] and options.compute_dtype == torch.float16:
        d_weight = (d_logits.t() @ hidden).to(options.dtype) * upstream
    elif wanted[1]:
        d_weight = d_logits.t() @ (hidden.to(options.dtype) * upstream).to(options.compute_dtype)
    if wanted[2]:
        d_bias = d_logits.sum(0, dtype=options.dtype) * upstream
    return d_hidden, d_weight, d_bias


class _Run:
    """One pass over the rows, and the memory it writes to."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        counts: torch.Tensor | None,
        options: LossOptions,
    ) -> None:
        self.hidden = hidden.detach().to(options.compute_dtype)
        self.weight = weight.detach().to(options.compute_dtype)
        self.bias = None if bias is None else bias.detach().to(options.compute_dtype)
        self.targets, self.counts, self.options = targets, counts, options
        rows, device = hidden.shape[0], hidden.device
        self.losses, self.lse = (torch.empty(rows, dtype=options.dtype, device=device) for _ in range(2))
        self.correct = torch.empty(rows, dtype=torch.bool, device=device) if options.wants_correct else None

    def chunks(self) -> list[slice]:
        """The rows, as many at a time as the workspace holds logits of."""
        rows, vocab_size = self.hidden.shape[0], self.weight.shape[0]
        options, size = self.options, self.options.compute_dtype.itemsize
        if self.hidden.device.type != "cpu":  # a chunk is one block there: its copy, and under a softcap its slope
            size += options.dtype.itemsize * (1 if options.softcap is None else 2)
        step = max(1, options.workspace_mib * 2**20 // (size * vocab_size))
        if options.compute_dtype == torch.float16:
            step = min(step, _FLOAT16_ROWS)
        return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]

    def gradients(
        self, chunks: list[slice], wanted: tuple[bool, bool, bool], upstream: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The wanted gradients of sum(losses * upstream) by hidden (compute dtype), weight and bias (loss's dtype)."""
        dtype, device = self.options.dtype, self.hidden.device
        d_hidden = torch.empty_like(self.hidden) if wanted[0] else None
        d_weight = torch.empty_like(self.weight, dtype=dtype) if wanted[1] else None
        d_bias = torch.zeros(self.weight.shape[0], dtype=dtype, device=device) if wanted[2] else None
        for number, chunk in enumerate(chunks):
            d_logits = self.d_logits_of(chunk, upstream)
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=dtype)
            if d_hidden is not None:
                torch.mm(d_logits, self.weight, out=d_hidden[chunk])
            if d_weight is not None:
                _add_product(d_weight, d_logits.t(), self.hidden[chunk], first=number == 0)
            del d_logits  # or two chunks would be there at once
        return d_hidden, d_weight, d_bias

    def logits_of(self, chunk: slice) -> torch.Tensor:
        """Writes a chunk's losses, lse and correct; its logits' memory comes back used up."""
        return self._pass(chunk, None, gradient=False)

    def d_logits_of(self, chunk: slice, upstream: torch.Tensor | None) -> torch.Tensor:
        """The same, and the gradient of the losses (times upstream) by the chunk's logits, in the compute dtype."""
        return self._pass(chunk, upstream, gradient=True)

    def _pass(self, chunk: slice, upstream: torch.Tensor | None, *, gradient: bool) -> torch.Tensor:
        logits = torch.nn.functional.linear(self.hidden[chunk], self.weight, self.bias)
        step = max(1, _BLOCK_KIB * 2**10 // (logits.shape[1] * self.options.dtype.itemsize))
        if logits.device.type != "cpu":
            step = max(1, logits.shape[0])  # each operation is a launch there
        for start in range(0, logits.shape[0], step):
            block = logits[start : start + step]
            rows = slice(chunk.start + start, chunk.start + start + block.shape[0])
            x = block.to(self.options.dtype)
            self._block(x, rows, upstream, gradient=gradient)
            if gradient and x is not block:
                block.copy_(x)
        return logits

    def _block(self, x: torch.Tensor, rows: slice, upstream: torch.Tensor | None, *, gradient: bool) -> None:
        """One block of logits, in place: to its gradient, or used up.

        Rounding to the compute dtype comes after the target's 1 is taken off: p - 1 in bfloat16 would be all error
        where p is near 1.
        """
        options, vocab_size = self.options, x.shape[1]
        targets = self.targets[rows, None]
        counted = None if self.counts is None else self.counts[rows]
        slope = None
        if options.softcap is not None:
            x.div_(options.softcap).tanh_()
            slope = x.square().neg_().add_(1.0) if gradient else None
            x.mul_(options.softcap)
        largest = x.amax(-1, keepdim=True)
        x.sub_(largest)
        target = x.gather(1, targets)
        mean = x.mean(-1, keepdim=True) if options.label_smoothing else None
        total = x.exp_().sum(-1, keepdim=True)
        log_total = total.log()
        lse = log_total + largest
        losses = (log_total - target).mul_(1.0 - options.label_smoothing)
        if mean is not None:
            losses.add_(log_total - mean, alpha=options.label_smoothing)
        if options.z_loss:
            losses.addcmul_(lse, lse, value=options.z_loss)
        correct = target >= 0.0  # the largest logit is 0 by now
        results = [(self.losses, losses), (self.lse, lse)]
        if self.correct is not None:
            results.append((self.correct, correct))
        for out, values in results:
            values = values.squeeze(1)
            out[rows] = values if counted is None else values.masked_fill(~counted, 0)
        if not gradient:
            return
        scale = total.reciprocal_()
        if options.z_loss:
            scale.mul_(1.0 + 2.0 * options.z_loss * lse)
        x.mul_(scale)
        if options.label_smoothing:
            x.sub_(options.label_smoothing / vocab_size)
        x.scatter_add_(1, targets, x.new_full((), options.label_smoothing - 1.0).expand(targets.shape))
        if slope is not None:
            x.mul_(slope)
        if upstream is not None:
            x.mul_(upstream[rows, None].to(options.dtype))
        if counted is not None:
            x.masked_fill_(~counted[:, None], 0.0)  # not times 0: an infinity would stay


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total += a @ b; the first product is stored instead, so that total need not be cleared."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
