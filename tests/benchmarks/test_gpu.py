"""benchmarks/gpu.py without a GPU: every stage at tiny sizes, failures that stay in their stage, what is refused."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"

# stages that end as they should, and as they should not
STAGES = """
import os, subprocess, sys, time
from harness import Row

def row(suite, **values):
    return Row(suite=suite, workload="w", case="c", provider="antlm_fast", **values)

def ends(bench):
    yield [row("ends", samples=(1.0,))]

def raises(bench):
    yield [row("raises", samples=(2.0,))]
    raise ValueError("no such thing")

def aborts(bench):
    yield [row("aborts", samples=(3.0,))]
    os.abort()

def hangs(bench):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (bench.folder / "child").write_text(str(child.pid))
    yield [row("hangs", samples=(4.0,))]
    time.sleep(600)

def wrong(bench):
    yield [row("wrong", reason="AssertionError: out: error 1.00e+00 exceeds budget 1.00e-02")]
"""


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The folder is a place of scripts, not a package: its modules are importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    scripts = {path.stem for path in FOLDER.glob("*.py")} | {"peers", "gpu_stages"}
    for name in [name for name in sys.modules if name.partition(".")[0] in scripts]:
        del sys.modules[name]


def module(name):
    return importlib.import_module(name)


def command(*words, output, timeout=600):
    """The script as a user calls it, from another folder."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), "--output", str(output), *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=output.parent,
        env=variables,
    )


def rows_in(output, suite):
    results = module("results")
    return results.rows_of(results.read(output / "gpu.json")[suite])


def fake_stages(tmp_path, *functions):
    (tmp_path / "fake_stages.py").write_text(STAGES, encoding="utf-8")
    stage = module("gpu_stages.plan").Stage
    return [
        stage(letter=letter, name=name, target=f"fake_stages:{name}", minutes=1.0, rehearsal_minutes=1.0, what="")
        for letter, name in zip("abcdef", functions, strict=False)
    ]


def run_fakes(tmp_path, *functions, seconds, **options):
    stages = fake_stages(tmp_path, *functions)
    paths = [str(FOLDER), str(ROOT), str(tmp_path)]
    run = module("gpu").run_stages
    return run(stages, seconds=seconds, device="cpu", output=tmp_path / "out", paths=paths, planted={}, **options)


# ---- failures stay where they are


