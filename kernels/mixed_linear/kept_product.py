"""The product with kept copies of the weights; who multiplies for the parameters' gradients is given to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from antlm_fast.kernels.tracing import first_order
from antlm_fast.kernels.working_copies import working_copy

# (dy (n, rows), x (n, in_features), dtype, whether the second is wanted) ->
# (dy^T x (rows, in_features), in dtype or rounded to x's; the sums of dy's columns (rows,), float32)
Gradients = Callable[[torch.Tensor, torch.Tensor, torch.dtype, bool], tuple[torch.Tensor, torch.Tensor | None]]


def kept_product(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    dtype: torch.dtype,
    gradients: Gradients,
) -> torch.Tensor:
    """x (n, in_features), rounded to `dtype`, times the kept copy of weights for which `may_keep` holds."""
    matrix = working_copy(weights, dtype)
    held = tuple(bias for bias in biases if bias is not None)
    vector = _joined_biases(weights, biases, held, dtype)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *weights, *held)):
        owners = tuple(place for place, bias in enumerate(biases) if bias is not None)
        plan = (owners, len(weights), gradients)
        y: torch.Tensor = _Product.apply(x, matrix, vector, plan, *weights, *held)
        return y
    return F.linear(x.to(dtype), matrix, vector)


class _Product(torch.autograd.Function):
    """x @ matrix^T + vector, whose gradients go to the weights and biases that matrix and vector are copies of."""

    @staticmethod
    def forward(ctx: Any, x, matrix, vector, plan, *parameters):  # type: ignore[no-untyped-def]
        ctx.owners, num_weights, ctx.gradients = plan
        weights = parameters[:num_weights]
        narrow = x.to(matrix.dtype)
        ctx.save_for_backward(narrow, matrix)
        ctx.dtype = x.dtype
        ctx.sizes = [weight.shape[0] for weight in weights]
        wanted = {getattr(weight, "grad_dtype", None) or weight.dtype for weight in weights}
        ctx.weight_dtype = wanted.pop() if len(wanted) == 1 else torch.float32
        return F.linear(narrow, matrix, vector)

    @staticmethod
    @first_order("mixed_linear")
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, matrix = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        first_bias = 4 + len(ctx.sizes)
        dx = (dy @ matrix).to(ctx.dtype) if wanted[0] else None
        d_weights: list[torch.Tensor | None] = [None] * len(ctx.sizes)
        d_biases: list[torch.Tensor | None] = [None] * len(ctx.owners)
        d_matrix = d_vector = None
        wants_vector = any(wanted[first_bias:])
        if any(wanted[4:first_bias]):
            d_matrix, d_vector = ctx.gradients(dy, x, ctx.weight_dtype, wants_vector)
        elif wants_vector:
            d_vector = dy.sum(0, dtype=torch.float32)
        if d_matrix is not None:
            needs = zip(d_matrix.split(ctx.sizes), wanted[4:first_bias], strict=True)
            d_weights = [part if needed else None for part, needed in needs]
        if d_vector is not None:
            parts = d_vector.split(ctx.sizes)
            d_biases = [
                parts[owner] if needed else None for owner, needed in zip(ctx.owners, wanted[first_bias:], strict=True)
            ]
        return dx, None, None, None, *d_weights, *d_biases


def _joined_biases(
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    held: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The biases one after the other; 0 for a weight that has none; None where no weight has one."""
    if not held:
        return None
    if len(held) == len(weights):
        return working_copy(held, dtype)
    joined = weights[0].new_zeros(sum(weight.shape[0] for weight in weights), dtype=dtype)
    parts = joined.split([weight.shape[0] for weight in weights])
    with torch.no_grad():
        for part, bias in zip(parts, biases, strict=True):
            if bias is not None:
                part.copy_(bias)
    return joined
