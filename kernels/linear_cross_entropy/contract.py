"""What every implementation of linear cross-entropy is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class LossOptions:
    """How the loss is computed.

    Args:
        compute_dtype: of the products.
        reduce: give the sum over the rows instead of each row's loss.
        z_loss, label_smoothing, softcap: as in the public function.
        wants_correct: also tell which rows are predicted right.
        workspace_mib: how much memory logits may take at a time.
    """

    compute_dtype: torch.dtype
    reduce: bool
    z_loss: float
    label_smoothing: float
    softcap: float | None
    wants_correct: bool
    workspace_mib: int

    @property
    def dtype(self) -> torch.dtype:
        """Of everything after the products: float32, or float64 for float64."""
        return torch.promote_types(self.compute_dtype, torch.float32)


class RowResults(NamedTuple):
    """What comes of n rows; all but `loss` is detached. Rows that do not count have 0 and False.

    loss: (n,), or their sum () with `reduce`; differentiable.
    losses: (n,).
    lse: (n,), log of the sum of the exponentials of a row's logits.
    correct: bool (n,), whether no class has a larger logit than the target; None unless it was wanted.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    lse: torch.Tensor
    correct: torch.Tensor | None


@dataclass(frozen=True)
class LossMetrics:
    """What the pass over the logits also told of each row; detached. Rows without a label have 0 and False.

    Args:
        losses: (rows,), float32 (float64 for float64 inputs).
        lse: (rows,), of the same dtype.
        correct: bool (rows,): no class has a larger logit than the target.
        labelled: bool (rows,).
    """

    losses: torch.Tensor
    lse: torch.Tensor
    correct: torch.Tensor
    labelled: torch.Tensor

    def by_group(self, groups: torch.Tensor, num_groups: int) -> LossSums:
        """Sums for each group of rows, such as the objectives of a mixed batch; deterministic, without a sync.

        Args:
            groups: int64 (rows,), each in [0, num_groups); rows without a label may hold anything, and labelled rows of
                another group are in no sum.
            num_groups: how many sums to give.

        Raises:
            ValueError: groups has not one entry for each row.
        """
        if groups.shape != self.losses.shape:
            raise ValueError(f"groups must have shape {tuple(self.losses.shape)}; got {tuple(groups.shape)}")
        member = (groups == torch.arange(num_groups, device=groups.device)[:, None]) & self.labelled
        return LossSums(
            loss=torch.where(member, self.losses, 0.0).sum(1),
            correct=(member & self.correct).sum(1),
            count=member.sum(1),
        )


@dataclass(frozen=True)
class LossSums:
    """Sums over the labelled rows of each group.

    Args:
        loss: (num_groups,), float32 (float64 for float64 inputs).
        correct, count: int64 (num_groups,): rows predicted right, and labelled rows.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    count: torch.Tensor
