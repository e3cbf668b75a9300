"""Which rows count: the only reader of ignore_index in the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LabelledRows:
    """The rows that go through the head.

    Args:
        rows: int64 (n,), ascending; None is every row, and then nothing is gathered.
        counts: bool (n,), which of those rows are labelled; None is all of them.
        count: how many rows are labelled: an int, or int64 () on the device.
    """

    rows: torch.Tensor | None
    counts: torch.Tensor | None
    count: int | torch.Tensor


def labelled_rows(targets: torch.Tensor, ignore_index: int) -> LabelledRows:
    """The rows whose target is not ignore_index.

    On the CPU only those rows go through the head. On CUDA their number is not known without stalling the device, so
    every row goes through and `counts` tells which matter: a caller that knows its labelled positions on the host
    hands over those rows alone.

    Args:
        targets: int64 (rows,).
        ignore_index: the target of a row that is not labelled.
    """
    labelled = targets != ignore_index
    if not _host_may_read(targets):
        return LabelledRows(None, labelled, labelled.sum())
    rows = labelled.nonzero().squeeze(1)
    if rows.numel() == targets.numel():
        return LabelledRows(None, None, targets.numel())
    return LabelledRows(rows, None, rows.numel())


def _host_may_read(x: torch.Tensor) -> bool:
    """How many rows are labelled is the host's to know on the CPU; elsewhere asking would stall the device."""
    return x.device.type == "cpu"
