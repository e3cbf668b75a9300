"""The learning rate at hand-worked steps."""

import math

import pytest

from antlm_fast.schedule import Schedule
from antlm_fast.training.lr_schedule import LrScheduleConfig, lr_at
from antlm_fast.types import InputError

TIMELINE = Schedule.parse("10s_CLM+20s_MLM").timeline(1)


def rates(config, peak=1.0):
    return [lr_at(step, peak, config, TIMELINE) for step in range(30)]


def test_warm_up_is_linear_and_reaches_the_peak():
    values = rates(LrScheduleConfig(warmup_steps=4))
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_one_cosine_over_the_run_by_default():
    values = rates(LrScheduleConfig(warmup_steps=10), peak=2.0)
    # halfway through the 20 steps after the warm-up the cosine is at half the peak
    assert values[20] == pytest.approx(1.0)
    assert values[29] == pytest.approx(2.0 * (1 + math.cos(math.pi * 19 / 20)) / 2)
    assert values[9:] == sorted(values[9:], reverse=True)


def test_a_cosine_for_each_phase():
    values = rates(LrScheduleConfig(warmup_steps=2, span="phase"))
    assert values[:2] == [0.5, 1.0]
    assert values[6] == pytest.approx(0.5)  # halfway through the first phase's 8 steps of cosine
    assert values[10:12] == [0.5, 1.0]
    assert values[21] == pytest.approx(0.5)


def test_final_share_is_where_the_cosine_ends():
    long = Schedule.parse("100000s_CLM").timeline(1)
    assert lr_at(99_999, 3.0, LrScheduleConfig(warmup_steps=0, final_share=0.1), long) == pytest.approx(0.3)


def test_a_run_shorter_than_its_warm_up_is_all_warm_up():
    short = Schedule.parse("3s_CLM").timeline(1)
    assert [lr_at(step, 1.0, LrScheduleConfig(warmup_steps=10), short) for step in range(3)] == [0.1, 0.2, 0.3]


def test_a_share_of_the_run_is_so_many_steps():
    assert LrScheduleConfig(warmup_steps=0, warmup_share=0.016).warmup_of(15_625) == 250  # LTG-BERT's
    shared = LrScheduleConfig(warmup_steps=0, warmup_share=0.2)
    assert rates(shared) == rates(LrScheduleConfig(warmup_steps=6))
    by_phase = LrScheduleConfig(warmup_steps=0, warmup_share=0.2, span="phase")
    assert rates(by_phase)[:2] == [0.5, 1.0]
    assert rates(by_phase)[10:14] == [0.25, 0.5, 0.75, 1.0]
    assert rates(LrScheduleConfig(warmup_steps=0, warmup_share=0.0))[0] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_share": 0.1}, "lr_schedule.warmup_steps must be 0 where lr_schedule.warmup_share is given; got 200"),
        ({"warmup_steps": 0, "warmup_share": 1.5}, "lr_schedule.warmup_share must be between 0 and 1, or none"),
    ],
)
def test_two_warm_ups_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        LrScheduleConfig(**values)
