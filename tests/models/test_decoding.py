"""Generation and filling against direct forwards; filters by hand-made logits."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.models.decoding import fill, generate
from antlm_fast.types import InputError

VOCAB, MASK = 10, 9


@pytest.fixture(scope="module")
def model() -> BabyLlama:
    torch.manual_seed(1)
    config = BabyLlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    return BabyLlama(config)


class FixedLogits(nn.Module):
    """A model whose every position predicts softmax(log of the given weights)."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(weights), max_position_embeddings=4000)
        self.head_weight = torch.tensor(weights).log()[:, None]

        self.head_bias = None

    def hidden_states(self, input_ids: Tensor, *, causal: bool, rows: Tensor) -> Tensor:
        return torch.ones(*rows.shape, 1)

    def head_features(self, hidden: Tensor) -> Tensor:
        return hidden


def test_greedy_takes_the_most_probable_token_of_a_full_forward(model: BabyLlama) -> None:
    expected = [3, 1]
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model(torch.tensor([expected]), causal=True)[0, -1].argmax()))
    assert generate(model, [3, 1], 6, temperature=0.0) == expected
    assert generate(model, torch.tensor([3, 1]), 6, temperature=0.0, seed=5) == expected
    assert generate(model, [3, 1], 6, top_k=1) == expected


def test_a_head_of_its_own_is_read_in_full(architecture: str, tiny: Any) -> None:
    made = tiny(architecture, torch.float32)
    expected, ids = [3, 1], [0, 4, 30, 5, 30, 1]
    with torch.no_grad():
        made.head.bias.copy_(torch.linspace(-1, 1, 31)[torch.randperm(31)])
        for _ in range(6):
            expected.append(int(made(torch.tensor([expected]), causal=True)[0, -1].argmax()))
        logits = made(torch.tensor([ids]), causal=False)[0]
    assert generate(made, [3, 1], 6, temperature=0.0) == expected
    for position, candidates in fill(made, ids, 30, top_k=30, shift=1).items():
        shares = torch.softmax(logits[position - 1][:30], dim=-1)
        assert dict(candidates) == pytest.approx(dict(enumerate(shares.tolist())), abs=1e-5)


def test_a_seed_gives_the_same_text_and_another_seed_another(model: BabyLlama) -> None:
    texts = [generate(model, [3], 12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert [len(text) for text in texts] == [13, 13, 13]


def test_generation_stops_at_eos(model: BabyLlama) -> None:
    greedy = generate(model, [3, 1], 6, temperature=0.0)
    eos = greedy[4]
    assert generate(model, [3, 1], 6, temperature=0.0, eos_id=eos) == greedy[: greedy.index(eos, 2) + 1]


def test_banned_ids_are_never_generated() -> None:
    drawn = generate(FixedLogits([0.5, 0.3, 0.1, 0.1]), [0], 400, banned_ids={0, 2})[1:]
    assert set(drawn) == {1, 3}
    assert generate(FixedLogits([0.5, 0.3, 0.1, 0.1]), [0], 2, temperature=0.0, banned_ids=[0]) == [0, 1, 1]


def test_samples_follow_the_probabilities_and_the_temperature() -> None:
    counts = Counter(generate(FixedLogits([0.6, 0.3, 0.1]), [0], 1000, seed=4)[1:])
    # five standard deviations of a binomial share over 1000 draws
    assert counts[0] / 1000 == pytest.approx(0.6, abs=0.08)
    assert counts[2] / 1000 == pytest.approx(0.1, abs=0.05)
    colder = Counter(generate(FixedLogits([0.6, 0.3, 0.1]), [0], 1000, temperature=0.5, seed=4)[1:])
    assert colder[0] / 1000 == pytest.approx(0.36 / 0.46, abs=0.07)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 50}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 2, "top_p": 0.9}, {0, 1}),
        ({"temperature": 1e-30}, {0}),
    ],
)
def test_filters_leave_the_tokens_worked_out_by_hand(options: dict[str, Any], left: set[int]) -> None:
    drawn = generate(FixedLogits([0.5, 0.3, 0.15, 0.05]), [0], 500, seed=2, **options)[1:]
    assert set(drawn) == left


def test_fill_reads_the_masked_position_or_the_one_before_it(model: BabyLlama) -> None:
    ids = [0, 4, MASK, 5, MASK, 1]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), causal=False)[0]
    for shift in (0, 1):
        filled = fill(model, ids, MASK, top_k=3, shift=shift, banned_ids=[0, 1])
        assert list(filled) == [2, 4]
        for position, candidates in filled.items():
            allowed = logits[position - shift].clone()
            allowed[[0, 1, MASK]] = float("-inf")
            expected, order = torch.softmax(allowed, dim=-1).topk(3)
            assert [token for token, _ in candidates] == order.tolist()
            assert [share for _, share in candidates] == pytest.approx(expected.tolist(), abs=1e-5)


def test_fill_never_proposes_the_mask_and_its_probabilities_add_up() -> None:
    filled = fill(FixedLogits([0.2, 0.1, 0.7]), [0, 2], 2, top_k=2)
    assert filled == {1: [(0, pytest.approx(2 / 3)), (1, pytest.approx(1 / 3))]}


def test_the_training_mode_comes_back(model: BabyLlama) -> None:
    model.train()
    generate(model, [3], 1)
    fill(model, [3, MASK], MASK)
    assert model.training is True


@pytest.mark.parametrize(
    ("arguments", "options", "fragment"),
    [
        (([], 1), {}, "input_ids must hold at least one token; got none"),
        (([10], 1), {}, "input_ids must be between 0 and 9; got 10"),
        ((torch.zeros(1, 2, dtype=torch.int64), 1), {}, "input_ids must be one sequence (seqlen,); got shape (1, 2)"),
        (([1], -1), {}, "max_new_tokens must be at least 0; got -1"),
        (([1, 2], 15), {}, "prompt of 2 tokens within max_position_embeddings (16); got 15"),
        (([1], 1), {"temperature": -0.5}, "temperature must be finite and at least 0; got -0.5"),
        (([1], 1), {"temperature": float("nan")}, "temperature must be finite and at least 0; got nan"),
        (([1], 1), {"top_k": 0}, "top_k must be at least 1 or None; got 0"),
        (([1], 1), {"top_p": 1.5}, "top_p must be above 0 and at most 1, or None; got 1.5"),
        (([1], 1), {"banned_ids": [12]}, "banned_ids must be between 0 and 9; got 12"),
        (([1], 1), {"banned_ids": range(10)}, "banned_ids must leave at least one id; got all 10"),
    ],
)
def test_generate_refuses(model: BabyLlama, arguments: tuple[Any, ...], options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(InputError) as error:
        generate(model, *arguments, **options)
    assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("ids", "options", "fragment"),
    [
        ([1, 2], {}, "input_ids must hold mask_id (9) at least once; got none"),
        ([MASK, 2], {"shift": 1}, "input_ids must have a token before the first mask"),
        ([1, MASK], {"shift": 2}, "shift must be 0 or 1; got 2"),
        ([1, MASK], {"top_k": 10}, "top_k must be between 1 and 9 (ids not banned); got 10"),
        ([MASK] * 17, {}, "input_ids must be at most max_position_embeddings (16) long; got 17 tokens"),
    ],
)
def test_fill_refuses(model: BabyLlama, ids: list[int], options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(InputError) as error:
        fill(model, ids, MASK, **options)
    assert fragment in str(error.value)
