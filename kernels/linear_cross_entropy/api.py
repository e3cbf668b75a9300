"""Linear cross-entropy: the contract, the validation and the table of implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from antlm_fast.kernels.dispatch import Implementation, Table, choose
from antlm_fast.kernels.linear_cross_entropy import native_impl, reference, torch_impl
from antlm_fast.kernels.linear_cross_entropy.contract import LossMetrics, LossOptions, RowResults
from antlm_fast.kernels.linear_cross_entropy.labelled import IGNORE_INDEX, LabelledRows, labelled_rows
from antlm_fast.kernels.native import library
from antlm_fast.kernels.tracing import check_call
from antlm_fast.kernels.triton_support.availability import unavailable_reason

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("none", "sum", "mean")


# logits of one chunk; fewer rows at a time cost passes over the weight's gradient, more cost page faults
DEFAULT_WORKSPACE_MIB = 64


@dataclass(frozen=True)
class LinearCrossEntropyCall:
    """What the choice of an implementation may depend on; the same for every number of rows."""

    device_type: str
    dtype: torch.dtype
    hidden_size: int
    vocab_size: int
    reduction: str = "mean"


def _serves_everything(call: LinearCrossEntropyCall) -> str | None:
    return None


def _native_unsupported_reason(call: LinearCrossEntropyCall) -> str | None:
    return library.unavailable_reason(call.device_type, call.dtype)


def _triton_unsupported_reason(call: LinearCrossEntropyCall) -> str | None:
    if call.dtype == torch.float64:
        return "the Triton kernels compute float16, bfloat16 and float32, not float64"
    return unavailable_reason(call.device_type)


def _triton(*args: Any) -> RowResults:
    from antlm_fast.kernels.linear_cross_entropy import triton_impl

    return triton_impl.forward(*args)


# the order is the preference of impl="auto"
TABLE: Table[LinearCrossEntropyCall] = {
    "native": Implementation(_native_unsupported_reason, native_impl.forward),
    "torch": Implementation(_serves_everything, torch_impl.forward),
    "triton": Implementation(_triton_unsupported_reason, _triton),
    "reference": Implementation(_serves_everything, reference.forward),
}
OPS: dict[str, Table[LinearCrossEntropyCall]] = {"linear_cross_entropy": TABLE}


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    z_loss: float = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = False,
    return_metrics: Literal[False] = False,
    workspace_mib: int = ...,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    z_loss: float = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    return_metrics: Literal[False] = False,
    workspace_mib: int = ...,
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    z_loss: float = ...,
    label_smoothing: float = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = False,
    return_metrics: Literal[True],
    workspace_mib: int = ...,
    impl: str = ...,
) -> tuple[torch.Tensor, LossMetrics]: ...


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    return_metrics: bool = False,
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, LossMetrics]:
    """Cross-entropy of a linear head, over the labelled rows, without ever holding all logits.

    logits = hidden @ weight^T + bias; with softcap, logits = softcap * tanh(logits / softcap). For a labelled row,
    with lse = log(sum(exp(logits))) and p = exp(logits - lse):
    loss = (1 - label_smoothing) * -log p[target] + label_smoothing * mean(-log p) + z_loss * lse**2.

    Args:
        hidden: (rows, hidden_size); float16, bfloat16, float32 or float64.
        weight: (vocab, hidden_size), of hidden's dtype (under autocast, of any dtype but float64).
        targets: int64 (rows,), each in [0, vocab) or ignore_index. The CPU checks this; on CUDA, where a check would
            stall the device, it is the caller's duty, unless torch.autograd.set_detect_anomaly asks for checks.
        bias: (vocab,), of weight's dtype; None is none.
        ignore_index: the target of the rows that are not labelled: they add nothing to loss or gradients. On the CPU
            they do not go through the head at all; on CUDA they are masked, and their hidden must be finite.
        reduction: "none" gives (rows,), 0 at rows that are not labelled; "sum" gives (); "mean" gives (), the mean over
            labelled rows, and 0 where there are none.
        z_loss: the weight of lse**2, which keeps logits from drifting.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        softcap: the bound of the logits' absolute value; None is none.
        return_lse: also return lse.
        return_metrics: also return LossMetrics: each row's loss and lse, and whether it is predicted right, out of the
            same pass; their sums by objective, say, are `metrics.by_group(objectives, 2)`.
        workspace_mib: MiB that logits may take at a time, at least those of one row. Fewer MiB are more, smaller
            products.
        impl: "auto" or the implementation to use.

    Returns:
        The loss, float32 (float64 for float64 inputs); with return_lse, (loss, lse): lse is (rows,), of the loss's
        dtype, detached, and 0 at rows that are not labelled; with return_metrics, (loss, LossMetrics). Products are
        accumulated in float32 (float64 for float64) and everything after the logits is computed in it.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or value is wrong.
        UnsupportedError: the implementation named by `impl` cannot serve the call.

    Gradients and determinism:
        Gradients reach hidden, weight and bias, in the dtype of each; where the weight's is a sum of several products,
        they are added in float32 (float64 for float64). Deterministic. Under torch.autocast the products are taken in
        autocast's dtype (float64 is left alone), all else in float32.

    Source:
        label smoothing: Szegedy et al., arXiv 1512.00567, section 7; z-loss: Chowdhery et al., arXiv 2204.02311,
        section 5; softcap: Gemma Team, arXiv 2408.00118, section 2.
    """
    check_call("linear_cross_entropy", impl, hidden=hidden, weight=weight, targets=targets, bias=bias)
    compute_dtype = _compute_dtype(hidden, weight)
    _check(hidden, weight, targets, bias, reduction, compute_dtype)
    _check_options(z_loss, label_smoothing, softcap)
    if return_lse and return_metrics:
        raise ValueError("return_lse must be False with return_metrics, which holds the lse; got True")
    if workspace_mib < 1:
        raise ValueError(f"workspace_mib must be at least 1; got {workspace_mib}")
    call = LinearCrossEntropyCall(hidden.device.type, compute_dtype, hidden.shape[1], weight.shape[0], reduction)
    chosen = choose("linear_cross_entropy", TABLE, impl, call)
    labelled = labelled_rows(targets, ignore_index, picks=chosen is TABLE["native"])
    hidden = labelled.gather(hidden)
    if labelled.counts is None:
        _check_targets(labelled.targets, weight.shape[0], ignore_index)
    elif not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        _check_targets(labelled.targets[labelled.counts], weight.shape[0], ignore_index)
    options = LossOptions(
        compute_dtype=compute_dtype,
        reduce=reduction != "none",
        z_loss=float(z_loss),
        label_smoothing=float(label_smoothing),
        softcap=softcap,
        wants_correct=return_metrics,
        workspace_mib=workspace_mib,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        results = chosen.forward(hidden, weight, bias, labelled.targets, labelled.counts, options)
        loss, num_rows = results.loss, targets.numel()
        if reduction == "mean":
            loss = loss / _at_least_one(labelled)
        elif reduction == "none":
            loss = _spread(loss, labelled, num_rows)
        if return_lse:
            return loss, _spread(results.lse, labelled, num_rows)
        if return_metrics:
            rows = (results.losses.clone(), results.lse, results.correct)  # the loss itself may be the losses
            losses, lse, correct = (_spread(x, labelled, num_rows) for x in rows)
            return loss, LossMetrics(losses, lse, correct, targets != ignore_index)
        return loss


def _at_least_one(labelled: LabelledRows) -> int | torch.Tensor:
    # a sum over no rows is 0, and so must its mean be
    return max(labelled.count, 1) if isinstance(labelled.count, int) else labelled.count.clamp(min=1)


def _spread(values: torch.Tensor, labelled: LabelledRows, num_rows: int) -> torch.Tensor:
    """Values of the labelled rows, put back among all rows; 0 elsewhere."""
    if labelled.rows is None:
        return values
    return values.new_zeros(num_rows).index_copy(0, labelled.rows, values)


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of the products: autocast's, or the inputs' own."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reduction: str,
    compute_dtype: torch.dtype,
) -> None:
    autocast = compute_dtype != hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
    if hidden.dim() != 2 or not hidden.shape[1]:
        raise ValueError(f"hidden must have shape (rows, hidden_size); got {tuple(hidden.shape)}")
    if weight.dim() != 2 or not weight.shape[0] or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must have shape (vocab, {hidden.shape[1]}); got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape ({hidden.shape[0]},); got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64; got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"hidden must be float16, bfloat16, float32 or float64; got {hidden.dtype}")
    if weight.dtype not in _DTYPES or (weight.dtype != hidden.dtype and not (autocast and _casts(weight, hidden))):
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}; got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias must have weight's dtype {weight.dtype}; got {bias.dtype}")
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}; got {x.device}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}; got {reduction!r}")


def _casts(weight: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Autocast leaves float64 alone, so it cannot bridge float64 and another dtype."""
    return torch.float64 not in (weight.dtype, hidden.dtype)


def _check_options(z_loss: float, label_smoothing: float, softcap: float | None) -> None:
    if not (math.isfinite(z_loss) and z_loss >= 0.0):
        raise ValueError(f"z_loss must be finite and at least 0; got {z_loss}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and at most 1; got {label_smoothing}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0.0):
        raise ValueError(f"softcap must be finite and above 0, or None; got {softcap}")


def _check_targets(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """For targets on the CPU that all count."""
    if not targets.numel():
        return
    least, greatest = (int(bound) for bound in targets.aminmax())
    if least < 0 or greatest >= vocab_size:
        wrong = least if least < 0 else greatest
        raise ValueError(f"targets must be in [0, {vocab_size}) or ignore_index {ignore_index}; got {wrong}")
