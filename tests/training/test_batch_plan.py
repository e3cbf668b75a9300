"""Which rows a step reads: today's rule without ramps, and under ramps every row as often as the epochs say."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.training.batch_plan import BatchConfig, BatchPlan, RowSpan, steps_per_epoch
from antlm_fast.types import InputError

quick = settings(max_examples=150, deadline=None)


def plan(config, rows, epochs, row_tokens=128, tokens=None):
    """A plan over rows of data.row_tokens, and of as many longer ones as the same tokens give."""
    per_epoch = {row_tokens: rows}
    for longer, _ in config.stages:
        per_epoch[longer] = max((tokens or rows * row_tokens) // longer, 1)
    return BatchPlan(config, per_epoch, epochs * steps_per_epoch(config, rows))


def read(plan, steps):
    """[(row_tokens, epoch, row)] of each step."""
    return [
        [(span.row_tokens, span.epoch, row) for span in plan.spans(step) for row in range(span.start, span.stop)]
        for step in range(steps)
    ]


@given(rows=st.integers(1, 300), size=st.integers(1, 40), epochs=st.integers(1, 4))
@quick
def test_without_ramps_the_last_step_of_an_epoch_takes_what_is_left(rows, size, epochs):
    made = plan(BatchConfig(rows_per_step=size), rows, epochs)
    steps = -(-rows // size)
    assert made.steps_per_epoch == steps
    for step in range(steps * epochs):
        epoch, place = divmod(step, steps)
        stop = min((place + 1) * size, rows)
        assert list(made.spans(step)) == [RowSpan(row_tokens=128, epoch=epoch, start=place * size, stop=stop)]


def test_a_length_ramp_by_hand():
    # 100 rows of 128 are 10 steps of 10; 25 rows of 512: 2 or 3 in each of an epoch's 10 steps
    made = plan(BatchConfig(rows_per_step=10, length_ramp=("512@0.5",)), 100, 2)
    assert [made.row_tokens(step) for step in (0, 9, 10, 19)] == [128, 128, 512, 512]
    assert [len(step) for step in read(made, 20)] == [10] * 10 + [2, 3] * 5
    assert list(made.spans(13)) == [RowSpan(row_tokens=512, epoch=1, start=7, stop=10)]


def test_a_batch_ramp_by_hand():
    # 30 rows, full steps of 8: the mean of 4 and 8 is 6, so 5 steps an epoch, 10 in all
    # u(s) * 30 = 4 s + 0.2 s^2: 0, 4.2, 8.8, 13.8, 19.2, 25, 31.2, 37.8, 44.8, 52.2, 60
    made = plan(BatchConfig(rows_per_step=8, ramp_from=0.5), 30, 2)
    assert made.steps_per_epoch == 5
    assert [len(step) for step in read(made, 10)] == [4, 4, 5, 6, 6, 6, 6, 7, 8, 8]
    assert list(made.spans(5)) == [
        RowSpan(row_tokens=128, epoch=0, start=25, stop=30),
        RowSpan(row_tokens=128, epoch=1, start=0, stop=1),
    ]


@given(
    rows=st.integers(1, 500),
    size=st.integers(4, 40),
    epochs=st.integers(1, 5),
    begin=st.sampled_from([0.25, 0.3, 0.5, 1.0]),
)
@quick
def test_a_batch_ramp_reads_every_row_once_an_epoch(rows, size, epochs, begin):
    config = BatchConfig(rows_per_step=size, ramp_from=begin)
    made = plan(config, rows, epochs)
    by_step = read(made, epochs * made.steps_per_epoch)
    assert all(by_step)
    in_order = [row for step in by_step for row in step]
    if rows * begin >= made.steps_per_epoch * (1 + begin) / 2:  # the first step has a row
        assert in_order == [(128, epoch, row) for epoch in range(epochs) for row in range(rows)]
    assert set(in_order) == {(128, epoch, row) for epoch in range(epochs) for row in range(rows)}
    counts = [len(step) for step in by_step]
    assert all(later >= earlier - 1 for earlier, later in pairwise(counts))  # grows, but for rounding
    assert max(counts) <= size + 1
    assert max(Counter(in_order).values()) <= 2


@given(
    rows=st.integers(1, 400),
    size=st.integers(8, 40),
    epochs=st.integers(1, 5),
    shares=st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True),
)
@quick
def test_a_length_ramp_reads_every_row_of_a_whole_epoch_once(rows, size, epochs, shares):
    first, second = sorted(shares)
    config = BatchConfig(rows_per_step=size, length_ramp=(f"256@{first / 20}", f"1024@{second / 20}"))
    made = plan(config, rows, epochs)
    total = epochs * made.steps_per_epoch
    by_step = read(made, total)
    assert all(by_step)
    lengths = [made.row_tokens(step) for step in range(total)]
    starts = {256: Fraction(first, 20), 1024: Fraction(second, 20)}
    for step, length in enumerate(lengths):
        begun = [name for name, share in starts.items() if step >= share * total]
        assert length == (begun[-1] if begun else 128)
    for epoch in range(epochs):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        if len({lengths[step] for step in steps}) == 1:
            found = [entry for step in steps for entry in by_step[step]]
            length = lengths[steps[0]]
            in_epoch = rows if length == 128 else max(rows * 128 // length, 1)
            assert set(found) == {(length, epoch, row) for row in range(in_epoch)}
            if in_epoch >= made.steps_per_epoch:
                assert len(found) == in_epoch
    # a step has as many tokens as before, to within a row
    assert all(len(step) * length <= size * 128 + length for step, length in zip(by_step, lengths, strict=True))


@given(
    rows=st.integers(60, 400),
    size=st.integers(16, 40),
    epochs=st.integers(1, 5),
    begin=st.sampled_from([0.5, 0.75]),
    share=st.integers(1, 19),
    step=st.integers(0, 10**6),
)
@quick
def test_both_ramps_read_as_many_tokens_as_the_epochs_have(rows, size, epochs, begin, share, step):
    config = BatchConfig(rows_per_step=size, length_ramp=(f"512@{share / 20}",), ramp_from=begin)
    made = plan(config, rows, epochs)
    total = epochs * made.steps_per_epoch
    by_step = read(made, total)
    tokens = sum(length for step in by_step for length, _, _ in step)
    # lost: less than a long row each epoch, and one where the length changes
    assert rows * 128 * epochs - 512 * (epochs + 1) <= tokens <= rows * 128 * epochs + 512
    assert [entry for entry, count in Counter(row for rows in by_step for row in rows).items() if count > 1] == []
    # pure: any step alone, from a plan of its own
    step %= total
    assert list(plan(config, rows, epochs).spans(step)) == list(made.spans(step))


@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_every_token_is_read_in_every_epoch(tmp_path, mode):
    """Through Rows: 3 epochs under a batch ramp meet each of 960 tokens three times, whatever the row's cut."""
    documents = [range(start, start + 40) for start in range(0, 960, 40)]
    store = TokenStore.write(documents, tmp_path / "store", vocab_size=960, fingerprint="f", source="counting")
    rows = Rows(store, mode=mode, row_tokens=8, seed=3, short_share=0.3 if mode == "stream" else 0.0)
    config = BatchConfig(rows_per_step=16, ramp_from=0.25)
    made = plan(config, rows.rows_per_epoch, 3, row_tokens=8)
    found = np.concatenate(
        [
            rows.read(span.epoch, span.start, span.stop).ids
            for step in range(3 * made.steps_per_epoch)
            for span in made.micro_batches(step)
        ]
    )
    assert np.bincount(found, minlength=960).tolist() == [3] * 960


