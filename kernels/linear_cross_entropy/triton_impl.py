"""Linear cross-entropy in Triton, as custom ops: forward and backward.

Nothing is read on the host, neither a target nor which rows count, so a call does not wait for the device and a CUDA
graph that holds it replays with the values of the moment. The ops are opaque to torch.compile.
"""

from __future__ import annotations

import torch

from antlm_fast.kernels.linear_cross_entropy.contract import LossOptions, RowResults
from antlm_fast.kernels.linear_cross_entropy.triton_launches import LinearCrossEntropyLaunches
from antlm_fast.kernels.tracing import first_order


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    options: LossOptions,
) -> RowResults:
    """Arguments as in torch_impl."""
    losses, lse, correct = forward_op(
        hidden,
        weight,
        bias,
        targets,
        counts,
        options.compute_dtype,
        options.z_loss,
        options.label_smoothing,
        options.softcap,
        options.workspace_mib,
    )
    loss = losses.sum() if options.reduce else losses
    return RowResults(loss, losses.detach(), lse.detach(), correct if options.wants_correct else None)


@torch.library.custom_op("antlm_fast::linear_cross_entropy_forward", mutates_args=())
def forward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    compute_dtype: torch.dtype,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    workspace_mib: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, lse, correct), each (rows,): as RowResults has them. The workspace is the backward's."""
    if not hidden.shape[0]:
        return _new_forward(hidden)
    call = _launches(hidden, weight, bias, targets, counts, compute_dtype, softcap)
    partials = call.new_partials(label_smoothing > 0.0)
    call.forward(partials).run(hidden.device)
    return _combined(partials, counts, weight.shape[0], z_loss, label_smoothing)


@forward_op.register_fake
def _(hidden, *rest):  # type: ignore[no-untyped-def]
    return _new_forward(hidden)


def _new_forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, lse = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    return losses, lse, hidden.new_empty(hidden.shape[0], dtype=torch.bool)


def _launches(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    compute_dtype: torch.dtype,
    softcap: float | None,
) -> LinearCrossEntropyLaunches:
    biases = None if bias is None else bias.to(compute_dtype)
    return LinearCrossEntropyLaunches(
        hidden.to(compute_dtype), weight.to(compute_dtype), biases, targets, counts, softcap
    )


def _combined(
    partials: torch.Tensor, counts: torch.Tensor | None, vocab_size: int, z_loss: float, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, lse, correct) out of what each split of the vocabulary left."""
    maxima, sums, target_logits = partials[:3]
    largest = maxima.amax(0)
    log_total = (sums * torch.exp(maxima - largest)).sum(0).log()
    target = target_logits.sum(0)  # but one of them are 0
    lse = largest + log_total
    losses = (1.0 - label_smoothing) * (log_total - (target - largest))
    if label_smoothing:
        losses += label_smoothing * (log_total - (partials[3].sum(0) / vocab_size - largest))
    if z_loss:
        losses += z_loss * lse.square()
    correct = target >= largest
    if counts is None:
        return losses, lse, correct
    return losses.where(counts, 0.0), lse.where(counts, 0.0), correct & counts


@torch.library.custom_op("antlm_fast::linear_cross_entropy_backward", mutates_args=())
def backward_op(
    upstream: torch.Tensor,
    lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    compute_dtype: torch.dtype,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    workspace_mib: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden, weight and bias, in the dtype of each; an empty tensor for one that is not wanted."""
    d_hidden, d_weight, d_bias = _new_backward(hidden, weight, bias, wants_hidden, wants_weight, wants_bias)
    call = _launches(hidden, weight, bias, targets, counts, compute_dtype, softcap)
    chunks = call.chunks(workspace_mib)
    scale = None
    if compute_dtype == torch.float16 and chunks:
        # a mean's 1 / rows would take small gradients below float16's range, a loss scale large ones above it
        upstream = upstream if counts is None else upstream.where(counts, 0.0)
        scale = upstream.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        upstream = upstream / scale
    weight_sum = torch.zeros_like(d_weight, dtype=torch.float32) if len(chunks) != 1 else None
    bias_sum = torch.zeros_like(d_bias, dtype=torch.float32)
    workspace = call.new_d_logits(chunks[0].stop) if chunks else None
    for chunk in chunks:
        assert workspace is not None
        padded = workspace[: chunk.stop - chunk.start]
        call.d_logits(chunk, lse, upstream, padded, z_loss, label_smoothing).run(hidden.device)
        d_logits = padded[:, : call.vocab_size]
        if wants_hidden:
            _store_product(d_hidden[chunk], d_logits, call.weight, scale)
        if wants_weight:
            if weight_sum is None:
                _store_product(d_weight, d_logits.t(), call.hidden[chunk], scale)
            else:
                weight_sum += d_logits.t() @ call.hidden[chunk]
        if wants_bias:
            bias_sum += d_logits.sum(0, dtype=torch.float32)
    if weight_sum is not None:
        d_weight.copy_(_times(weight_sum, scale))
    return d_hidden, d_weight, d_bias.copy_(_times(bias_sum, scale))


def _store_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is None and out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_times(a @ b, scale))


def _times(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else x.float() * scale


@backward_op.register_fake
def _(upstream, lse, hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return _new_backward(hidden, weight, bias, *rest[-3:])


def _new_backward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *wanted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(x.shape if wants and x is not None else 0, dtype=None if x is None else x.dtype)
        for x, wants in zip((hidden, weight, bias), wanted, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, counts, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, counts, output[1])


def _backward(ctx, d_losses, *_):  # type: ignore[no-untyped-def]
    *call, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = backward_op(d_losses, lse, *call, *ctx.settings, *wanted)
    return *(x if wants else None for x, wants in zip(gradients, wanted, strict=True)), *[None] * 7


forward_op.register_autograd(first_order("linear_cross_entropy")(_backward), setup_context=_save)
