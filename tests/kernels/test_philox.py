"""Philox against its published answers, and the dropout mask's law."""

from __future__ import annotations

import pytest
import torch

from antlm_fast.kernels.philox import drop_threshold, keep_mask, philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        # kat_vectors of the authors' Random123 library, philox 4x32, 7 rounds
        ([0, 0, 0, 0], [0, 0], [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    unsigned = key[0] | key[1] << 32
    seed = torch.tensor(unsigned - 2**64 if unsigned >= 2**63 else unsigned)
    words = philox(seed, *(torch.tensor(word) for word in counter))
    assert [int(word) for word in words] == answer


def test_broadcast_counters_give_the_words_of_each_counter() -> None:
    seed = torch.tensor(7)
    first, second = torch.arange(3)[:, None], torch.arange(4)
    together = philox(seed, first, second, torch.tensor(5), torch.tensor(0))[0]
    one_by_one = [
        [int(philox(seed, torch.tensor(i), torch.tensor(j), torch.tensor(5), torch.tensor(0))[0]) for j in range(4)]
        for i in range(3)
    ]
    assert together.tolist() == one_by_one


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (0.25, 2**30), (0.5, 2**31), (1.0 - 2.0**-53, 2**32 - 1)])
def test_threshold_is_exact_and_fits_32_bits(p: float, threshold: int) -> None:
    assert drop_threshold(p) == threshold


def test_mask_keeps_the_right_share_and_rows_are_not_alike() -> None:
    heads, rows, cols, p = 4, 128, 128, 0.1
    axes = torch.arange(heads)[:, None], torch.arange(rows), cols
    kept = keep_mask(torch.tensor(3), *axes, p)
    assert kept.shape == (heads, rows, cols)
    count = kept.numel()
    # six standard deviations of a binomial share
    assert abs(kept.double().mean().item() - (1 - p)) < 6 * (p * (1 - p) / count) ** 0.5
    centred = kept.double() - (1 - p)
    for a, b in ((centred[0], centred[1]), (centred[:, 1:], centred[:, :-1]), (centred[..., 1:], centred[..., :-1])):
        assert abs((a * b).mean().item()) < 6 * p * (1 - p) / a.numel() ** 0.5
    assert not torch.equal(kept, keep_mask(torch.tensor(3 + 2**32), *axes, p)), "the seed's high word is not used"


def test_mask_is_that_of_its_definition() -> None:
    """Key j of a row is word j % 4 of the counter (j // 4, row, head, 0); seven keys do not fill the last counter."""
    seed, threshold = torch.tensor(11), drop_threshold(0.4)
    kept = keep_mask(seed, torch.tensor([[0], [5]]), torch.tensor([3, 900]), 7, 0.4)
    for place, head in enumerate((0, 5)):
        for row_place, row in enumerate((3, 900)):
            for key in range(7):
                counter = (torch.tensor(word) for word in (key // 4, row, head, 0))
                assert bool(kept[place, row_place, key]) == (int(philox(seed, *counter)[key % 4]) >= threshold)
