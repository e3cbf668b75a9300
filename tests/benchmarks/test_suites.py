"""Every suite of the benchmark at tiny sizes, worker processes included; files, comparison, dry run, report."""

import csv
import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
MACHINE = {
    "device": "cpu",
    "system": "Linux x86_64",
    "cpu": "one",
    "capability": "AVX2",
    "cores": 4,
    "threads": 2,
    "gpu": None,
    "load_average": [0.0, 0.0, 0.0],
}


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The folder is a place of scripts, not a package: its modules are importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    scripts = {path.stem for path in FOLDER.glob("*.py")} | {"peers"}
    for name in [name for name in sys.modules if name.partition(".")[0] in scripts]:
        del sys.modules[name]


def module(name):
    return importlib.import_module(name)


def tiny(suite, **changes):
    bench = module("harness").Bench(sizes=module("sizes").SIZES["tiny"], **changes)
    return [row for rows in module("run").SUITES[suite](bench) for row in rows]


def timed(rows, *names):
    """Those of some providers, each of which must have figures."""
    chosen = [row for row in rows if row.provider in names]
    assert {row.provider for row in chosen} == set(names)
    for row in chosen:
        assert row.reason is None, row
        assert row.samples
        assert all(value > 0 for value in row.samples)
    return chosen


# torch before 2.13 says why a row of torch's own loss has no figure
MISSING_PEER = (
    None
    if hasattr(torch.nn.functional, "linear_cross_entropy")
    else f"RuntimeError: torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
)


# ---- suites


def test_disentangled_attention_beside_its_peers():
    rows = tiny("disentangled")
    timed(rows, "antlm_fast torch", "antlm_fast reference", "gathered into the scores", "einsum over gathered tables")
    assert {row.reason for row in rows if row.provider == "FlashDeBERTa"} <= {
        None,
        "ModuleNotFoundError: No module named 'flashdeberta'",
    }


def test_head_and_loss_beside_its_peers():
    rows = tiny("cross_entropy")
    timed(rows, "antlm_fast torch", "logits of all rows", "logits of labelled rows")
    assert {row.reason for row in rows if row.provider == "F.linear_cross_entropy"} == {MISSING_PEER}
    assert {row.case for row in rows} == {"100% labelled", "15% labelled"}


def test_layers_beside_their_peers():
    rows = tiny("layers")
    timed(rows, "antlm_fast", "by hand")
    assert all(row.reason.startswith("nothing is compiled") for row in rows if row.provider == "torch.compile")


def test_steps_in_processes_of_their_own():
    pytest.importorskip("transformers")
    rows = tiny("train_step")
    for row in timed(rows, "antlm_fast", "HF Llama eager", "LTG-BERT einsum"):
        assert row.extras["gradient_error"] < 5e-2
        assert row.extras.get("peak_mib", 1.0) > 0
    cold = [row.extras["first_step_s"] for row in rows if "first_step_s" in row.extras]
    assert len(cold) == 4  # a process each; its second objective is not cold
    assert all(seconds > row.samples[0] for seconds in cold for row in rows if row.samples)
    compiled = [row for row in rows if row.provider == "HF Llama eager, compiled, malloc"]
    assert all(row.reason.startswith("nothing is compiled at these sizes") for row in compiled)


def test_peers_that_are_not_installed_have_their_reason(monkeypatch, tmp_path):
    """In another process an import fails by a module that raises; ours goes on."""
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sizes = module("sizes").SIZES["tiny"]
    bench = module("harness").Bench(
        sizes=replace(sizes, scenes=(replace(sizes.scenes[0], objectives=("CLM",), rounds=1),))
    )
    rows = [row for rows in module("step_workloads").train_step(bench) for row in rows]
    timed(rows, "antlm_fast")
    peers = [row for row in rows if row.provider == "HF Llama eager"]
    assert [row.reason for row in peers] == ["ImportError: no transformers here"]


