"""The mixed-precision linear layer: the contract, the validation and the table of implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from antlm_fast.kernels.dispatch import Implementation, Table, choose
from antlm_fast.kernels.mixed_linear import native_impl, reference, torch_impl
from antlm_fast.kernels.native.weight_gradient import no_tiles_reason
from antlm_fast.kernels.tracing import check_dense
from antlm_fast.kernels.working_copies import may_keep

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class MixedLinearCall:
    """What the choice of an implementation may depend on.

    Args:
        device_type: of the tensors.
        dtype: of the products.
        keeps: whether the weights are such that rounded copies of them may be kept from call to call.
    """

    device_type: str
    dtype: torch.dtype
    keeps: bool = True


def _native_unsupported_reason(call: MixedLinearCall) -> str | None:
    if not call.keeps:
        return "the C++ weight gradient serves leaf weights that are wider than the products, and no compiled graph"
    return no_tiles_reason(call.device_type, call.dtype)


def _serves_everything(call: MixedLinearCall) -> str | None:
    return None


# the order is the preference of impl="auto"
TABLE: Table[MixedLinearCall] = {
    "native": Implementation(_native_unsupported_reason, native_impl.forward),
    "torch": Implementation(_serves_everything, torch_impl.forward),
    "reference": Implementation(_serves_everything, reference.forward),
}
OPS: dict[str, Table[MixedLinearCall]] = {"mixed_linear": TABLE}


def mixed_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Several linear layers of one input as one product, in a narrower dtype than the weights have.

    y = x @ concat(weights)^T + concat(biases), where all three are rounded to the compute dtype: autocast's where it is
    on, else x's.

    Args:
        x: (n, in_features); float16, bfloat16, float32 or float64.
        weights: one or more of (rows_i, in_features): of x's dtype, or float32.
        biases: one for each weight, (rows_i,) of the weights' dtype, or None where it has none; None is no bias at all.
        impl: "auto" or the implementation to use.

    Returns:
        (n, sum of rows_i), in the compute dtype; sums are accumulated in float32 (float64 for float64). The parts are
        `y.split([rows_1, ...], dim=-1)`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong.
        UnsupportedError: the implementation named by `impl` cannot serve the call.

    Gradients and determinism:
        Gradients reach x, weights and biases, in the dtype of each (a weight's `grad_dtype`, where it has another);
        products are rounded to the compute dtype, as autocast's are; of "native" a weight's is rounded to its own
        alone. Deterministic for a fixed number of threads.
        The weights are rounded in every call, so they are multiplied as they are, however they were written (a run of
        the trainer, which alone writes its weights, keeps them rounded: working_copies.py). On a CPU gradients of
        gradients are refused, and impl="reference" has them.
    """
    weights = tuple(weights)
    given = (None,) * len(weights) if biases is None else tuple(biases)
    for weight, bias in zip(weights, given, strict=False):
        check_dense(x=x, weights=weight, biases=bias)
    dtype = _compute_dtype(x)
    _check(x, weights, given, dtype)
    keeps = weights[0].dtype != dtype and may_keep(weights)
    chosen = choose("mixed_linear", TABLE, impl, MixedLinearCall(x.device.type, dtype, keeps))
    return chosen.forward(x, weights, given, dtype)  # all products are in autocast's own dtype already


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """autocast's, which leaves float64 alone, or x's own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _check(
    x: torch.Tensor, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor | None, ...], dtype: torch.dtype
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape (n, in_features); got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if not weights:
        raise ValueError("weights must hold at least one weight; got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases must hold one entry for each of {len(weights)} weights; got {len(biases)}")
    kept = weights[0].dtype
    if kept not in (x.dtype, dtype, torch.float32) or (kept == torch.float32 and dtype == torch.float64):
        raise TypeError(f"weights must have x's dtype {x.dtype}, or be float32 for a narrower one; got {kept}")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"weights must have shape (rows, {x.shape[1]}); got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"biases must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
        for name, tensor in (("weights", weight), ("biases", bias)):
            if tensor is not None and tensor.dtype != kept:
                raise TypeError(f"{name} must have the dtype of the first weight, {kept}; got {tensor.dtype}")
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
