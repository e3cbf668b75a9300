"""CLM: the target at position t is token t + 1 of the same sequence; a sequence's last position has no target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def causal_labels(ids: NDArray[np.int64], start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labelled positions and their targets for the sequence ids[start:end]."""
    return np.arange(start, end - 1), ids[start + 1 : end]