def test_flips_are_timed_and_their_compilations_counted():
    rows = tiny("switch")
    times = [row for row in rows if row.quantity == "s"]
    assert {row.provider.partition(": ")[2] for row in times} == {
        "later steps",
        "first step after a flip",
        "first flip ever",
    }
    assert all(row.samples for row in times)
    counts = {row.case: row for row in rows if row.quantity == "count"}
    assert counts["recompiles"].samples == (0.0, 0.0)
    if not torch.cuda.is_available():
        assert counts["re-captures"].reason == "CUDA graphs need a CUDA device"


def test_memory_in_processes_of_their_own():
    rows = tiny("memory")
    if sys.platform == "linux":
        assert all(row.samples and row.quantity == "MiB" for row in rows if row.workload.startswith("step"))
        assert len([row for row in rows if row.workload.startswith("step")]) == 1
        others = [row for row in rows if not row.workload.startswith("step")]
        assert {row.reason for row in others if row.provider == "F.linear_cross_entropy"} == {MISSING_PEER}
        assert all(len(row.samples) == (row.reason is None) for row in others)
        assert {row.reason for row in others} <= {None, MISSING_PEER}


def test_scaling_has_an_exponent_for_each_way():
    rows = tiny("scaling")
    own = timed(rows, "attention: antlm_fast", "disentangled: antlm_fast", "antlm_fast", "MLM: antlm_fast")
    fitted = {(row.workload, row.provider) for row in rows if "exponent" in row.extras}
    several = {(row.workload, row.provider) for row in own if "threads" not in row.workload}
    assert several <= fitted


def test_batches_are_made():
    rows = tiny("data")
    own = timed(rows, "stream", "packed", "CLM", "MLM, token", "MLM, span", "MLM, span-uniform", "MLM, whole-word")
    assert {row.unit for row in own} == {"tokens/s"}


# ---- workers


def test_a_worker_answers_fails_and_ends():
    workers, harness = module("workers"), module("harness")
    worker = workers.Worker("collections:Counter", {"a": 2, "b": 1})
    assert worker.call("total") == 3
    with pytest.raises(harness.Told, match=r"^AttributeError: .*no_such_method"):
        worker.call("no_such_method")
    assert worker.call("total") == 3  # an error is an answer
    worker.close()
    with pytest.raises(harness.Told, match="its process has ended"):
        worker.call("total")


def test_a_worker_that_takes_too_long_or_dies_is_told_apart():
    workers, harness = module("workers"), module("harness")
    slow = workers.Worker("threading:Event", {})
    with pytest.raises(harness.Told, match=r"^no answer within 0 s"):
        slow.call("wait", timeout=0.1)
    slow.close()
    with pytest.raises(harness.Told, match=r"^ModuleNotFoundError: No module named 'no_such_module'"):
        workers.Worker("no_such_module:Thing", {})
    dying = workers.Worker("collections:Counter", {})
    dying._process.kill()
    with pytest.raises(harness.Told, match="its process ended with status -9"):
        dying.call("total")
    dying.close()


def test_allocator_settings_reach_the_worker_alone():
    workers = module("workers")
    worker = workers.Worker("os:getenv", {"key": "MALLOC_MMAP_MAX_"}, workers.MALLOC)
    assert worker.call("strip") == "0"
    worker.close()
    assert not set(workers.MALLOC) & set(os.environ)


# ---- files, comparison, report


def row(**changes):
    values = {"suite": "attention", "workload": "w", "case": "causal", "provider": "antlm_fast torch"}
    return module("harness").Row(**values | {"samples": (1.0, 1.01, 0.99, 1.0, 1.02)} | changes)


def written(path, rows, **environment):
    results = module("results")
    suites = {}
    for suite in dict.fromkeys(each.suite for each in rows):
        own = [each for each in rows if each.suite == suite]
        suites[suite] = results.suite_record({**MACHINE, **environment}, None, "full", 1.0, own)
    results.write(path, suites, merge=False)
    return path