def test_a_stage_that_raises_or_crashes_keeps_its_rows_and_the_others_run(tmp_path):
    suites = run_fakes(tmp_path, "raises", "aborts", "wrong", "ends", seconds=600)
    results, summary = module("results"), module("gpu_stages.summary")
    stages = {row.case: row for row in results.rows_of(suites["stages"])}
    assert stages["a raises"].reason == "ended with status 1: ValueError: no such thing"
    assert stages["b aborts"].reason.startswith("crashed by SIGABRT")
    assert stages["d ends"].reason is None
    for name in ("raises", "aborts", "wrong", "ends"):
        assert [row.case for row in rows_in(tmp_path / "out", name)] == ["c"]
    found = {(row.suite, row.case) for row in summary.failures(suites)}
    assert found == {("wrong", "c"), ("stages", "a raises"), ("stages", "b aborts")}
    assert "ValueError: no such thing" in (tmp_path / "out" / "logs" / "a-raises.log").read_text()


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    begun = time.monotonic()
    suites = run_fakes(tmp_path, "hangs", "ends", seconds=40)
    assert time.monotonic() - begun < 41
    stages = {row.case: row for row in module("results").rows_of(suites["stages"])}
    assert stages["a hangs"].reason == "no end within its 20 s"
    assert stages["b ends"].reason is None
    child = int((tmp_path / "out" / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    for _ in range(50):  # what is killed is gone, or waits to be collected
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the process that the stage had started is still there")


def test_merged_stages_stand_beside_those_that_were_there(tmp_path):
    run_fakes(tmp_path, "raises", seconds=300)
    suites = run_fakes(tmp_path, "ends", seconds=300, merge=True)
    cases = [row.case for row in module("results").rows_of(suites["stages"])]
    assert cases == ["a raises", "a ends"]
    assert suites.keys() == {"raises", "ends", "stages"}


def test_results_say_of_which_card_they_are_though_no_stage_came_to_tell(tmp_path):
    suites = run_fakes(tmp_path, "not_there", seconds=60, card="a card")
    assert suites["stages"]["environment"]["gpu"] == "a card"
    (stage,) = module("results").rows_of(suites["stages"])
    assert stage.reason.startswith("ended with status 1: AttributeError")


def test_results_of_two_devices_are_not_merged(tmp_path):
    gpu, results = module("gpu"), module("results")
    record = results.suite_record({"device": "cuda", "gpu": "a card"}, None, "gpu.py, cuda", 1.0, [])
    results.write(tmp_path / "gpu.json", {"proof": record}, merge=False)
    with pytest.raises(SystemExit, match="^--merge must be of results of the same device; got a card and cpu$"):
        gpu.main(["--device", "cpu", "--merge", "--output", str(tmp_path)])
    assert results.read(tmp_path / "gpu.json")["proof"] == record
    assert gpu.unlike(tmp_path, "cuda", "another card") is not None
    assert gpu.unlike(tmp_path, "cuda", "a card") is None
    assert gpu.unlike(tmp_path / "nothing there", "cpu", None) is None


# ---- the real stages


def test_every_stage_reports_though_one_crashes(tmp_path):
    done = command("--device", "cpu", "--minutes", "9", "--plant", "c=crash", output=tmp_path / "out")
    stages = {row.case: row for row in rows_in(tmp_path / "out", "stages")}
    assert list(stages) == [f"{each.letter} {each.name}" for each in module("gpu_stages.plan").STAGES]
    ended = [case for case, row in stages.items() if row.samples]
    assert ended == [case for case in stages if case != "c tests"], done.stdout
    assert stages["c tests"].reason.startswith("crashed by SIGABRT")
    suites = module("results").read(tmp_path / "out" / "gpu.json")
    assert [row.case for row in module("gpu_stages.summary").failures(suites)] == ["c tests"]
    assert done.returncode == 1
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(lines) <= 100
    assert done.stdout.endswith("\n".join(lines) + "\n")
    measured = ("proof", "attention", "tiles", "disentangled", "cross_entropy", "train_step", "switch", "demo")
    for suite in measured:
        ours = [row for row in rows_in(tmp_path / "out", suite) if "antlm_fast" in row.provider]
        assert ours, suite
        assert all(row.samples for row in ours), suite
    text = module("report").document({"here": suites})
    assert "## How the stages ended, and their seconds\n\n`python benchmarks/gpu.py`" in text
    assert "`python benchmarks/run.py --suite" not in text
    assert module("results").draw(tmp_path / "out" / "gpu.json", suites)
    # the two runs of the demo are the same run here
    assert all(row.samples == (0.0,) for row in rows_in(tmp_path / "out", "demo") if row.workload == "differences")
    assert json.loads((tmp_path / "out" / "tiles.json").read_text()).keys() >= {"sm_80", "sm_90"}


def test_the_stage_of_tests_runs_them(tmp_path):
    done = command("--device", "cpu", "--minutes", "5", "--stages", "c", output=tmp_path / "out")
    counts = {row.case: row.samples for row in rows_in(tmp_path / "out", "tests")}
    assert counts["passed"] == counts["all had their turn"], done.stdout
    assert counts["passed"][0] >= 2  # with the table's tiles, and with small ones


def test_a_wrong_kernel_gets_no_speed_and_no_proof(tmp_path):
    words = ("--device", "cpu", "--minutes", "9", "--stages", "b", "d", "--plant", "b=nan", "d=nan")
    done = command(*words, output=tmp_path / "out")
    assert done.returncode == 1
    rows = rows_in(tmp_path / "out", "attention")
    ours = [row for row in rows if "antlm_fast" in row.provider]
    assert ours
    for row in ours:
        assert not row.samples
        assert row.reason == "AssertionError: out: non-finite where the exact result is finite"
    assert all(row.samples for row in rows if row not in ours)
    for row in rows_in(tmp_path / "out", "proof"):
        if "attention" in row.workload:
            assert row.reason.startswith("WRONG"), row
        else:
            assert row.samples, row
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "non-finite" in summary
    assert "failures of ours" in summary


def test_a_share_beyond_the_budget_is_wrong_and_one_within_is_not():
    proof = module("gpu_stages.proof")
    row = proof._row("attention", "forward")
    assert proof._judged(row, 0.99).samples == (0.99,)
    for share in (1.01, float("nan")):
        judged = proof._judged(row, share)
        assert not judged.samples
        assert judged.reason.startswith("WRONG")


# ---- parts


@pytest.mark.parametrize(
    "line, verdict",
    [
        ("[gw3] [ 12%] PASSED tests/a.py::test_b[c-d e]", ("PASSED", "tests/a.py::test_b[c-d e]")),
        ("[gw0] [  1%] FAILED tests/a.py::test_b ", ("FAILED", "tests/a.py::test_b")),
        ("tests/a.py::test_b[triton small] SKIPPED (why)  [ 50%]", ("SKIPPED", "tests/a.py::test_b[triton small]")),
        ("FAILED tests/a.py::test_b - AssertionError: PASSED", None),  # the summary's, of one that was counted
        ("ERROR: not found: tests/a.py", None),
        ("tests/a.py::test_b ", None),  # xdist's line of a test that begins
    ],
)
def test_verdicts_are_read_from_lines_of_pytest(line, verdict):
    assert module("gpu_stages.gpu_tests").verdict_of(line) == verdict


def test_verdicts_before_the_time_is_up_count():
    """Of a pytest that hangs, and of one that ends by itself."""
    tests = module("gpu_stages.gpu_tests")
    say = "print('tests/a.py::test_b PASSED [ 50%]', flush=True)"
    for ending, seconds, status in (("import time; time.sleep(60)", 2.0, -9), ("", 60.0, 0)):
        program = [sys.executable, "-c", f"{say}; {ending}"]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        begun = time.monotonic()
        lines = list(tests._lines(process, begun + seconds))
        assert [tests.verdict_of(line) for line in lines] == [("PASSED", "tests/a.py::test_b")]
        assert process.wait() == status
        assert time.monotonic() - begun < 30
        process.stdout.close()
    assert "time was used up after 1 tests" in tests._whole(-9, {"PASSED": 1})["reason"]
    assert tests._whole(0, {"PASSED": 1}) == {"samples": (1.0,)}
    assert tests._whole(2, {})["reason"].startswith("FAILED pytest ended with status 2")


@pytest.mark.parametrize(
    "output, status, reason",
    [
        ("every kernel ran\n========= ERROR SUMMARY: 0 errors", 0, None),
        ("every kernel ran\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, None),
        ("every kernel ran\n========= ERROR SUMMARY: 2 errors", 1, "FAILED 2 findings; see the log"),
        (
            "every kernel ran\n========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)",
            1,
            "FAILED 2 findings; see the log",
        ),
        ("every kernel ran\n========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)", 0, None),
        ("========= ERROR SUMMARY: 0 errors", 1, "FAILED the program under it ended with status 1; see the log"),
        ("every kernel ran\nDevice not supported", 2, "FAILED the program under it ended with status 2; see the log"),
    ],
)
def test_a_sanitizer_is_believed_only_at_its_end(output, status, reason):
    found = module("gpu_stages.gpu_tests")._findings(output, status)
    assert found == ({"samples": (0.0,)} if reason is None else {"reason": reason})


def tile_rows(*medians):
    row = module("harness").Row(suite="tiles", workload="forward half, D 64", case="one call", provider="antlm_fast")
    return [replace(row, samples=() if m is None else (m,), reason=None if m else "OutOfResources") for m in medians]


def test_a_tile_wins_only_by_more_than_noise():
    tiles_module = module("gpu_stages.tiles")
    tiles = [tiles_module.Tile(size, 64, 4, 2) for size in (128, 64, 32)]
    assert tiles_module.winner(tile_rows(1.0, 0.99, 1.2), tiles) is None
    assert tiles_module.winner(tile_rows(1.0, None, 0.9), tiles) == tiles[2]
    assert tiles_module.winner(tile_rows(None, 2.0, None), tiles) == tiles[1]  # the table's does not fit
    assert tiles_module.winner(tile_rows(None, None, None), tiles) is None
    late = replace(tile_rows(None)[0], reason=module("harness").TIME_USED_UP)
    assert tiles_module.winner([*tile_rows(1.0, 0.5), late], tiles) is None  # the best of a part is not the best


def test_the_winners_are_a_patch_that_git_applies(tmp_path):
    tiles = module("gpu_stages.tiles")
    chosen = {("sm_90", "half", 64, "forward"): tiles.Tile(128, 128, 8, 2)}
    table = tiles.write_patch(chosen, tmp_path)
    assert json.loads(table.read_text())["sm_90"]["forward half"]["64"] == [128, 128, 8, 2]
    copy = tmp_path / "kernels" / "attention" / "tiles.json"
    copy.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / "kernels" / "attention" / "tiles.json", copy)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", "tiles.patch"], cwd=tmp_path, check=True)
    assert copy.read_text() == table.read_text()


def test_tiles_are_those_of_another_table_only_within(tmp_path):
    tiles, launches = module("gpu_stages.tiles"), tiles_launches()
    other = tiles.write_patch({("sm_90", "half", 64, "forward"): tiles.Tile(16, 16, 1, 1)}, tmp_path)
    before = launches.tile_for("forward half", "sm_90", 64)
    with tiles.tiles_of(other):
        assert launches.tile_for("forward half", "sm_90", 64) == tiles.Tile(16, 16, 1, 1)
    assert launches.tile_for("forward half", "sm_90", 64) == before


def tiles_launches():
    return importlib.import_module("antlm_fast.kernels.attention.triton_launches")


def test_packed_lengths_are_spread_and_flops_are_those_that_are_seen():
    attention, plan = module("gpu_stages.attention"), module("gpu_stages.plan")
    shape = plan.AttentionShape(sequences=64, seqlen=2048, heads=2, head_dim=4, visibility="mixed", packed=True)
    lengths = attention.spread_lengths(shape)
    assert len(lengths) == 64
    assert max(lengths) == 2048
    assert min(lengths) < 60
    causal = torch.tensor([True] * 32 + [False] * 32)
    work = attention.Workload(shape=shape, tensors=(), lengths=lengths, causal=causal)
    pairs = sum(sum(i + 1 for i in range(n)) for n in lengths[:32]) + sum(n * n for n in lengths[32:])
    assert work.flops == 4 * 2 * 4 * pairs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("visibility", ["causal", "full", "mixed"])
def test_every_way_of_attention_is_the_reference(visibility, packed, monkeypatch):
    """The peers that plain torch has on a CPU, and ours by another implementation: layouts, flags, checked parts."""
    attention, plan = module("gpu_stages.attention"), module("gpu_stages.plan")
    for name in ("attention", "attention_varlen"):
        right = getattr(attention, name)
        monkeypatch.setattr(
            attention,
            name,
            lambda *args, right=right, **options: right(
                *args, **options | ({"impl": "torch"} if options["impl"] == "triton" else {})
            ),
        )
    shape = plan.AttentionShape(sequences=4, seqlen=24, heads=3, head_dim=16, visibility=visibility, packed=packed)
    work = attention.drawn(shape, "cpu")
    exact = attention.reference_results(work)
    names = []
    for way in attention.ways(work):
        found = attention.prepared(way, "cpu").results()
        attention.check_results(work, way, lambda: exact, found)
        spoiled = [x.clone() for x in found]
        spoiled[2][-1, -1, -1] += 1.0
        with pytest.raises(AssertionError, match="d_k"):
            attention.check_results(work, way, lambda: exact, spoiled)
        names.append(way.name)
    assert names == ["antlm_fast triton"] if packed else ["antlm_fast triton", "antlm_fast triton, varlen", "SDPA math"]


def test_passes_are_captured_as_two_graphs_of_one_pool(monkeypatch):
    """What is asked of a device, with one that only takes notes."""
    timing, notes = module("gpu_stages.timing"), []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def pool(self):
            return "the pool"

        def replay(self):
            notes.append("replay")

    class Capture:
        def __init__(self, graph, pool=None):
            notes.append(("capture", pool))

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    class InStream(Capture):
        def __init__(self, stream):
            notes.append("warm")

    for name, value in (
        ("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", Capture), ("stream", InStream),
        ("synchronize", lambda: notes.append("wait")),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "device_timed", lambda call: call)
    x = torch.randn(3, requires_grad=True)
    made = timing.passes(lambda y: y * y, [x], torch.ones(3), "cuda")
    out, gradient = made.results()
    assert torch.equal(out, (x * x).detach())
    assert torch.equal(gradient, (2 * x).detach())
    assert notes == ["warm", "wait", ("capture", None), ("capture", "the pool"), "replay", "replay", "wait"]
    notes.clear()
    made.forward()
    made.backward()
    made.both()
    assert notes == ["replay"] * 4


# ---- plan, messages, comparison


def test_the_plan_names_every_stage_and_its_minutes(capsys):
    assert module("gpu").main(["--dry-run", "--minutes", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for stage in module("gpu_stages.plan").STAGES:
        assert any(f"{stage.letter} {stage.name}" in line and f"{stage.minutes:.1f}" in line for line in lines)
    assert "  D 64, 16 x 1024 tokens, 32 heads, causal" in lines
    assert sum(stage.minutes for stage in module("gpu_stages.plan").STAGES) == pytest.approx(8.0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--plant", "z=crash"], "--plant must be a stage's letter = one of raise, crash, hang, nan; got z=crash"),
        (["--plant", "a=sleep"], "--plant must be a stage's letter = one of raise, crash, hang, nan; got a=sleep"),
        (["--minutes", "0"], "--minutes must be above 0; got 0.0"),
        (["--device", "cpu", "--peers", "no such folder"], "--peers must be a folder; got no such folder"),
    ],
)
def test_bad_input_is_told(words, message):
    with pytest.raises(SystemExit) as told:
        module("gpu").main(words)
    assert str(told.value) == message


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="^--device cuda: this torch sees no CUDA device"):
        module("gpu").main(["--minutes", "1"])


def test_wheels_of_peers_are_found_as_files(tmp_path):
    import zipfile

    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one_peer/__init__.py", "NAME = 'one'\n")
    (folder / "other_peer.py").write_text("NAME = 'other'\n")
    (tmp_path / "scratch").mkdir()
    paths = module("gpu").peers_paths(folder, tmp_path / "scratch")
    probe = "import one_peer, other_peer; print(one_peer.NAME, other_peer.NAME, one_peer.__file__.endswith('.py'))"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.stdout.split() == ["one", "other", "True"]
    assert module("gpu").peers_paths(None, tmp_path) == []


def test_a_summary_of_everything_fits_100_lines():
    harness, results, summary = module("harness"), module("results"), module("gpu_stages.summary")
    machine = {"gpu": "a card", "torch": "2.11.0", "date": "2026-11-28T00:00"}
    rows = []
    for size in range(120):
        for which in ("forward", "backward", "both"):
            for provider, seconds in (("antlm_fast triton", 2e-3), ("SDPA cudnn", 1e-3), ("SDPA flash", 3e-3)):
                rows.append(
                    harness.Row(
                        suite="attention",
                        workload=f"D 64, {size} x 1024 tokens",
                        case=f"causal, {which}",
                        provider=provider,
                        samples=(seconds,),
                        amount=1.0,
                        unit="TFLOP/s",
                        floor=1e-3,
                    )
                )
    stages = [harness.Row(suite="stages", workload="stages", case="d attention", provider="stage", samples=(9.0,))]
    failing = harness.Row(
        suite="proof", workload="loss", case="forward", provider="antlm_fast triton", reason="WRONG x"
    )
    peer = harness.Row(suite="proof", workload="loss", case="forward", provider="Liger", reason="not there")
    late = replace(failing, case="d_logits", reason=harness.TIME_USED_UP)
    limits = {"flops_per_s": {"bf16": 8e14}, "bytes_per_s": 3e12}
    suites = {
        name: results.suite_record(machine, None, "s", 1.0, own) | {"limits": limits}
        for name, own in (("stages", stages), ("proof", [failing, peer, late]), ("attention", rows))
    }
    lines = summary.lines(suites)
    assert len(lines) == 100
    assert lines[0].startswith("a card; torch 2.11.0")
    assert lines[1] == "ceilings: bf16 800 TFLOP/s, copy 3 TB/s"
    assert summary.failures(suites) == [failing]  # neither a peer's nor what had no turn
    # a stage that fails has failed, whatever it said; a tile may be too large, a kernel of the proof may not
    words = "OutOfResources: not installed, the suite's time was used up"
    assert not summary.is_excused(replace(stages[0], samples=(), reason=words))
    assert not summary.is_excused(replace(failing, reason="OutOfResources: shared memory"))
    assert summary.is_excused(replace(failing, suite="tiles", reason="OutOfResources: shared memory"))
    assert not summary.is_excused(replace(failing, suite="tests", reason="ModuleNotFoundError: it is not installed"))
    assert lines[-1] == "  ... 31 more lines of this are in gpu.json"
    figures = next(line for line in lines if "D 64, 0 x 1024" in line)
    assert figures.split("|")[0].split() == [
        "D", "64,", "0", "x", "1024", "tokens", "causal", "fwd", "2.000", "500", "50%,", "SDPA", "cudnn", "0.50x",
    ]  # fmt: skip
