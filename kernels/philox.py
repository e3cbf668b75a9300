"""Philox4x32-7 in plain tensor operations, and the dropout mask that every attention implementation shares.

The mask of attention dropout is a pure function of (seed, head, query row, key), so that implementations in any
language, on any device and in any dtype drop the same probabilities, and a backward can form the mask again.

Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_A, _KEY_STEP_B = 0x9E3779B9, 0xBB67AE85
# the fewest with which the authors found no failure in BigCrush (their table 2); ten are their margin
_ROUNDS = 7


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words that Philox4x32-7 makes of a counter and a key.

    Args:
        seed: int64 (); its low 32 bits are the key's first word, its high 32 bits the second.
        c0, c1, c2, c3: int64 tensors of values in [0, 2**32) that broadcast together: the counter's words. They are
            combined as late as broadcasting allows, so counters that differ along few axes cost little.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    key_a, key_b = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # a product of two 32-bit words may pass 2**63; int64 wraps around, and its bits are still the right ones
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = ((product_b >> 32) & _WORD) ^ (c1 ^ key_a)
        c2 = ((product_a >> 32) & _WORD) ^ (c3 ^ key_b)
        c1, c3 = product_b & _WORD, product_a & _WORD
        key_a, key_b = (key_a + _KEY_STEP_A) & _WORD, (key_b + _KEY_STEP_B) & _WORD
    return c0, c1, c2, c3


def drop_threshold(dropout_p: float) -> int:
    """The integer below which a word is dropped: floor(dropout_p * 2**32), which fits 32 bits for every p < 1."""
    return int(dropout_p * 2.0**32)


def keep_mask(
    seed: torch.Tensor, heads: torch.Tensor, query_rows: torch.Tensor, num_keys: int, dropout_p: float
) -> torch.Tensor:
    """Which attention probabilities survive dropout.

    Word j % 4 of philox(seed, counter = (j // 4, query row, head, 0)) belongs to key j of the query's sequence, and is
    kept if it is at least drop_threshold(dropout_p). All four words are used, since making them is what costs. Query
    rows are counted over the whole packed (or flattened dense) layout, keys from the start of the sequence.

    Args:
        seed: int64 ().
        heads, query_rows: int64 tensors that broadcast together.
        num_keys: the keys [0, num_keys) of every row.
        dropout_p: the probability of dropping, in [0, 1).

    Returns:
        bool, the broadcast shape and (num_keys,); True is kept.
    """
    groups = torch.arange(-(-num_keys // 4), device=seed.device)
    words = philox(seed, groups, query_rows[..., None], heads[..., None], torch.zeros_like(seed))
    threshold = drop_threshold(dropout_p)
    return torch.stack([word >= threshold for word in words], -1).flatten(-2)[..., :num_keys]
