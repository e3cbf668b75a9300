"""The optimizer's C++ kernels, called with lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from antlm_fast.kernels.native.library import Library, library

_BLOCK = 64 * 1024  # elements; optimizer.cpp's
GRADIENT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Update:
    """One tensor of a step; all of it contiguous, on the CPU, with as many elements as the weight.

    Args:
        weight, first_moment, second_moment: float32; moved in place.
        gradient: float32 or bfloat16.
        copy: bfloat16, to be written with the new weight; None where there is none.
    """

    weight: torch.Tensor
    gradient: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor
    copy: torch.Tensor | None


@dataclass(frozen=True)
class AdamWNumbers:
    """kept = 1 - lr * weight_decay, step = lr / (1 - beta1^t), root = sqrt(1 - beta2^t)."""

    kept: float
    step: float
    beta1: float
    beta2: float
    eps: float
    root: float


@dataclass(frozen=True)
class LambNumbers:
    """eps times, and scale = root / (1 - beta1^t) where, root = sqrt(1 - beta2^t); trust: 0 where the ratio is 1."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    scale: float
    trust: float


def squared_norm(gradients: Sequence[torch.Tensor], *, kernels: Library | None = None) -> float:
    """The sum of the squares of all elements, added in float64 but for 4,096 elements at a time, which are in float32.

    Determinism: the number of threads does not matter.
    """
    table, blocks = _table([Update(each, each, each, each, None) for each in gradients])
    partial = torch.empty(blocks, dtype=torch.float64, device="cpu")
    total = torch.empty(1, dtype=torch.float64, device="cpu")
    (kernels or library()).call("gradient_squares", table, partial, total, len(gradients))
    return total.item()


def adamw(
    updates: Sequence[Update], numbers: Sequence[AdamWNumbers], factor: float, *, kernels: Library | None = None
) -> None:
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- kept * w - step * m / (sqrt(v) / root + eps).

    Args:
        updates, numbers: one of each for a tensor.
        factor: every gradient is multiplied by it.

    Determinism: the number of threads does not matter.
    """
    table, _ = _table(updates)
    rows = [(each.kept, each.step, each.beta1, each.beta2, each.eps, each.root) for each in numbers]
    settings = torch.tensor(rows, dtype=torch.float64, device="cpu")
    (kernels or library()).call("adamw", table, settings, len(updates), float(factor))


def lamb(
    updates: Sequence[Update], numbers: Sequence[LambNumbers], factor: float, *, kernels: Library | None = None
) -> None:
    """m, v as `adamw`; u = scale * m / (sqrt(v) + eps) + weight_decay * w; w <- w - lr * ratio * u, ratio = |w| / |u|.

    The ratio is 1 where `trust` is 0 or either norm is.

    Args:
        updates, numbers: one of each for a tensor.
        factor: every gradient is multiplied by it.

    Determinism: the number of threads does not matter.
    """
    table, _ = _table(updates)
    rows = [(each.lr, each.weight_decay, each.beta1, each.beta2, each.eps, each.scale, each.trust) for each in numbers]
    settings = torch.tensor(rows, dtype=torch.float64, device="cpu")
    largest = max((_blocks(each.weight) for each in updates), default=0)
    partial = torch.empty(2 * largest, dtype=torch.float64, device="cpu")
    (kernels or library()).call("lamb", table, settings, partial, len(updates), float(factor))


def _blocks(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() // _BLOCK)


def _table(updates: Sequence[Update]) -> tuple[torch.Tensor, int]:
    """optimizer.cpp's rows, and the number of blocks of all tensors together."""
    rows, blocks = [], 0
    for each in updates:
        tensors = (each.weight, each.gradient, each.first_moment, each.second_moment, each.copy)
        if not all(x is None or (x.numel() == each.weight.numel() and x.is_contiguous()) for x in tensors):
            found = [None if x is None else (tuple(x.shape), x.stride()) for x in tensors]
            raise ValueError(f"an update's tensors must be contiguous and of one size; got shapes and strides {found}")
        rows.append(
            (
                each.weight.data_ptr(),
                each.gradient.data_ptr(),
                each.first_moment.data_ptr(),
                each.second_moment.data_ptr(),
                0 if each.copy is None else each.copy.data_ptr(),
                each.weight.numel(),
                each.gradient.dtype == torch.bfloat16,
                blocks,
            )
        )
        blocks += _blocks(each.weight)
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), blocks
