"""Which sequences run together, and where their rows lie in the padded layout that dense operations need.

On the CPU lengths and flags are free to read, so sequences of like length are grouped, little is padded, and a batch
of one length is not moved at all. On an accelerator nothing may be read: there the plan is one block, padded to the
longest sequence, and its limits are computed on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from antlm_fast.kernels.tracing import kept


@dataclass(frozen=True)
class Block:
    """Sequences that run in one dense call, each padded to (len_q, len_k).

    Args:
        num_seqs, len_q, len_k: the call's shape.
        limits: int64 (num_seqs or 1, len_q); query i sees keys [0, limits[s, i]), and none if it is padding. None:
            every query sees every key, and nothing is padded.
        causal: the limits are a square causal mask and nothing is padded.
        unseen: a limit may be 0.
    """

    num_seqs: int
    len_q: int
    len_k: int
    limits: torch.Tensor | None
    causal: bool
    unseen: bool


@dataclass(frozen=True)
class RowMap:
    """How packed rows and padded slots correspond; each packed row that is not slack has exactly one slot.

    Args:
        rows: int64 (num_slots,), the packed row of a slot; a padding slot names its own sequence's first row.
        slots: int64 (num_rows,), the slot of a packed row; slack rows name any.
        slack: bool (num_rows, 1, 1), rows past the last sequence; None: there are none.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    slack: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """The blocks, in the order of their slots; a map is None where rows are slots already."""

    blocks: tuple[Block, ...]
    map_q: RowMap | None
    map_k: RowMap | None


@kept(maxsize=8)
def host_plan(
    starts_q: tuple[int, ...],
    starts_k: tuple[int, ...],
    prefix_lens: tuple[int, ...],
    total_q: int,
    total_k: int,
    max_scores: int,
) -> Plan:
    """The plan of sequences whose lengths and flags are known; every layer of a step asks for the same one.

    Sequences with more than max_scores query-key pairs join only their equals in length and visibility, because at that
    size neither padding nor a mask is cheap.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    lens_q = [stop - start for start, stop in pairwise(starts_q)]
    lens_k = [stop - start for start, stop in pairwise(starts_k)]
    visible = [_canonical(*sizes) for sizes in zip(lens_q, lens_k, prefix_lens, strict=True)]
    for s, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        if len_q == 0 and len_k == 0:
            continue
        long = len_q * len_k > max_scores
        key = (len_q, len_k, visible[s]) if long else (_rounded_up(len_q), _rounded_up(len_k))
        groups.setdefault(key, []).append(s)
    order = list(groups.values())
    blocks = tuple(_host_block(members, lens_q, lens_k, visible) for members in order)
    map_q = _host_map(order, [block.len_q for block in blocks], starts_q, total_q)
    map_k = _host_map(order, [block.len_k for block in blocks], starts_k, total_k)
    return Plan(blocks, map_q, map_k)


def device_plan(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_len: int | torch.Tensor,
    total_q: int,
    total_k: int,
) -> Plan:
    """The plan of packed sequences whose lengths stay on the device: one block, all of it padded."""
    lens_q, lens_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    rows = torch.arange(max_seqlen_q, device=lens_q.device)
    limits = row_limits(rows, lens_q[:, None], lens_k[:, None], _column(prefix_len))
    limits = limits.masked_fill(rows >= lens_q[:, None], 0)
    block = Block(lens_q.numel(), max_seqlen_q, max_seqlen_k, limits, causal=False, unseen=True)
    map_q = _device_map(cu_seqlens_q.long(), max_seqlen_q, total_q)
    map_k = _device_map(cu_seqlens_k.long(), max_seqlen_k, total_k)
    return Plan((block,), map_q, map_k)


def dense_device_plan(batch: int, len_q: int, len_k: int, prefix_len: int | torch.Tensor, device: torch.device) -> Plan:
    """The plan of a dense batch whose flags stay on the device: one block, nothing padded."""
    if isinstance(prefix_len, int) and prefix_len >= len_k:
        return Plan((Block(batch, len_q, len_k, None, causal=False, unseen=False),), None, None)
    rows = torch.arange(len_q, device=device)
    limits = row_limits(rows, len_q, len_k, _column(prefix_len)).view(-1, len_q)
    causal = isinstance(prefix_len, int) and len_q == len_k
    return Plan((Block(batch, len_q, len_k, limits, causal=causal, unseen=not causal),), None, None)


def prefixes(prefix_len: int | torch.Tensor, num_seqs: int) -> tuple[int, ...]:
    """The host's prefix length of each sequence."""
    return (prefix_len,) * num_seqs if isinstance(prefix_len, int) else tuple(prefix_len.tolist())


