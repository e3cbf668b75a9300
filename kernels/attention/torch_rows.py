"""Packed rows to the padded slots of a plan and back, with gradients."""

from __future__ import annotations

import torch

from antlm_fast.kernels.attention.torch_plan import Block, Plan, RowMap


def pad(x: torch.Tensor, row_map: RowMap | None) -> torch.Tensor:
    return x if row_map is None else _Pad.apply(x, row_map)


def unpad(x: torch.Tensor, row_map: RowMap | None) -> torch.Tensor:
    return x if row_map is None else _Unpad.apply(x, row_map)


def unpad_lse(lse: torch.Tensor, row_map: RowMap | None) -> torch.Tensor:
    """(heads, slots) to (heads, rows), -inf in slack rows."""
    if row_map is None:
        return lse
    lse = lse.index_select(1, row_map.slots)
    return lse if row_map.slack is None else lse.masked_fill(row_map.slack.view(-1), -torch.inf)


def packed_rows(row_map: RowMap | None, first: int, block: Block, device: torch.device) -> torch.Tensor:
    """int64 (num_seqs, len_q): the packed row of each query slot of a block, whose slots begin at `first`."""
    last = first + block.num_seqs * block.len_q
    rows = torch.arange(first, last, device=device) if row_map is None else row_map.rows[first:last]
    return rows.view(block.num_seqs, block.len_q)


def parts(x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """x in runs of rows; all of it as it is where one run is all, or its gradient would be copied."""
    return (x,) if sizes == [x.shape[0]] else x.split(sizes)


def is_trivial(plan: Plan) -> bool:
    """Whether one block holds all rows where they lie."""
    return plan.map_q is None and plan.map_k is None and len(plan.blocks) == 1


def nothing_to_see(q: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    """Zeros of q's shape that still pass (zero) gradients to every tensor."""
    zeros = _cleared(q)
    return zeros + sum(_cleared(x).sum() for x in others if x is not None)


def no_lse(q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _cleared(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)


def _to_slots(x: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    return x.index_select(0, row_map.rows)


def _to_rows(x: torch.Tensor, row_map: RowMap) -> torch.Tensor:
    if not x.shape[0]:
        return x.new_zeros(row_map.slots.shape[0], *x.shape[1:])
    rows = x.index_select(0, row_map.slots)
    return rows if row_map.slack is None else rows.masked_fill_(row_map.slack, 0.0)


class _Pad(torch.autograd.Function):
    """Packed rows to slots. The way back is a gather too, since padding slots have no gradient: autograd would add."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, row_map: RowMap) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.row_map = row_map
        return _to_slots(x, row_map)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[no-untyped-def]
        return _to_rows(gradient, ctx.row_map), None


class _Unpad(torch.autograd.Function):
    """Slots to packed rows; what padding slots are handed back is multiplied by probabilities that are 0."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, row_map: RowMap) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.row_map = row_map
        return _to_rows(x, row_map)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[no-untyped-def]
        return _to_slots(gradient, ctx.row_map), None
