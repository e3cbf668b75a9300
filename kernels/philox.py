"""Philox4x32-7 in plain tensor operations, and the dropout masks that every implementation of an op shares.

The mask of attention dropout is a pure function of (seed, head, query row, key), that of a matrix's dropout one of
(seed, row, column), so that implementations in any language, on any device and in any dtype drop the same numbers, and
a backward can form the mask again. A counter's last word is 0 for the one and 1 for the other: they share no word.

Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_A, _KEY_STEP_B = 0x9E3779B9, 0xBB67AE85
# the fewest with which the authors found no failure in BigCrush (their table 2); ten are their margin
_ROUNDS = 7
# counters of a mask formed at a time by a thread of the CPU: five buffers of them stay in cache
_BLOCK_COUNTERS = 2**15


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
    if seed.device.type == "cpu" and not torch.compiler.is_compiling():
        return _keep_mask_in_blocks(int(seed), heads, query_rows, num_keys, dropout_p)
    groups = torch.arange(-(-num_keys // 4), device=seed.device)
    words = philox(seed, groups, query_rows[..., None], heads[..., None], torch.zeros_like(seed))
    threshold = drop_threshold(dropout_p)
    return torch.stack([word >= threshold for word in words], -1).flatten(-2)[..., :num_keys]


def keep_elements(seed: torch.Tensor, rows: int, columns: int, dropout_p: float) -> torch.Tensor:
    """Which elements of a matrix survive dropout.

    Word (column // 16) % 4 of philox(seed, counter = (column // 64 * 16 + column % 16, row % 2**32, row // 2**32, 1))
    belongs to an element, and is kept if it is at least drop_threshold(dropout_p): the four words of sixteen counters
    are four neighbouring vectors of sixteen columns.

    Args:
        seed: int64 ().
        rows, columns: the matrix's shape.
        dropout_p: the probability of dropping, in [0, 1).

    Returns:
        bool (rows, columns); True is kept.
    """
    groups = -(-columns // 64)
    row = torch.arange(rows, device=seed.device)[:, None]
    counters = torch.arange(groups * 16, device=seed.device)
    words = philox(seed, counters, row & _WORD, row >> 32, torch.ones_like(seed))
    threshold = drop_threshold(dropout_p)
    kept = torch.stack([(word >= threshold).view(rows, groups, 16) for word in words], 2)
    return kept.flatten(1)[:, :columns]


def _keep_mask_in_blocks(
    seed: int, heads: torch.Tensor, query_rows: torch.Tensor, num_keys: int, dropout_p: float
) -> torch.Tensor:
    """keep_mask, some rows at a time and in place: passes over what lies in cache are several times faster."""
    shape = torch.broadcast_shapes(heads.shape, query_rows.shape)
    heads, query_rows = (x.expand(shape).reshape(-1, 1) for x in (heads, query_rows))
    groups = torch.arange(-(-num_keys // 4), device="cpu")
    kept = torch.empty(heads.shape[0], groups.numel(), 4, dtype=torch.bool, device="cpu")
    threshold = drop_threshold(dropout_p)
    step = max(1, _BLOCK_COUNTERS * torch.get_num_threads() // max(1, groups.numel()))
    buffers = torch.empty(5, min(step, heads.shape[0]), groups.numel(), dtype=torch.int64, device="cpu")
    for start in range(0, heads.shape[0], step):
        block = slice(start, start + step)
        own = kept[block]
        words = _philox_in_place(seed, groups, query_rows[block], heads[block], buffers[:, : own.shape[0]])
        for place, word in enumerate(words):
            torch.ge(word, threshold, out=own[..., place])
    return kept.view(*shape, 4 * groups.numel())[..., :num_keys]


def _philox_in_place(
    seed: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, buffers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """philox of counters (c0, c1, c2, 0), c0 a row, c1 and c2 columns, in five buffers of their common shape."""
    keys = [((seed + i * _KEY_STEP_A) & _WORD, ((seed >> 32) + i * _KEY_STEP_B) & _WORD) for i in range(_ROUNDS)]
    # two rounds in which most words differ along one axis alone
    product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
    column, row = ((product_b >> 32) & _WORD) ^ c1 ^ keys[0][0], ((product_a >> 32) & _WORD) ^ keys[0][1]
    column_1, row_3 = product_b & _WORD, product_a & _WORD
    product_a, product_b = column * _MULTIPLIER_A, row * _MULTIPLIER_B
    w0, w1, w2, w3, free = buffers.unbind()
    torch.bitwise_xor(((product_b >> 32) & _WORD) ^ keys[1][0], column_1, out=w0)
    torch.bitwise_xor(((product_a >> 32) & _WORD) ^ keys[1][1], row_3, out=w2)
    # w1 and w3 are whole products from here on: their high halves are cut off once they have been used
    w1.copy_(product_b)
    w3.copy_(product_a)
    for key_a, key_b in keys[2:]:
        w0.mul_(_MULTIPLIER_A)
        w2.mul_(_MULTIPLIER_B)
        torch.bitwise_right_shift(w2, 32, out=free).bitwise_xor_(w1).bitwise_xor_(key_a).bitwise_and_(_WORD)
        torch.bitwise_right_shift(w0, 32, out=w1).bitwise_xor_(w3).bitwise_xor_(key_b).bitwise_and_(_WORD)
        w0, w1, w2, w3, free = free, w2, w1, w0, w3
    return w0, w1.bitwise_and_(_WORD), w2, w3.bitwise_and_(_WORD)
