"""MLM and MNTP: selected tokens are hidden and predicted, at their own position or one before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from antlm_fast.objectives.masking import MaskingConfig, mask_sequence
from antlm_fast.types import Objective, Vocabulary


def masked_labels(
    ids: NDArray[np.int64],
    objective: Objective,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    rate: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Hide tokens of one sequence (length,).

    Returns:
        What the model sees (length,); the labelled positions within the sequence; their targets, the original tokens.
        Under MNTP token k is read at k - 1, so the first token is never selected.
    """
    maskable = ~np.isin(ids, vocabulary.special_ids)
    shift = 1 if objective is Objective.MNTP else 0
    maskable[:shift] = False
    seen, selected = mask_sequence(ids, maskable, masking, vocabulary, rate, rng)
    return seen, selected - shift, ids[selected]
