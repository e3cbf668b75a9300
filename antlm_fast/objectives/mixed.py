"""From raw token rows to a batch the model can train on, for one objective or a mix of two."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from antlm_fast.objectives.causal import causal_labels
from antlm_fast.objectives.masked import masked_labels
from antlm_fast.objectives.masking import MaskingConfig
from antlm_fast.types import InputError, Objective, PackedBatch, TokenRows, Vocabulary

FULL = np.iinfo(np.int32).max  # a prefix at least as long as any sequence: bidirectional


def make_batch(
    rows: TokenRows,
    *,
    masked_share: float,
    masked_objective: Objective,
    visibility: str | None,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    rate: float,
    key: tuple[int, ...],
) -> PackedBatch:
    """Apply the objective to raw rows; a pure function of its arguments.

    Args:
        rows: packed token ids; they are not changed.
        masked_share: share of the sequences trained on masked_objective, the others on CLM. A number of sequences
            between two whole numbers is rounded up or down at random, so that the share holds on average.
        masked_objective: MLM or MNTP.
        visibility: None for each objective's own mask (CLM causal, MLM and MNTP full), or "causal" / "full" for all.
        rate: mask rate of this step.
        key: non-negative integers that name this batch, such as (seed, step, micro_batch, rank); they alone seed
            the random numbers.

    Returns:
        PackedBatch on the CPU, with labelled positions and targets for each objective whose share is not 0.

    Raises:
        InputError: a token id lies outside the vocabulary.
    """
    ids, cu_seqlens = rows.ids, rows.cu_seqlens.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary.size):
        bad = ids[(ids < 0) | (ids >= vocabulary.size)][0]
        raise InputError(f"rows.ids must be token ids below the vocabulary's size {vocabulary.size}; got {bad}")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    masked = _masked_sequences(len(cu_seqlens) - 1, masked_share, rng)

    seen = ids.copy()
    positions: dict[Objective, list[NDArray[np.int64]]] = {}
    targets: dict[Objective, list[NDArray[np.int64]]] = {}
    for objective, share in ((Objective.CLM, 1 - masked_share), (masked_objective, masked_share)):
        if share > 0:
            positions[objective], targets[objective] = [], []
    for start, end, is_masked in zip(cu_seqlens[:-1], cu_seqlens[1:], masked, strict=True):
        if is_masked:
            sequence = ids[start:end]
            seen[start:end], where, what = masked_labels(sequence, masked_objective, masking, vocabulary, rate, rng)
            positions[masked_objective].append(start + where)
            targets[masked_objective].append(what)
        else:
            where, what = causal_labels(ids, start, end)
            positions[Objective.CLM].append(where)
            targets[Objective.CLM].append(what)

    own_mask = np.where(masked, FULL, 0)
    prefix_len = own_mask if visibility is None else np.full(len(masked), FULL if visibility == "full" else 0)
    return PackedBatch(
        input_ids=torch.from_numpy(seen),
        cu_seqlens=torch.from_numpy(rows.cu_seqlens.astype(np.int32)),
        max_seqlen=int(np.diff(cu_seqlens).max(initial=0)),
        prefix_len=torch.from_numpy(prefix_len.astype(np.int32)),
        labelled={objective: _join(parts) for objective, parts in positions.items()},
        targets={objective: _join(parts) for objective, parts in targets.items()},
    )


def _masked_sequences(count: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which sequences are masked: share * count of them, at random places."""
    if share in (0, 1):
        return np.full(count, share == 1)
    chosen = int(share * count + rng.random())
    return np.argsort(np.argsort(rng.random(count), kind="stable"), kind="stable") < chosen


def _join(parts: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64))
