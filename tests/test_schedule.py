"""The schedule language, and time as a pure function of the step."""

import pytest

from antlm_fast.schedule import Schedule, ScheduleError
from antlm_fast.types import InputError, Objective

TEXTS = {
    "4_CLM+16_MLM+4_CLM": (24, 0),
    "200s_CLM+800s_MLM": (0, 1000),
    "24_MIX(0.9375)": (24, 0),
    "24_MIX(0.9375,MNTP)": (24, 0),
    "16_MLM@causal": (16, 0),
    "3*(1_CLM+1_MLM)": (6, 0),
    "2*(1_CLM+2*(1_MNTP+3s_MLM))": (6, 12),
    " 1_CLM + 2_MLM ": (3, 0),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_given_back_and_lengths_add_up(text):
    schedule = Schedule.parse(text)
    assert str(schedule) == text
    assert (schedule.epochs, schedule.steps) == TEXTS[text]


def test_phases_of_a_repeat_are_unrolled_in_order():
    names = [phase.name for phase in Schedule.parse("2*(1_CLM+2_MLM)+3_CLM").phases]
    assert names == ["1_CLM", "2_MLM", "1_CLM", "2_MLM", "3_CLM"]


def test_a_phase_says_what_is_masked_and_what_is_visible():
    clm, mlm, mntp, mix, control = Schedule.parse("1_CLM+1_MLM@causal+1_MNTP+1_MIX(0.25,MNTP)+1_CLM@full").phases
    assert (clm.masked_share, clm.visibility, clm.leaks_targets) == (0.0, None, False)
    assert (mlm.masked_share, mlm.masked_objective, mlm.visibility) == (1.0, Objective.MLM, "causal")
    assert (mntp.masked_share, mntp.masked_objective) == (1.0, Objective.MNTP)
    assert (mix.masked_share, mix.masked_objective, mix.objective) == (0.25, Objective.MNTP, "MIX(0.25,MNTP)")
    assert control.leaks_targets
    assert control.objective == "CLM@full"


def test_every_step_belongs_to_the_phase_that_covers_it():
    schedule = Schedule.parse("4_CLM+16_MLM+4_CLM")
    timeline = schedule.timeline(10)
    objectives = [timeline.at(step).objective for step in range(timeline.total_steps)]
    assert objectives == ["CLM"] * 40 + ["MLM"] * 160 + ["CLM"] * 40
    assert [timeline.first_step(index) for index in range(3)] == [0, 40, 200]
    assert [timeline.index_at(step) for step in (0, 39, 40, 199, 200, 239, 240)] == [0, 0, 1, 1, 2, 2, 2]
    assert schedule.at(40, steps_per_epoch=10).objective == "MLM"


def test_steps_and_epochs_can_be_mixed():
    timeline = Schedule.parse("1_CLM+5s_MLM").timeline(7)
    assert timeline.ends == (7, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a whole number of epochs or steps at character 1; got the end of ''"),
        ("4_CML", "an objective (CLM, MLM, MNTP or MIX) at character 3; got 'CML' in '4_CML'"),
        ("4_CLM+", "a whole number of epochs or steps at character 7; got the end"),
        ("4_CLM 5_MLM", "'+' or the end at character 6"),
        ("0_CLM", "a number of at least 1 at character 1; got '0_CLM'"),
        ("4CLM", "'_' and an objective"),
        ("4_MIX", "'(' and the share of masked sequences"),
        ("4_MIX(1.5)", "a share between 0 and 1 at character 7; got '1.5)'"),
        ("4_MIX(0.5)@full", "in a MIX each sequence has its own mask"),
        ("4_CLM@left", "'causal' or 'full' at character 7; got 'left'"),
        ("3*1_CLM", "'(' at character 3"),
        ("3*(1_CLM", "')' or '+' at character 9"),
        ("999999999*(1_CLM)", "at most 10000 phases at character 1"),
        ("1*(" * 60 + "1_CLM" + ")" * 60, "repeats nested at most 50 deep"),
        ("-1_CLM", "a whole number of epochs or steps at character 1; got '-1_CLM'"),
    ],
)
def test_an_error_names_the_place_what_was_expected_and_what_was_found(text, message):
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    assert message in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_a_length_that_does_not_add_up_names_both():
    schedule = Schedule.parse("4_CLM+16_MLM+4_CLM")
    with pytest.raises(
        ScheduleError, match=r"got epochs 20 and schedule '4_CLM\+16_MLM\+4_CLM', which sums to 24 epochs"
    ):
        schedule.timeline(10, epochs=20)
    with pytest.raises(ScheduleError, match=r"got steps 100 and .* sums to 240 steps \(10 an epoch\)"):
        schedule.timeline(10, steps=100)
    with pytest.raises(ScheduleError, match="sums to 12 steps, 1.2 epochs of 10 steps"):
        Schedule.parse("1_CLM+2s_MLM").timeline(10, epochs=2)
    assert schedule.timeline(10, epochs=24, steps=240).total_steps == 240