def test_micro_batches_cut_the_spans_in_order():
    config = BatchConfig(rows_per_step=16, rows_per_micro_batch=5, length_ramp=("256@0.5",), ramp_from=0.5)
    made = plan(config, 90, 4)
    for step in range(4 * made.steps_per_epoch):
        spans, parts = list(made.spans(step)), list(made.micro_batches(step))
        most = 5 if made.row_tokens(step) == 128 else 2
        assert all(0 < part.stop - part.start <= most for part in parts)
        rows = [[(s.epoch, row) for s in these for row in range(s.start, s.stop)] for these in (spans, parts)]
        assert rows[0] == rows[1]


def test_without_micro_batches_a_span_is_never_cut():
    """Spread evenly, long rows may be one more in a step than the lengths say: still one forward."""
    made = plan(BatchConfig(rows_per_step=8, length_ramp=("256@0.1",)), 96, 2, tokens=96 * 128 + 200)
    assert all(len(list(made.micro_batches(step))) == 1 for step in range(24))
    ramped = plan(BatchConfig(rows_per_step=8, length_ramp=("256@0.1",), ramp_from=0.25), 96, 2)
    assert all(list(ramped.micro_batches(step)) == list(ramped.spans(step)) for step in range(20))


def test_a_single_row_is_read_in_every_step():
    for changes, epochs in (
        ({}, [[0], [1], [2]]),
        ({"length_ramp": ("256@0",)}, [[0], [1], [2]]),
        ({"ramp_from": 0.25}, [[0], [0], [1, 2]]),  # 0.6, 1.6 and 3 epochs are read by the end of each
    ):
        made = plan(BatchConfig(rows_per_step=8, **changes), 1, 3)
        assert made.steps_per_epoch == 1
        assert [[(epoch, row) for _, epoch, row in step] for step in read(made, 3)] == [
            [(e, 0) for e in step] for step in epochs
        ]