def test_what_became_slower_is_found_and_noise_is_not(tmp_path, capsys):
    compare = module("compare")
    peer = row(provider="SDPA")
    before = written(tmp_path / "a.json", [row(), peer, row(case="full")])
    noisy = row(case="full", samples=(0.7, 1.5, 1.04, 1.3, 0.9))  # its median is 4 % up, its interval wide
    assert compare.compare(before, written(tmp_path / "b.json", [row(), peer, noisy])) == 0
    slower = row(samples=(1.21, 1.2, 1.19, 1.2, 1.22))
    assert compare.compare(before, written(tmp_path / "c.json", [slower, peer, noisy])) == 1
    printed = capsys.readouterr().out
    assert "slower    1.20" in printed
    assert "1 rows of antlm_fast are slower or gone" in printed
    # a peer that became slower is shown, and no fault of ours
    assert compare.compare(before, written(tmp_path / "d.json", [row(), replace(peer, samples=(2.0,) * 5)])) == 0
    assert "slower    2.00" in capsys.readouterr().out
    # 20 % is within a margin of 30 %
    assert compare.compare(before, tmp_path / "c.json", margin=0.3) == 0
    gone = row(samples=(), reason="AssertionError: wrong")
    assert compare.compare(before, written(tmp_path / "e.json", [gone])) == 1
    assert "no figure any more: w; causal; antlm_fast torch: AssertionError: wrong" in capsys.readouterr().out


def test_the_interval_of_a_ratio_is_the_samples_own():
    compare = module("compare")
    assert compare.interval([2.0] * 5, [3.0] * 5) == (1.5, 1.5)
    low, high = compare.interval([1.0, 1.1, 0.9], [1.0, 1.1, 0.9])
    assert low == pytest.approx(0.9 / 1.1)
    assert high == pytest.approx(1.1 / 0.9)
    assert compare.judge(row(samples=(1.0, 1.0)), row(samples=(9.0, 9.0)), 0.05).verdict == "too few samples"
    zero, one = (row(quantity="count", samples=(n,)) for n in (0.0, 1.0))
    assert [compare.judge(a, b, 0.05).verdict for a, b in ((zero, zero), (zero, one), (one, zero))] == [
        "same",
        "slower",
        "faster",
    ]


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"threads": 1}, {"device": "cuda"}])
def test_results_of_different_machines_are_refused(tmp_path, capsys, change):
    compare = module("compare")
    a, b = written(tmp_path / "a.json", [row()]), written(tmp_path / "b.json", [row()], **change)
    assert compare.compare(a, b) == 2
    assert f"NOT THE SAME MACHINE OR SETTING: attention: {next(iter(change))}" in capsys.readouterr().out
    assert compare.compare(a, b, across=True) == 0
    assert "NOT THE SAME MACHINE" in capsys.readouterr().out


def test_results_that_cannot_be_compared_are_refused(tmp_path, capsys):
    compare = module("compare")
    a, b = written(tmp_path / "a.json", [row()]), written(tmp_path / "b.json", [row(suite="layers")])
    old = tmp_path / "old.json"
    old.write_text('{"rows": []}', encoding="utf-8")
    assert [compare.compare(a, b), compare.compare(a, old), compare.compare(a, tmp_path / "none.json")] == [2, 2, 2]
    assert "must be a result of benchmarks/run.py of format 2" in capsys.readouterr().out


