"""Which tokens are selected for prediction, and what the model sees in their place.

Each strategy maps (maskable positions, rate, random numbers) to selected tokens; all randomness comes from the
generator given, which the caller makes from (seed, step, micro-batch, rank) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from antlm_fast.types import InputError, Vocabulary

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How tokens are selected and hidden in MLM and MNTP.

    Args:
        strategy: "token" (independent; AntLM's default for BabyLlama), "span" (LTG-BERT), "span-uniform" (GPT-BERT)
            or "whole-word".
        rate: share of the maskable tokens that is selected; 0.15 in arXiv 2412.03275.
        final_rate: the rate at the end of the run, reached linearly in steps; None keeps it constant.
        mask_share, random_share: of the selected tokens, the shares replaced by the mask token and by a random
            token; the rest stays as it is.
    """

    strategy: Literal["token", "span", "span-uniform", "whole-word"] = "token"
    rate: float = 0.15
    final_rate: float | None = None
    mask_share: float = 0.8
    random_share: float = 0.1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"masking.strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}")
        for name, value in (("rate", self.rate), ("final_rate", self.final_rate)):
            if value is not None and not 0 < value < 1:
                raise InputError(f"masking.{name} must be between 0 and 1, both excluded; got {value}")
        if self.mask_share < 0 or self.random_share < 0 or self.mask_share + self.random_share > 1:
            raise InputError(
                "masking.mask_share and random_share must be at least 0 and sum to at most 1; "
                f"got {self.mask_share} and {self.random_share}"
            )

    def rate_at(self, step: int, total_steps: int) -> float:
        """Mask rate at a 0-based step: linear from rate to final_rate, which the last step has."""
        if self.final_rate is None or total_steps < 2:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * min(step, total_steps - 1) / (total_steps - 1)


def mask_sequence(
    ids: Ints, maskable: Bools, config: MaskingConfig, vocabulary: Vocabulary, rate: float, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Select tokens of one sequence and hide them.

    Args:
        ids: (length,) the original tokens.
        maskable: (length,) which of them may be selected.
        rate: share to select; at least one token is, if any is maskable.

    Returns:
        The tokens the model sees (length,), and the selected positions, ascending.
    """
    candidates = np.flatnonzero(maskable)
    if not candidates.size:
        return ids, candidates
    group = STRATEGIES[config.strategy](candidates, ids, vocabulary, rate, rng)  # -1: not selected
    selected = candidates[group >= 0]
    draw = rng.random(group.max() + 1)[group[group >= 0]]  # tokens of one group share their fate
    hidden = ids.copy()
    hidden[selected[draw < config.mask_share]] = vocabulary.mask_id
    swapped = selected[(draw >= config.mask_share) & (draw < config.mask_share + config.random_share)]
    hidden[swapped] = _random_tokens(swapped.size, vocabulary, rng)
    return hidden, selected


def _random_tokens(count: int, vocabulary: Vocabulary, rng: np.random.Generator) -> Ints:
    """Uniform over the ids that are not special: draw among their number, then step over each special id."""
    special = np.array(sorted(set(vocabulary.special_ids)), dtype=np.int64)
    tokens = (rng.random(count) * (vocabulary.size - special.size)).astype(np.int64)
    for skipped in special:
        tokens += tokens >= skipped
    return tokens


def _at_least_one(chosen: Bools, scores: NDArray[np.float64]) -> Bools:
    if not chosen.any():
        chosen[np.argmin(scores)] = True
    return chosen


def _tokens(candidates: Ints, ids: Ints, vocabulary: Vocabulary, rate: float, rng: np.random.Generator) -> Ints:
    """Each token on its own, with probability rate."""
    scores = rng.random(candidates.size)
    chosen = _at_least_one(scores < rate, scores)
    return np.where(chosen, np.arange(candidates.size), -1)


def _words(candidates: Ints, ids: Ints, vocabulary: Vocabulary, rate: float, rng: np.random.Generator) -> Ints:
    """Whole words, each with probability rate; each token of a chosen word then has its own 80/10/10 draw (BERT)."""
    apart = np.diff(candidates, prepend=candidates[0] - 2) > 1  # a special token in between ends a word
    word = np.cumsum(vocabulary.word_start[ids[candidates]] | apart) - 1
    scores = rng.random(word[-1] + 1)
    chosen = _at_least_one(scores < rate, scores)[word]
    return np.where(chosen, np.arange(candidates.size), -1)


def _spans(candidates: Ints, ids: Ints, vocabulary: Vocabulary, rate: float, rng: np.random.Generator) -> Ints:
    """LTG-BERT (arXiv 2303.09859): Binomial(maskable, rate) tokens, at least one, covered by spans of length
    Geometric(1/3) mod 10 with uniform starts; the last span is cut so that the number is met exactly.

    The maskable tokens are a ring: a span that runs over the end goes on at the start. So no place differs from
    another, and all have the same rate; were spans to end with the row, its first tokens would be starved."""
    size = candidates.size
    wanted = max(int(rng.binomial(size, rate)), 1)
    ring = np.arange(size + 9) % size
    group = np.full(size, -1, dtype=np.int64)
    spans = 0
    while wanted > 0:
        length = min(int(rng.geometric(1 / 3)) % 10, size)
        start = int(rng.random() * size)
        span = ring[start : start + length]
        free = span[group[span] < 0][:wanted]
        if free.size:
            group[free] = spans
            spans += 1
            wanted -= free.size
    return group


def _uniform_spans(candidates: Ints, ids: Ints, vocabulary: Vocabulary, rate: float, rng: np.random.Generator) -> Ints:
    """GPT-BERT (arXiv 2410.24159): the row is cut into spans of 1 to 3 tokens, the spans are ranked at random, and
    tokens are taken in that order until the share is met; a share between two whole numbers is met on average.

    The cut begins anywhere in the ring of maskable tokens, so that all places have the same rate: the place where it
    begins is never the second or third of a span, which the end of the share may cut off."""
    lengths = 1 + (rng.random(candidates.size) * 3).astype(np.int64)
    span = np.searchsorted(np.cumsum(lengths), np.arange(candidates.size), side="right")
    order = np.argsort(rng.random(candidates.size)[span], kind="stable")  # tokens of a span stay neighbours
    wanted = max(int(candidates.size * rate + rng.random()), 1)
    group = np.full(candidates.size, -1, dtype=np.int64)
    group[order[:wanted]] = span[order[:wanted]]
    return np.roll(group, int(rng.random() * candidates.size))


STRATEGIES: dict[str, Callable[[Ints, Ints, Vocabulary, float, np.random.Generator], Ints]] = {
    "token": _tokens,
    "span": _spans,
    "span-uniform": _uniform_spans,
    "whole-word": _words,
}
