"""Masking strategies: shares, shapes of the selection, specials, and what stands in a selected token's place."""

import numpy as np
import pytest

from antlm_fast.objectives.masking import STRATEGIES, MaskingConfig, mask_sequence
from antlm_fast.types import InputError, Vocabulary

SIZE = 500
VOCABULARY = Vocabulary(size=SIZE, mask_id=3, special_ids=(0, 1, 2, 3, 250), word_start=np.arange(SIZE) % 3 != 0)
ALLOWED = sorted(set(range(SIZE)) - set(VOCABULARY.special_ids))


def sequence(length=400, seed=0):
    return np.random.default_rng(seed).choice(ALLOWED, size=length)


def masked(strategy, *, rate=0.15, seed=0, ids=None, maskable=None, **shares):
    ids = sequence() if ids is None else ids
    maskable = np.ones(len(ids), dtype=bool) if maskable is None else maskable
    config = MaskingConfig(strategy=strategy, rate=rate, **shares)
    return ids, *mask_sequence(ids, maskable, config, VOCABULARY, rate, np.random.default_rng(seed))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_selected_share_is_the_rate_on_average(strategy):
    shares = [len(masked(strategy, seed=seed)[2]) / 400 for seed in range(200)]
    # binomial spread of the mean of 200 draws is 0.0013; whole words are three times as rough
    assert abs(np.mean(shares) - 0.15) < 0.006


def rates(strategy, length, draws, *, rate=0.15, maskable=None):
    """How often each place of a row was selected, as a share of the stated rate."""
    counts, ids = np.zeros(length), sequence(length)
    maskable = np.ones(length, dtype=bool) if maskable is None else maskable
    config, rng = MaskingConfig(strategy=strategy, rate=rate), np.random.default_rng(0)
    for _ in range(draws):
        counts[mask_sequence(ids, maskable, config, VOCABULARY, rate, rng)[1]] += 1
    return counts / draws / rate


SPANS = ("span", "span-uniform")


@pytest.mark.parametrize("strategy", SPANS)
def test_first_and_last_tokens_of_a_row_are_not_starved(strategy):
    short = rates(strategy, 20, 20_000)
    assert np.abs(short - 1).max() < 0.05  # one place's spread is 0.017
    assert short.mean() == pytest.approx(1, abs=0.02)  # a row without a token gets one: Binomial's mean + 0.85^20
    long = rates(strategy, 512, 2_000)
    for ends in (long[:2], long[2:6], long[-6:-2], long[-2:]):
        assert ends.mean() == pytest.approx(1, abs=0.15)
    assert long.mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("strategy", SPANS)
def test_tokens_beside_specials_have_the_rate_of_all_others(strategy):
    """A row of packed documents: what may be selected begins after a special token, and goes on after the next."""
    maskable = np.array(([False] + [True] * 7 + [False]) * 3)
    found = rates(strategy, maskable.size, 10_000, rate=0.3, maskable=maskable)
    assert np.abs(found[maskable] - 1).max() < 0.05
    assert not found[~maskable].any()


@pytest.mark.parametrize("strategy", SPANS)
@pytest.mark.parametrize("length", [2, 3, 5])
def test_all_tokens_of_a_short_document_have_one_rate(strategy, length):
    """At least one token is selected, so the rate is above the stated one; a span may be longer than the document."""
    found = rates(strategy, length, 4_000, rate=0.5)
    assert np.abs(found / found.mean() - 1).max() < 0.05


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_selected_tokens_are_80_10_10(strategy):
    counts = np.zeros(3)
    for seed in range(300):
        ids, hidden, selected = masked(strategy, seed=seed)
        is_mask, is_same = hidden[selected] == VOCABULARY.mask_id, hidden[selected] == ids[selected]
        counts += (is_mask.sum(), (~is_mask & ~is_same).sum(), is_same.sum())
        untouched = np.setdiff1d(np.arange(len(ids)), selected)
        assert np.array_equal(hidden[untouched], ids[untouched])
    # a random token equals the original in 1 of 495 cases: it counts as unchanged
    assert counts / counts.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.015)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_specials_are_never_selected_and_never_drawn(strategy):
    maskable = np.arange(400) % 5 != 0
    for seed in range(20):
        _, hidden, selected = masked(strategy, seed=seed, maskable=maskable, rate=0.5, mask_share=0.0, random_share=1.0)
        assert maskable[selected].all()
        assert not np.isin(hidden, VOCABULARY.special_ids).any()


def test_random_tokens_reach_every_allowed_id():
    drawn = set()
    for seed in range(300):
        _, hidden, selected = masked("token", seed=seed, mask_share=0.0, random_share=1.0, rate=0.5)
        drawn |= set(hidden[selected].tolist())
    assert drawn == set(ALLOWED)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_at_least_one_token_is_selected(strategy, length):
    for seed in range(50):
        assert len(masked(strategy, seed=seed, ids=sequence(length), rate=0.01)[2]) >= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_maskable_selects_nothing(strategy):
    ids, hidden, selected = masked(strategy, maskable=np.zeros(400, dtype=bool))
    assert selected.size == 0
    assert np.array_equal(hidden, ids)


def test_span_tokens_share_their_fate():
    # 60 short draws: within a run of neighbours of one span, all are masks, all random or all kept
    runs = []
    for seed in range(60):
        _ids, hidden, selected = masked("span", seed=seed, rate=0.05)
        neighbours = np.split(selected, np.flatnonzero(np.diff(selected) > 1) + 1)
        runs += [(len(run), len(set((hidden[run] == VOCABULARY.mask_id).tolist()))) for run in neighbours]
    lengths = np.array([length for length, _ in runs])
    assert 1.8 < lengths.mean() < 3.6  # Geometric(1/3) mod 10, cut where spans meet
    mixed = np.mean([kinds > 1 for length, kinds in runs if length > 1])
    assert mixed < 0.2  # only where two spans touch


def test_uniform_spans_select_the_exact_share():
    for seed in range(50):
        assert len(masked("span-uniform", seed=seed, rate=0.15)[2]) == 60
        assert len(masked("span-uniform", seed=seed, rate=0.151)[2]) in (60, 61)


def test_whole_words_are_selected_whole():
    for seed in range(50):
        ids, _, selected = masked("whole-word", seed=seed)
        starts = VOCABULARY.word_start[ids]
        chosen = np.zeros(len(ids), dtype=bool)
        chosen[selected] = True
        inside = np.flatnonzero(~starts[1:]) + 1  # a token that continues a word shares its predecessor's lot
        assert np.array_equal(chosen[inside], chosen[inside - 1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_generator_alone_decides(strategy):
    first, again, other = (masked(strategy, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first[1], again[1])
    assert np.array_equal(first[2], again[2])
    assert not np.array_equal(first[2], other[2])


def test_rate_is_linear_in_steps():
    config = MaskingConfig(rate=0.30, final_rate=0.15)
    assert [config.rate_at(step, 11) for step in (0, 5, 10, 99)] == pytest.approx([0.30, 0.225, 0.15, 0.15])
    assert MaskingConfig(rate=0.2).rate_at(7, 11) == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "words"}, "masking.strategy must be one of token, span, span-uniform, whole-word; got 'words'"),
        ({"rate": 0.0}, "masking.rate must be between 0 and 1, both excluded; got 0.0"),
        ({"final_rate": 1.5}, "masking.final_rate must be between 0 and 1, both excluded; got 1.5"),
        ({"mask_share": 0.9, "random_share": 0.2}, "sum to at most 1; got 0.9 and 0.2"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(InputError, match="masking") as caught:
        MaskingConfig(**arguments)
    assert message in str(caught.value)
