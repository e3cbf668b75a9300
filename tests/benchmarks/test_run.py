"""The benchmark's arithmetic by hand, and a run at tiny sizes; nothing here judges a time."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("run", "harness", "sizes", "op_workloads", "step_workloads")


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The folder is a place of scripts, not a package: its modules are importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for name in MODULES:
        sys.modules.pop(name, None)


def module(name):
    return importlib.import_module(name)


def provider(name, prepare, case="one"):
    return module("harness").Provider(case=case, name=name, prepare=prepare, amount=6.0, unit="things/s")


def test_quartiles_and_ratio_are_those_worked_by_hand():
    harness = module("harness")
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0]) == (1.75, 2.5, 3.25)
    assert harness.quartiles([7.0]) == (7.0, 7.0, 7.0)
    # per round 2, 2, 5: the load of the second round drops out; the ratio of the medians would be 10 / 2
    assert harness.ratio([2.0, 20.0, 10.0], [1.0, 10.0, 2.0]) == 2.0
    assert harness.ratio([3.0, 5.0], [1.0, 2.0, 9.0]) == 2.0  # not the same rounds: 4 / 2


def test_providers_take_turns_after_a_warm_up():
    calls, times = [], iter([0, 1, 10, 12, 20, 25, 30, 36])
    providers = [provider(name, lambda name=name: lambda: calls.append(name)) for name in "ab"]
    rows = module("harness").measure("s", "w", providers, rounds=2, warmup=1, clock=lambda: next(times))
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [row.seconds for row in rows] == [(1, 5), (2, 6)]
    lines = list(module("harness").table(rows))
    assert lines[0] == "s: w"
    assert lines[2].split() == ["one", "a", "3000.00", "2000.00", "-", "4000.00", "2", "things/s", "1.00"]
    assert lines[3].split()[-1] == "1.60"  # the median of 2 / 1 and 6 / 5


def test_a_provider_that_fails_shows_why_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such device\nand a long trace")

    def breaks_when_called():
        raise MemoryError

    rows = module("harness").measure(
        "s",
        "w",
        [provider("a", broken), provider("b", lambda: breaks_when_called), provider("c", lambda: lambda: None)],
        rounds=3,
    )
    assert [(row.reason, len(row.seconds)) for row in rows] == [
        ("RuntimeError: no such device", 0),
        ("MemoryError: no message", 0),
        (None, 3),
    ]
    lines = list(module("harness").table(rows))
    assert lines[2].split(maxsplit=2)[2] == "RuntimeError: no such device"
    assert lines[4].split()[-1] == "-"  # there is nothing to compare with


def test_other_work_on_the_cores_is_noticed():
    shared = module("harness").shared
    quiet = {"load_average": [0.2, 0.0, 0.0], "threads": 2, "cores": 2}
    assert [shared(quiet), shared(quiet | {"load_average": [1.0, 0.0, 0.0]})] == [False, True]
    assert shared(quiet | {"load_average": [1.0, 0.0, 0.0], "threads": 1}) is False


def test_a_wrong_attention_gets_no_figure(monkeypatch):
    ops = module("op_workloads")
    right = ops._eager_attention
    monkeypatch.setattr(ops, "_eager_attention", lambda q, k, v, *, causal: right(q, k, v, causal=causal) * 1.01)
    rows = next(ops.attention_suite(module("sizes").SIZES["tiny"]))
    wrong = [row for row in rows if row.provider == "eager bmm + softmax"]
    assert len(wrong) == 2
    assert all(row.seconds == () and row.reason.startswith("AssertionError: result: error") for row in wrong)
    on_gpus = [row for row in rows if row.provider == "antlm_fast triton"]
    assert len(on_gpus) == 2
    assert all(
        row.seconds == () and row.reason.startswith("UnsupportedError: attention(impl='triton')") for row in on_gpus
    )
    assert all(row.reason is None for row in rows if row not in wrong + on_gpus)


def test_a_wrong_visibility_gets_no_figure():
    steps = module("step_workloads")
    right = steps._our_loss
    field = steps.Field(module("sizes").SIZES["tiny"].model)
    causal = field.batch(steps.Objective.CLM, 2, 16)
    peer = steps.Runner(field.model, lambda model, batch: right(model, _all_visible(batch)))
    assert int(causal.prefix_len.max()) == 0
    with pytest.raises(AssertionError, match=r"gradients are off by .*; the bound is 1e-04"):
        field.checked(lambda: peer, steps.Objective.CLM, "fp32", 2, 16)


def _all_visible(batch):
    return replace(batch, prefix_len=torch.full_like(batch.prefix_len, 2**31 - 1))


def test_a_run_prints_every_row_and_writes_every_sample(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where it is not installed
    output = tmp_path / "out.json"
    status = module("run").main(["--sizes", "tiny", "--suite", "train_step", "switch", "--output", str(output)])
    printed = capsys.readouterr().out
    record = json.loads(output.read_text(encoding="utf-8"))
    assert status == 0
    assert record["sizes"] == "tiny"
    assert {"date", "python", "torch", "cpu", "capability", "threads", "load_average"} <= record["environment"].keys()
    assert record["environment"]["threads"] == torch.get_num_threads()
    rows = record["rows"]
    # 2 peaks; fp32 and bf16, each with 3 providers of 2 objectives, then 2 kinds of step of 2 objectives
    assert [sum(row["suite"] == suite for row in rows) for suite in ("peak", "train_step", "switch")] == [2, 12, 8]
    for row in rows:
        if row["provider"].startswith("Hugging Face"):
            assert row["seconds"] == []
            assert row["reason"].startswith("ModuleNotFoundError: import of transformers halted")
            assert f"{row['case']:14}{row['provider']:32}{row['reason']}" in printed
        else:
            assert row["reason"] is None
            assert row["seconds"]
            assert all(math.isfinite(value) and value > 0 for value in row["seconds"])
    assert printed.count("first step after a flip") == 4


def test_hugging_face_computes_the_same_step():
    pytest.importorskip("transformers")
    rows = [row for rows in module("step_workloads").train_step(module("sizes").SIZES["tiny"]) for row in rows]
    assert [(row.reason, len(row.seconds)) for row in rows] == [(None, 2)] * 12
