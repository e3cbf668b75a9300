"""Which rows count: the only reader of ignore_index in the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LabelledRows:
    """The rows that go through the head, packed together.

    Args:
        rows: int64 (n,), ascending; None is every row, and then nothing is gathered.
        counts: bool (n,), which of them are labelled; None is all of them.
        count: how many rows are labelled: an int, or int64 () on the device.
        targets: int64 (n,); ignore_index where `counts` is False.
        overflow: bool () on the device, whether more rows are labelled than there is room for; None: it cannot be.
    """

    rows: torch.Tensor | None
    counts: torch.Tensor | None
    count: int | torch.Tensor
    targets: torch.Tensor
    overflow: torch.Tensor | None = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x (rows, ...) that are labelled, (n, ...); differentiable.

        If more rows are labelled than the capacity, what comes back is NaN, and with it the loss: rows are never left
        out silently. x must be of floating point.
        """
        if self.rows is None:
            return x
        gathered = x.index_select(0, self.rows)
        return gathered if self.overflow is None else gathered.masked_fill(self.overflow, torch.nan)


def compact_labelled(
    targets: torch.Tensor, *, ignore_index: int = IGNORE_INDEX, capacity: int | None = None
) -> LabelledRows:
    """The labelled rows, packed together: what is computed of them before the loss costs nothing for the others.

        rows = compact_labelled(targets, capacity=4096)
        hidden = head_transform(rows.gather(hidden))
        loss = linear_cross_entropy(hidden, weight, rows.targets)

    Where the labelled positions are known already (antlm_fast's loader ships them with a batch), index with them: that
    needs neither this nor a sync.

    Args:
        targets: int64 (rows,).
        ignore_index: the target of a row that is not labelled.
        capacity: room for so many rows, whose number must then not be read from the device: n is the capacity, and the
            room that is left over is row 0 with the target ignore_index (no rows at all stay none). None takes exactly
            the labelled rows, which waits for a CUDA device once.

    Returns:
        LabelledRows, on the targets' device.

    Raises:
        TypeError: targets is not int64.
        ValueError: targets has not one dimension, capacity is below 1, or on the CPU, more rows are labelled than that.

    Source:
        the fixed-size search: torch.nonzero_static.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64; got {targets.dtype}")
    if targets.dim() != 1:
        raise ValueError(f"targets must have shape (rows,); got {tuple(targets.shape)}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, or None; got {capacity}")
    labelled = targets != ignore_index
    if capacity is None or not targets.numel() or _host_may_read(targets):
        rows = labelled.nonzero().squeeze(1)
        count = rows.numel()
        if capacity is None or not targets.numel():
            return LabelledRows(rows, None, count, targets.index_select(0, rows))
        if count > capacity:
            raise ValueError(f"capacity must be at least the {count} labelled rows; got {capacity}")
    found = torch.nonzero_static(labelled, size=capacity, fill_value=-1).squeeze(1)
    counts = found >= 0
    rows = found.clamp(min=0)
    total = labelled.sum()
    compact = targets.index_select(0, rows).where(counts, ignore_index)
    return LabelledRows(rows, counts, total, compact, total > capacity)


def labelled_rows(targets: torch.Tensor, ignore_index: int, *, picks: bool = False) -> LabelledRows:
    """What the loss makes of rows that were handed to it.

    On the CPU only labelled rows go through the head. On CUDA their number is not known without stalling the device,
    and a compiled graph cannot depend on it: every row is handed over, and `counts` tells which matter.

    Args:
        targets: int64 (rows,).
        ignore_index: the target of a row that is not labelled.
        picks: whether who computes the loss on a CPU leaves out the rows that do not count; else a graph breaks here,
            which costs less than their logits.
    """
    labelled = targets != ignore_index
    if (picks and torch.compiler.is_compiling()) or not _host_may_read(targets):
        return LabelledRows(None, labelled, labelled.sum(), targets)
    rows = labelled.nonzero().squeeze(1)
    if rows.numel() == targets.numel():
        return LabelledRows(None, None, targets.numel(), targets)
    return LabelledRows(rows, None, rows.numel(), targets.index_select(0, rows))


def _host_may_read(x: torch.Tensor) -> bool:
    """How many rows are labelled is the host's to know on the CPU; elsewhere asking would stall the device."""
    return x.device.type == "cpu"
