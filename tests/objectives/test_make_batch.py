"""make_batch: labels and visibility of each objective, worked out by hand, and purity."""

import functools
import operator

import numpy as np
import pytest

from antlm_fast.objectives import MaskingConfig, make_batch
from antlm_fast.types import InputError, Objective, TokenRows, Vocabulary

VOCABULARY = Vocabulary(size=100, mask_id=3, special_ids=(0, 1, 2, 3), word_start=np.ones(100, dtype=bool))
CLM, MLM, MNTP = Objective.CLM, Objective.MLM, Objective.MNTP
FULL = 2**31 - 1


def rows(*sequences):
    lengths = [len(sequence) for sequence in sequences]
    return TokenRows(
        ids=np.array(functools.reduce(operator.iadd, map(list, sequences), []), dtype=np.int64),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
    )


def batch(token_rows, *, share=0.0, objective=MLM, visibility=None, key=(0, 0, 0, 0), rate=0.5, **masking):
    return make_batch(
        token_rows,
        masked_share=share,
        masked_objective=objective,
        visibility=visibility,
        masking=MaskingConfig(**masking),
        vocabulary=VOCABULARY,
        rate=rate,
        key=key,
    )


def test_causal_labels_are_the_next_token_of_the_same_sequence():
    made = batch(rows([1, 10, 11, 2], [1, 20, 2], [1]))
    # sequence 0: 1->10, 10->11, 11->2; sequence 1: 1->20, 20->2; sequence 2 has no next token
    assert made.labelled[CLM].tolist() == [0, 1, 2, 4, 5]
    assert made.targets[CLM].tolist() == [10, 11, 2, 20, 2]
    assert made.input_ids.tolist() == [1, 10, 11, 2, 1, 20, 2, 1]
    assert made.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert (made.max_seqlen, made.prefix_len.tolist(), list(made.labelled)) == (4, [0, 0, 0], [CLM])


def test_masked_labels_are_the_originals_at_their_own_places():
    token_rows = rows([1, 10, 11, 12, 13, 2], [1, 20, 21, 2])
    made = batch(token_rows, share=1.0, mask_share=1.0, random_share=0.0)
    positions = made.labelled[MLM].numpy()
    assert made.targets[MLM].tolist() == token_rows.ids[positions].tolist()
    assert (made.input_ids.numpy()[positions] == VOCABULARY.mask_id).all()
    assert set(positions.tolist()) <= {1, 2, 3, 4, 7, 8}  # never a special token
    assert (positions < 6).any()
    assert (positions >= 6).any()  # at least one per sequence
    assert made.prefix_len.tolist() == [FULL, FULL]


def test_mntp_reads_a_masked_token_one_position_before_it():
    token_rows = rows([30, 10, 11, 12], [40, 41])
    for step in range(20):
        made = batch(token_rows, share=1.0, objective=MNTP, mask_share=1.0, random_share=0.0, key=(0, step, 0, 0))
        positions = made.labelled[MNTP].numpy()
        assert (made.input_ids.numpy()[positions + 1] == VOCABULARY.mask_id).all()
        assert made.targets[MNTP].tolist() == token_rows.ids[positions + 1].tolist()
        assert made.input_ids[0] == 30  # a sequence's first token has no place to be read at
        assert made.input_ids[4] == 40
        assert 4 in positions  # the second sequence has one candidate, and it is taken


def test_a_mix_gives_each_sequence_one_objective_and_its_own_mask():
    token_rows = rows(*[[1, 10 + n, 11 + n, 12 + n, 2] for n in range(40)])
    made = batch(token_rows, share=0.25)
    is_masked = made.prefix_len.numpy() == FULL
    assert is_masked.sum() == 10
    sequence_of = np.repeat(np.arange(40), 5)
    assert is_masked[sequence_of[made.labelled[MLM].numpy()]].all()
    assert not is_masked[sequence_of[made.labelled[CLM].numpy()]].any()
    assert made.num_labelled[CLM] == 30 * 4
    unchanged = ~is_masked[sequence_of]
    assert np.array_equal(made.input_ids.numpy()[unchanged], token_rows.ids[unchanged])


def test_a_mixed_share_between_two_numbers_of_sequences_holds_on_average():
    token_rows = rows([5, 6, 7], [8, 9, 10])
    counts = [int((batch(token_rows, share=0.9, key=(0, n, 0, 0)).prefix_len == FULL).sum()) for n in range(400)]
    assert set(counts) == {1, 2}
    assert np.mean(counts) == pytest.approx(1.8, abs=0.08)


@pytest.mark.parametrize(("visibility", "prefix"), [("causal", 0), ("full", FULL)])
def test_visibility_can_be_another_objectives(visibility, prefix):
    for share in (0.0, 1.0):
        assert batch(rows([5, 6, 7]), share=share, visibility=visibility).prefix_len.tolist() == [prefix]


def test_the_key_alone_decides_and_every_part_of_it_counts():
    token_rows = rows(list(range(4, 100)))
    same = [batch(token_rows, share=1.0, key=(1, 2, 3, 4)) for _ in range(2)]
    assert same[0].labelled[MLM].tolist() == same[1].labelled[MLM].tolist()
    assert same[0].input_ids.tolist() == same[1].input_ids.tolist()
    for place in range(4):
        key = [1, 2, 3, 4]
        key[place] += 1
        assert batch(token_rows, share=1.0, key=tuple(key)).labelled[MLM].tolist() != same[0].labelled[MLM].tolist()


def test_known_masks_stay_what_they_are():
    """A change of these numbers means that no earlier run can be resumed with the same masks."""
    made = batch(rows(list(range(4, 24))), share=1.0, rate=0.25, key=(7, 11, 0, 0))
    assert made.labelled[MLM].tolist() == [1, 5, 7, 10]
    assert made.input_ids.tolist() == [4, 3, 6, 7, 8, 3, 10, 3, 12, 13, 3, 15, 16, 17, 18, 19, 20, 21, 22, 23]


def test_rows_are_left_as_they_were():
    token_rows = rows(list(range(4, 50)))
    before = token_rows.ids.copy()
    batch(token_rows, share=1.0)
    assert np.array_equal(token_rows.ids, before)


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"below the vocabulary's size 100; got 100"):
        batch(rows([5, 100]))
    with pytest.raises(InputError, match="got -1"):
        batch(rows([5, -1]))