def test_shares_of_none_and_all_of_the_run():
    always = plan(BatchConfig(rows_per_step=8, length_ramp=("256@0",)), 64, 2)
    never = plan(BatchConfig(rows_per_step=8, length_ramp=("256@1",)), 64, 2)
    assert {always.row_tokens(step) for step in range(16)} == {256}
    assert {never.row_tokens(step) for step in range(16)} == {128}
    assert read(never, 16) == read(plan(BatchConfig(rows_per_step=8), 64, 2), 16)
    # a stage that begins in a run's last step
    assert [plan(BatchConfig(rows_per_step=8, length_ramp=("256@0.9",)), 64, 2).row_tokens(s) for s in (14, 15)] == [
        128,
        256,
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows_per_step": 0}, "batch.rows_per_step must be at least 1; got 0"),
        ({"ramp_from": 0.0}, "batch.ramp_from must be above 0 and at most 1, or none; got 0.0"),
        ({"ramp_from": 1.5}, "batch.ramp_from must be above 0 and at most 1, or none; got 1.5"),
        ({"rows_per_step": 2, "ramp_from": 0.25}, "batch.ramp_from must leave the first step a row"),
        ({"length_ramp": ("512",)}, "batch.length_ramp must be LENGTH@SHARE texts, such as 512@0.9"),
        ({"length_ramp": ("512@1.1",)}, "share from 0 to 1; got '512@1.1'"),
        ({"length_ramp": ("many@0.5",)}, "got 'many@0.5'"),
        ({"length_ramp": ("512@1/0",)}, "got '512@1/0'"),
        ({"length_ramp": ("512@nan",)}, "got '512@nan'"),
        ({"length_ramp": ("512@0.5", "256@0.9")}, "batch.length_ramp must have growing lengths at growing shares"),
        ({"length_ramp": ("256@0.5", "512@0.5")}, "batch.length_ramp must have growing lengths at growing shares"),
    ],
)
def test_sizes_are_checked(values, message):
    with pytest.raises(InputError, match="must") as caught:
        BatchConfig(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, None),
        ({"length_ramp": ("128@0.5",)}, "batch.length_ramp must have lengths above data.row_tokens (128); got 128"),
        ({"length_ramp": ("513@0.5",)}, "lengths of at most model.max_position_embeddings (512); got 513"),
        ({"rows_per_step": 4, "length_ramp": ("512@0.5",)}, None),
        (
            {"rows_per_step": 3, "length_ramp": ("512@0.5",)},
            "batch.rows_per_step must be at least 4, so that a step has a row of 512 tokens (batch.length_ramp); got 3",
        ),
        # the ramp is at 0.25 + 0.75 * 0.5 there
        ({"rows_per_step": 6, "length_ramp": ("512@0.5",), "ramp_from": 0.25}, "must be at least 7"),
        ({"rows_per_step": 7, "length_ramp": ("512@0.5",), "ramp_from": 0.25}, None),
    ],
)
def test_lengths_are_checked_against_data_and_model(values, message):
    config = BatchConfig(**values)
    if message is None:
        config.check_lengths(128, 512)
    else:
        with pytest.raises(InputError, match="must") as caught:
            config.check_lengths(128, 512)
        assert message in str(caught.value)