def row_limits(
    rows: torch.Tensor, len_q: int | torch.Tensor, len_k: int | torch.Tensor, prefix_len: int | torch.Tensor
) -> torch.Tensor:
    """clamp(max(i + 1 + len_k - len_q, prefix_len), 0, len_k) for query rows i, broadcast; int64."""
    limits = (rows + 1 + (len_k - len_q)).clamp(min=prefix_len)
    return limits.clamp(min=0).clamp(max=len_k)


def _column(prefix_len: int | torch.Tensor) -> int | torch.Tensor:
    return prefix_len if isinstance(prefix_len, int) else prefix_len.long()[:, None]


def _canonical(len_q: int, len_k: int, prefix_len: int) -> int:
    """The prefix that stands for all with the same visibility: 0 where it adds nothing, len_k where all is seen."""
    first_limit = 1 + len_k - len_q
    if max(first_limit, prefix_len) >= len_k:
        return len_k
    return 0 if prefix_len <= max(first_limit, 0) else prefix_len


def _rounded_up(length: int) -> int:
    """Lengths that may share a block: steps of 16, and from 256 on of an eighth of the power of two below."""
    step = max(16, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def _host_block(members: list[int], lens_q: list[int], lens_k: list[int], visible: list[int]) -> Block:
    sizes = [(lens_q[s], lens_k[s], visible[s]) for s in members]
    len_q, len_k = max(size[0] for size in sizes), max(size[1] for size in sizes)
    if len(set(sizes)) == 1:
        # one limit serves all
        shared = sizes[0]
        if shared[2] == len_k:
            return Block(len(members), len_q, len_k, None, causal=False, unseen=not len_k)
        sizes = [shared]
    else:
        # vector units and matrix units both want even shapes
        len_q, len_k = _rounded_up(len_q), _rounded_up(len_k)
    seq_q, seq_k, prefix = torch.tensor(sizes, dtype=torch.int64, device="cpu").T[..., None]
    rows = torch.arange(len_q, device="cpu")
    limits = row_limits(rows, seq_q, seq_k, prefix).masked_fill(rows >= seq_q, 0)
    causal = len(sizes) == 1 and sizes[0][2] == 0 and len_q == len_k
    return Block(len(members), len_q, len_k, limits, causal, unseen=bool((limits == 0).any()))


def _host_map(groups: list[list[int]], padded: list[int], starts: tuple[int, ...], total: int) -> RowMap | None:
    rows: list[int] = []
    slots = [0] * total
    for members, length in zip(groups, padded, strict=True):
        for s in members:
            start, stop = starts[s], starts[s + 1]
            slots[start:stop] = range(len(rows), len(rows) + stop - start)
            rows.extend(range(start, stop))
            # an empty sequence has no row to name; whatever row stands in for it is masked
            rows.extend([min(start, max(total - 1, 0))] * (length - (stop - start)))
    if rows == list(range(total)):
        return None
    slack = torch.arange(total, device="cpu") >= starts[-1] if starts[-1] < total else None
    of_slots, of_rows = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (rows, slots))
    return RowMap(of_slots, of_rows, _as_rows(slack))


def _device_map(starts: torch.Tensor, padded: int, total: int) -> RowMap:
    positions = torch.arange(padded, device=starts.device)
    first = starts[:-1, None]
    rows = torch.where(positions < starts.diff()[:, None], first + positions, first).clamp(max=max(total - 1, 0))
    every_row = torch.arange(total, device=starts.device)
    sequence = torch.searchsorted(starts[1:], every_row, right=True).clamp(max=max(starts.numel() - 2, 0))
    slots = sequence * padded + every_row - starts[sequence]
    slack = every_row >= starts[-1]
    return RowMap(rows.flatten(), slots.masked_fill(slack, 0), _as_rows(slack))


def _as_rows(slack: torch.Tensor | None) -> torch.Tensor | None:
    return None if slack is None else slack[:, None, None]
