"""What a run says of its time on stderr."""

import pytest

from antlm_fast.training import progress as progress_module
from antlm_fast.training.progress import Progress


@pytest.fixture
def said(monkeypatch, capsys):
    """The lines of a run that begins at a step, under a clock whose steps take the given seconds."""

    def run(total_steps, step_seconds, *, step=0):
        now = [1000.0]
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
        progress = Progress(total_steps, step)
        for seconds in step_seconds:
            now[0] += seconds
            progress.advance()
        progress.close()
        return capsys.readouterr().err.splitlines()

    return run


def test_a_schedule_of_thousands_of_hours_starts_without_a_word(said):
    line = (
        "warning: about 15,042 hours (627 days) left at this speed; a shorter schedule, a smaller model or a GPU takes "
        "less (Ctrl-C saves and stops)"
    )
    assert said(902_522, [30.0, 60.0, 60.0]) == [line]


def test_the_time_that_is_left_is_told_once_without_the_first_step(said):
    assert said(100, [60.0, *[4.0] * 20]) == ["about 0:06:24 left at this speed"]  # 96 steps of 4 s after the fourth
    assert said(100, [60.0, *[4.0] * 20], step=50) == ["about 0:03:04 left at this speed"]
    assert said(43_203, [4.0] * 4) == ["about 47:59:56 left at this speed"]
    assert said(43_204, [4.0] * 4)[0].startswith("warning: about 48 hours (2 days) left at this speed")


def test_a_run_that_is_over_soon_says_nothing_of_it(said):
    assert said(100, [0.09] * 100) == []
    assert said(4, [4.0] * 4) == []
    assert said(3, [60.0] * 1) == []
