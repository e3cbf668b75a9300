"""Linear cross-entropy on a CPU: torch's products, and one pass in C++ that turns logits into their gradient in place.

Where one chunk holds all rows, that gradient is kept for the backward, whose products take the upstream gradient in
passing. Where there are more, a sum's products are formed at once and added up in float32; where each row's loss is
asked for, the backward projects again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from antlm_fast.kernels.linear_cross_entropy.contract import LossOptions, RowResults
from antlm_fast.kernels.linear_cross_entropy.native_products import padded, parameter_gradients, project
from antlm_fast.kernels.native.library import library
from antlm_fast.kernels.native.ops import differentiable
from antlm_fast.kernels.native.workspace import POOL
from antlm_fast.kernels.working_copies import working_copy


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counts: Tensor | None,
    options: LossOptions,
) -> RowResults:
    """Arguments as in torch_impl."""
    inputs = (hidden, weight, bias)
    # what is multiplied; the gradients go to the inputs themselves
    dtype = options.compute_dtype
    factors = (
        hidden.detach().to(dtype),
        weight.detach() if weight.dtype == dtype else working_copy(weight, dtype),
        None if bias is None else bias.detach().to(dtype),
    )
    loss, losses, lse, correct, *_ = _loss(
        *inputs,
        *factors,
        targets,
        counts,
        options.z_loss,
        options.label_smoothing,
        options.softcap,
        options.workspace_mib,
        options.reduce,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs],
    )
    return RowResults(loss, losses.detach(), lse.detach(), correct if options.wants_correct else None)


class _Run:
    """One pass over the rows, chunk by chunk, and the memory it writes to."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        numbers: tuple[float, float, float | None],
        workspace_mib: int,
        room_for: int = 0,
    ) -> None:
        """room_for: so many rows of logits are there at least."""
        self.hidden, self.weight = hidden.contiguous(), weight  # no padding: see native_products
        self.bias = None if bias is None else bias.contiguous()
        self.targets = targets.contiguous()
        self.numbers = numbers
        self.losses, self.lse, self.correct = _new_rows(hidden)
        self.chunks = _chunks(hidden, weight, workspace_mib)
        self.logits = POOL.take((max(self.chunks[0].stop, room_for), padded(weight.shape[0])), dtype=hidden.dtype)

    def losses_of(self, chunk: slice) -> None:
        """Writes a chunk's losses, lse and correct; its logits are used up."""
        self._pass(chunk, None, gradient=False)

    def d_logits_of(self, chunk: slice, upstream: Tensor | None = None) -> Tensor:
        """The same, and the gradient of the losses (times upstream) by the chunk's logits, until the next chunk's."""
        return self._pass(chunk, upstream, gradient=True)

    def _pass(self, chunk: slice, upstream: Tensor | None, *, gradient: bool) -> Tensor:
        rows, vocab = chunk.stop - chunk.start, self.weight.shape[0]
        logits = self.logits[:rows, :vocab]
        project(self.hidden[chunk], self.weight, logits)
        z_loss, label_smoothing, softcap = self.numbers
        of_rows = (self.targets, None, upstream, self.losses, self.lse, self.correct)
        library().call(
            "cross_entropy_rows",
            logits,
            self.bias,
            *(None if x is None else x[chunk] for x in of_rows),
            *(rows, vocab, logits.stride(0), logits.dtype == torch.bfloat16, gradient),
            *(float(softcap or 0.0), z_loss, label_smoothing),
        )
        return logits

    def gradients(self, wanted: list[bool], upstream: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Those of sum(losses * upstream) by hidden (in the products' dtype), weight and bias (in float32)."""
        d_hidden, d_weight, d_bias = _new_sums(self.hidden, self.weight, wanted, POOL.take)
        for number, chunk in enumerate(self.chunks):
            d_logits = self.d_logits_of(chunk, upstream)
            if wanted[0]:
                torch.mm(d_logits, self.weight, out=d_hidden[chunk])
            parameters = d_weight if wanted[1] else None, d_bias if wanted[2] else None
            parameter_gradients(self.hidden[chunk], d_logits, None, *parameters, add=number > 0)
        return d_hidden, d_weight, d_bias


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_factor: Tensor,
    weight_factor: Tensor,
    bias_factor: Tensor | None,
    targets: Tensor,
    counts: Tensor | None,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    workspace_mib: int,
    reduce: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, losses, lse, correct, and three for the backward: d_logits and nothing, or the gradients, or nothing).

    Args:
        hidden, weight, bias: what the gradients belong to; the factors are their values in the dtype of the products.
        wanted: which of the three gradients the backward will be asked for.
    """
    rows, vocab = _counted(counts, targets, weight), weight.shape[0]
    factor, targets = _of(rows, hidden_factor), _of(rows, targets)
    # by all rows, since what is kept has its shape of them
    one_chunk = any(wanted) and len(_chunks(hidden_factor, weight_factor, workspace_mib)) == 1
    room_for = hidden.shape[0] if one_chunk else 0
    numbers = z_loss, label_smoothing, softcap
    run = _Run(factor, weight_factor, bias_factor, targets, numbers, workspace_mib, room_for)
    kept = _nothing(hidden_factor)
    if one_chunk:
        run.d_logits_of(run.chunks[0])
        kept = run.logits[:room_for, :vocab], *kept[1:]
    elif any(wanted) and reduce:
        kept = _among_all(rows, run.gradients(wanted, None), hidden, wanted)
    else:
        for chunk in run.chunks:
            run.losses_of(chunk)
    losses, lse, correct = (_among(rows, x, hidden) for x in (run.losses, run.lse, run.correct))
    return losses.sum() if reduce else losses.clone(), losses, lse, correct, *kept


def _counted(counts: Tensor | None, targets: Tensor, weight: Tensor) -> Tensor | None:
    """int64, the rows that count; None is all. A traced call hands over all rows and checks no target: here they are
    picked, and checked."""
    if counts is None:
        return None
    rows = counts.nonzero().squeeze(1)
    if rows.numel():
        least, greatest = (int(bound) for bound in targets[rows].aminmax())
        if least < 0 or greatest >= weight.shape[0]:
            wrong = least if least < 0 else greatest
            raise ValueError(f"targets must be in [0, {weight.shape[0]}) or ignore_index; got {wrong}")
    return rows


def _of(rows: Tensor | None, x: Tensor) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _among(rows: Tensor | None, x: Tensor, every: Tensor) -> Tensor:
    """What was found of `rows`, among as many rows as `every` has; 0 elsewhere."""
    return x if rows is None else x.new_zeros((every.shape[0], *x.shape[1:])).index_copy_(0, rows, x)


def _among_all(
    rows: Tensor | None, gradients: tuple[Tensor, Tensor, Tensor], hidden: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with hidden's, where it is wanted, among all rows."""
    d_hidden, d_weight, d_bias = gradients
    return _among(rows, d_hidden, hidden) if wanted[0] else d_hidden, d_weight, d_bias


def _fake(hidden, weight, bias, hidden_factor, weight_factor, *rest):  # type: ignore[no-untyped-def]
    *_, workspace_mib, reduce, wanted = rest
    rows = _new_rows(hidden_factor)
    kept = _nothing(hidden_factor)
    if any(wanted) and len(_chunks(hidden_factor, weight_factor, workspace_mib)) == 1:
        vocab = weight.shape[0]
        kept = hidden_factor.new_empty(hidden.shape[0], padded(vocab))[:, :vocab], *kept[1:]
    elif any(wanted) and reduce:
        kept = _new_sums(hidden_factor, weight_factor, wanted, hidden.new_empty)
    return rows[0].new_empty(() if reduce else hidden.shape[0]), *rows, *kept


def _new_rows(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, lse, correct)."""
    rows = hidden.shape[0]
    losses, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return losses, lse, hidden.new_empty(rows, dtype=torch.bool)


def _nothing(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (hidden.new_empty(0) for _ in range(3))
    return first, second, third


def _new_sums(
    hidden: Tensor, weight: Tensor, wanted: list[bool], room: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for gradients that are added up over chunks: hidden's, the weight's and the bias's."""
    vocab, hidden_size = weight.shape
    d_hidden = hidden.new_empty(hidden.shape if wanted[0] else 0)
    d_weight = room((vocab, hidden_size) if wanted[1] else (0,), dtype=torch.float32)
    return d_hidden, d_weight, hidden.new_zeros(vocab if wanted[2] else 0, dtype=torch.float32)


def _chunks(hidden: Tensor, weight: Tensor, workspace_mib: int) -> list[slice]:
    """The rows, in as few parts as the workspace holds logits of, all about as large."""
    rows = hidden.shape[0]
    most = max(1, workspace_mib * 2**20 // (hidden.dtype.itemsize * padded(weight.shape[0])))
    if rows <= most:
        return [slice(0, rows)]
    step = -(-rows // -(-rows // most))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, *used = inputs[:8]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*used, *output[4:])
    wanted = getattr(weight, "grad_dtype", None) if weight.is_leaf else None
    ctx.settings = *inputs[8:], hidden.dtype, wanted or weight.dtype, weight.dtype


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if upstream is not None:
        found = _gradients_op(upstream, *ctx.saved_tensors, *ctx.settings)
        gradients = tuple(x if wants else None for x, wants in zip(found, ctx.needs_input_grad[:3], strict=True))
    return *gradients, *[None] * 11


@torch.library.custom_op("antlm_fast::linear_cross_entropy_native_backward", mutates_args=())
def _gradients_op(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counts: Tensor | None,
    kept_hidden: Tensor,
    kept_weight: Tensor,
    kept_bias: Tensor,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    workspace_mib: int,
    reduce: bool,
    wanted: list[bool],
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by hidden, weight and bias; an empty tensor for one that is not wanted.

    Args:
        hidden, weight, bias: in the dtype of the products.
        kept_hidden, kept_weight, kept_bias: what the forward kept.
        hidden_dtype, weight_dtype, bias_dtype: of the gradients.
    """
    dtypes = hidden_dtype, weight_dtype, bias_dtype
    scale = upstream.item() if reduce else 1.0
    rows = None if counts is None else counts.nonzero().squeeze(1)
    of_rows = None if reduce else _of(rows, upstream).contiguous()
    factor = _of(rows, hidden).contiguous()
    with torch.autocast("cpu", enabled=False):
        if len(_chunks(hidden, weight, workspace_mib)) == 1:
            d_logits = kept_hidden[: factor.shape[0]]
            found = _products(d_logits, factor, weight, of_rows, scale, wanted, dtypes)
            return _among_all(rows, found, hidden, wanted)
        sums = kept_hidden, kept_weight, kept_bias
        if not reduce:
            numbers = z_loss, label_smoothing, softcap
            run = _Run(factor, weight, bias, _of(rows, targets), numbers, workspace_mib)
            sums = _among_all(rows, run.gradients(wanted, of_rows), hidden, wanted)
    d_hidden, d_weight, d_bias = _new_gradients(hidden, weight, wanted, dtypes)
    if wanted[0]:
        d_hidden = sums[0].to(hidden_dtype) * scale
    if wanted[1]:
        torch.mul(sums[1], scale, out=d_weight)
    if wanted[2]:
        d_bias = (sums[2] * scale).to(bias_dtype)
    return d_hidden, d_weight, d_bias


def _products(
    d_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    of_rows: Tensor | None,
    scale: float,
    wanted: list[bool],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients out of one chunk that holds all rows, times scale and, where there are any, numbers of each row."""
    d_hidden, d_weight, d_bias = _new_gradients(hidden, weight, wanted, dtypes)
    factor = scale if of_rows is None else of_rows[:, None]
    if wanted[0]:
        d_hidden = (d_logits @ weight).to(dtypes[0]).mul_(factor)
    if wanted[1] or wanted[2]:
        # the upstream gradient multiplies what is small, hidden's rows, not the weight's gradient
        sums = hidden.new_zeros(weight.shape[0], dtype=torch.float32) if wanted[2] else None
        scaled = (hidden * factor).to(hidden.dtype)
        parameter_gradients(scaled, d_logits, of_rows, d_weight if wanted[1] else None, sums, add=False)
        if sums is not None:
            d_bias = (sums * scale).to(dtypes[2])
    return d_hidden, d_weight, d_bias


def _new_gradients(
    hidden: Tensor, weight: Tensor, wanted: list[bool], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(shape if wants else 0, dtype=dtype)
        for shape, wants, dtype in zip(shapes, wanted, dtypes, strict=True)
    )
    return d_hidden, d_weight, d_bias


@_gradients_op.register_fake
def _(upstream, hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    *_, wanted, hidden_dtype, weight_dtype, bias_dtype = rest
    return _new_gradients(hidden, weight, wanted, (hidden_dtype, weight_dtype, bias_dtype))


_loss = differentiable(
    "linear_cross_entropy_native",
    _forward,
    public="linear_cross_entropy",
    fake=_fake,
    save=_save,
    backward=_backward,
)