def test_a_run_writes_json_csv_and_pictures_and_merges(tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.json"
    run = module("run").main
    assert run(["--sizes", "tiny", "--suite", "cross_entropy", "--output", str(output)]) == 0
    assert run(["--sizes", "tiny", "--suite", "data", "--merge", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (record["format"], list(record["suites"])) == (2, ["cross_entropy", "data"])
    suite = record["suites"]["cross_entropy"]
    assert {"date", "python", "torch", "cpu", "capability", "threads", "load_average"} <= suite["environment"].keys()
    assert suite["environment"]["threads"] == torch.get_num_threads()
    assert suite["limits"]["flops_per_s"].keys() == {"fp32", "bf16"}
    rows = module("results").rows_of(suite)
    assert all(each.floor > 0 for each in rows)
    with output.with_suffix(".csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(record["suites"][name]["rows"]) for name in record["suites"])
    for each, line in zip(rows, lines, strict=False):
        assert (each.workload, each.case, each.provider) == (line["workload"], line["case"], line["provider"])
        assert float(line["median"]) == each.median if each.samples else line["reason"] == each.reason
        assert each.provider in printed
    for name in ("cross_entropy", "data"):
        assert (tmp_path / f"out-{name}.png").read_bytes().startswith(b"\x89PNG")
    # the report is made from what was written
    report = module("report")
    assert report.main(["--results", str(tmp_path), "--output", str(tmp_path / "performance.md")]) == 0
    text = (tmp_path / "performance.md").read_text(encoding="utf-8")
    ours = next(each for each in rows if each.provider == "antlm_fast torch")
    assert f"| {ours.case} | **antlm_fast torch** | {ours.median * 1e3:.2f} ms |" in text
    assert "Liger" in text
    assert "out-data.png" in text
    assert "No result has been committed" not in text


def test_a_suite_that_breaks_does_not_take_the_others_along(monkeypatch, tmp_path, capsys):
    run = module("run")

    def broken(bench):
        yield [row()]
        raise RuntimeError("half way")

    monkeypatch.setitem(run.SUITES, "attention", broken)
    output = tmp_path / "out.json"
    assert run.main(["--sizes", "tiny", "--suite", "attention", "data", "--output", str(output)]) == 0
    suites = module("results").read(output)
    assert [each["reason"] for each in suites["attention"]["rows"]] == [None, "RuntimeError: half way"]
    assert suites["data"]["rows"]


# ---- a GPU that is not there


def test_the_plan_for_a_gpu_is_shown_without_one(capsys):
    pytest.importorskip("triton")
    assert module("run").main(["--sizes", "tiny", "--dry-run", "--device", "cuda"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "would be" in line]
    seen = [line for line in lines if "on fake CUDA tensors: (" in line or "on fake CUDA tensors: loss ()" in line]
    for name, shape in (
        ("antlm_fast triton", "(2, 16, 2, 16) bfloat16"),  # attention and disentangled attention
        ("antlm_fast triton", "() float32"),  # the loss
        ("SDPA", "(2, 2, 16, 16) bfloat16"),
        ("gathered into the scores", "(2, 16, 2, 16) bfloat16"),
        ("RoPE", "(32, 2, 16) bfloat16, (32, 2, 16) bfloat16"),
        ("LTG-BERT einsum", "loss () float32 on cuda"),
    ):
        assert any(name in line and line.endswith(shape) for line in seen), name
    ours = [line for line in lines if "antlm_fast  " in line and "loss" in line]
    assert len(ours) == 3  # both objectives of BabyLlama, MLM of LTG-BERT
    assert all(line.endswith("loss () float32 on cuda") for line in ours)


def test_without_a_gpu_measuring_one_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert module("run").main(["--device", "cuda", "--suite", "attention"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().out


def test_on_a_gpu_events_time_the_call_and_its_graph(monkeypatch):
    """The order of what is asked of the device, with a device that only takes notes."""
    harness, notes = module("harness"), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            notes.append("event")

        def elapsed_time(self, end):
            return 2.0  # ms

    class Flushed:
        def zero_(self):
            notes.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: notes.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flushed())
    monkeypatch.setattr(harness, "captured", lambda call: lambda: notes.append("replay"))
    bench = harness.Bench(sizes=None, device="cuda")
    one = harness.Provider(case="c", name="ours", prepare=lambda: lambda: notes.append("call"), graph=True)
    rows = bench.measure("s", "w", [one], rounds=1, warmup=0)
    assert [(each.provider, each.samples) for each in rows] == [("ours", (0.002,)), ("ours, CUDA graph", (0.002,))]
    assert notes == ["flush", "event", "call", "event", "wait", "flush", "event", "replay", "event", "wait"]
