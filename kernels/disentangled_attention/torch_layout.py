"""Where the rows of packed sequences lie in dense blocks, and where each block's queries are among its keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from antlm_fast.kernels.attention.torch_plan import Block, Plan, RowMap, device_plan, host_plan, prefixes, row_limits
from antlm_fast.kernels.attention.torch_rows import packed_rows


@dataclass(frozen=True)
class Packing:
    """The packing of a call and what its sequences see, as in the api; one prefix length for all (int) or for each."""

    starts_q: torch.Tensor
    starts_k: torch.Tensor
    max_q: int
    max_k: int
    total_q: int
    total_k: int
    prefix_len: int | torch.Tensor

    def prefix_of(self, sequences: torch.Tensor) -> int | torch.Tensor:
        return self.prefix_len if isinstance(self.prefix_len, int) else self.prefix_len.long()[sequences]


@dataclass(frozen=True)
class Places:
    """Where a block's queries are among its keys.

    Args:
        offset: query i is at place i + offset; an int, or int64 (num_seqs,), one for each sequence.
        positions: int64 (num_seqs, len_q), the places of queries without that order; None: they have it.
        mask_rows: int64 (num_seqs, len_q), the rows that name dropout's mask.
    """

    offset: int | torch.Tensor
    positions: torch.Tensor | None
    mask_rows: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """A plan, and of each of its blocks the places.

    Args:
        real_q, real_k: bool (slots, 1, 1), which slots hold a row of a sequence; None: the others hold numbers that do
            no harm.
    """

    plan: Plan
    places: tuple[Places, ...]
    real_q: torch.Tensor | None = None
    real_k: torch.Tensor | None = None


def host_layout(packing: Packing, positions_q: torch.Tensor | None, max_scores: int) -> Layout:
    """Sequences grouped by length; with more than max_scores query-key pairs only with their equals."""
    starts_q, starts_k = (tuple(x.tolist()) for x in (packing.starts_q, packing.starts_k))
    prefix_lens = prefixes(packing.prefix_len, len(starts_q) - 1)
    plan = host_plan(starts_q, starts_k, prefix_lens, packing.total_q, packing.total_k, max_scores)
    lens_q, lens_k = packing.starts_q.diff().long(), packing.starts_k.diff().long()
    ahead = lens_k - lens_q
    of_interest = ahead[(lens_q > 0) & (lens_k > 0)].tolist()
    blocks, places, first = [], [], 0
    for block in plan.blocks:
        rows = packed_rows(plan.map_q, first, block, lens_q.device)
        if positions_q is not None:
            own = _sequences(packing.starts_q, rows)
            positions = positions_q.long()[rows]
            limits = row_limits(positions, lens_k[own], lens_k[own], packing.prefix_of(own))
            if plan.map_q is not None:
                slots = torch.arange(first, first + rows.numel(), device=rows.device).view(rows.shape)
                limits = limits.where(plan.map_q.slots[rows] == slots, 0)
            block = replace(block, limits=limits, causal=False, unseen=bool((limits == 0).any()))
            places.append(Places(0, positions, packing.starts_k.long()[own] + positions))
        elif block.len_q and len(set(of_interest)) > 1:
            places.append(Places(ahead[_sequences(packing.starts_q, rows[:, 0].contiguous())], None, rows))
        else:
            places.append(Places(of_interest[0] if of_interest else 0, None, rows))
        blocks.append(block)
        first += rows.numel()
    return Layout(replace(plan, blocks=tuple(blocks)), tuple(places))


def device_layout(packing: Packing, positions_q: torch.Tensor | None) -> Layout:
    """All sequences padded to the longest, without reading anything.

    Queries with positions of their own lie where those of all places would: rows that nobody asked for see nothing.
    """
    starts_q, starts_k = packing.starts_q.long(), packing.starts_k.long()
    lens_q, lens_k = starts_q.diff(), starts_k.diff()
    plan = device_plan(
        packing.starts_q,
        packing.starts_k,
        packing.max_q,
        packing.max_k,
        packing.prefix_len,
        packing.total_q,
        packing.total_k,
    )
    real_k = _column(torch.arange(packing.max_k, device=lens_k.device) < lens_k[:, None])
    if positions_q is None:
        real_q = _column(torch.arange(packing.max_q, device=lens_q.device) < lens_q[:, None])
        rows = packed_rows(plan.map_q, 0, plan.blocks[0], lens_q.device)
        return Layout(plan, (Places(lens_k - lens_q, None, rows),), real_q, real_k)
    map_q, real_q = _by_position(starts_q, positions_q.long(), packing.max_k)
    positions = torch.arange(packing.max_k, device=lens_q.device)
    prefix = packing.prefix_len if isinstance(packing.prefix_len, int) else packing.prefix_len.long()[:, None]
    limits = row_limits(positions, lens_k[:, None], lens_k[:, None], prefix)
    limits = limits.masked_fill(~real_q.view(-1, packing.max_k), 0)
    block = Block(lens_k.numel(), packing.max_k, packing.max_k, limits, causal=False, unseen=True)
    places = Places(0, None, starts_k[:-1, None] + positions)
    return Layout(replace(plan, blocks=(block,), map_q=map_q), (places,), real_q, real_k)


def _by_position(starts: torch.Tensor, positions: torch.Tensor, padded: int) -> tuple[RowMap, torch.Tensor]:
    """The map of rows that lie at their positions, and which slots hold one."""
    every_row = torch.arange(positions.numel(), device=starts.device)
    slack = every_row >= starts[-1]
    num_slots = (starts.numel() - 1) * padded
    slots = (_sequences(starts, every_row) * padded + positions).masked_fill(slack, num_slots)
    every_slot = torch.arange(num_slots, device=starts.device)
    # rows ascend by sequence and position, so they are found without a scatter
    rows = torch.searchsorted(slots, every_slot).clamp(max=positions.numel() - 1)
    real = slots[rows] == every_slot
    return RowMap(rows, slots.masked_fill(slack, 0), slack[:, None, None]), _column(real)


def _sequences(starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The sequence of each row; slack rows name any."""
    return torch.searchsorted(starts[1:].long(), rows, right=True).clamp(max=starts.numel() - 2)


def _column(real: torch.Tensor) -> torch.Tensor:
    return real.reshape(-1, 1, 1)
