"""The benchmark's arithmetic by hand, and every suite at tiny sizes; nothing here judges a time."""

import functools
import importlib
import importlib.util
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


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


def provider(name, prepare, case="one", **others):
    values = {"amount": 6.0, "unit": "things/s"} | others
    return module("harness").Provider(case=case, name=name, prepare=prepare, **values)


def tiny(suite, **changes):
    bench = module("harness").Bench(sizes=module("sizes").SIZES["tiny"], **changes)
    return [row for rows in module("run").SUITES[suite](bench) for row in rows]


def by_provider(rows):
    return {name: [row for row in rows if row.provider == name] for name in dict.fromkeys(row.provider for row in rows)}


def assert_timed(rows):
    assert rows
    for row in rows:
        assert row.reason is None, row
        assert row.samples
        assert all(math.isfinite(value) and value > 0 for value in row.samples)


# ---- arithmetic


def test_quartiles_and_ratio_are_those_worked_by_hand():
    harness = module("harness")
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0]) == (1.75, 2.5, 3.25)
    assert harness.quartiles([7.0]) == (7.0, 7.0, 7.0)
    # per round 2, 2, 5: the load of the second round drops out; the ratio of the medians would be 10 / 2
    assert harness.ratio([2.0, 20.0, 10.0], [1.0, 10.0, 2.0]) == 2.0
    assert harness.ratio([3.0, 5.0], [1.0, 2.0, 9.0]) == 2.0  # not the same rounds: 4 / 2


def test_the_floor_is_what_the_limits_allow():
    roofline = module("roofline")
    limits = roofline.Limits(flops_per_s={"fp32": 1e9, "bf16": 4e9}, bytes_per_s=2e9)
    assert limits.floor_seconds(roofline.Work(flops=8e9, bytes=1e9), "bf16") == 2.5
    assert limits.floor_seconds(roofline.Work(flops=8e9, bytes=1e9), "fp32") == 8.5
    row = module("harness").Row(suite="s", workload="w", case="c", provider="p", samples=(4.0, 6.0), floor=2.5)
    assert module("harness").of_floor(row) == 0.5


def test_work_is_counted_as_by_hand():
    roofline = module("roofline")
    # 2 * 3 heads of 4 x 4 scores of 5 products: 6 products of 2 FLOPs; q, k, v, out and their gradients read and
    # written: 12 tensors of 2 * 4 * 3 * 5 numbers
    full = roofline.attention_work(2, 3, 4, 5, "bf16", causal=False)
    assert (full.flops, full.bytes) == (12 * 2 * 3 * 16 * 5, 12 * 120 * 2)
    assert roofline.attention_work(2, 3, 4, 5, "fp32", causal=True).flops == full.flops * 10 / 16
    relative = roofline.disentangled_work(2, 3, 4, 5, 7, "bf16", causal=False)
    assert relative.flops - full.flops == 2 * (6 * 2 * 3 * 4 * 7 * 5)
    assert roofline.cross_entropy_work(3, 5, 7, "fp32").flops == 6 * 3 * 5 * 7


def test_the_floor_of_a_step_is_the_one_the_design_names():
    """BabyLlama-58M at 900 GFLOP/s and 45 GB/s: 737 ms in CLM on 16 x 128 tokens; LTG-BERT small in MLM: 339 ms."""
    roofline, sizes = module("roofline"), module("sizes").SIZES["full"]
    limits = roofline.Limits(flops_per_s={"bf16": 900e9}, bytes_per_s=45e9)
    baby = roofline.step_work(sizes.models["BabyLlama-58M"], 16, 128, 16 * 127, "bf16", causal=True)
    assert limits.floor_seconds(baby, "bf16") == pytest.approx(0.737, rel=0.01)
    ltg = roofline.step_work(sizes.models["LTG-BERT small"], 16, 128, 307, "bf16", causal=False)
    assert limits.floor_seconds(ltg, "bf16") == pytest.approx(0.339, rel=0.05)


def test_the_exponent_is_that_of_the_power_law():
    scaling, harness = module("scaling"), module("harness")
    assert scaling.power_law([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    rows = [
        harness.Row(suite="scaling", workload="w", case=f"T = {n}", provider="p", samples=(5.0 * n,)) for n in (2, 8)
    ]
    first, last = scaling.with_exponents(rows)
    assert dict(first.extras) == {}
    assert last.extras["exponent"] == pytest.approx(1.0)


# ---- turns, reasons, time that runs out


def test_providers_take_turns_after_a_warm_up():
    calls, times = [], iter([0, 1, 10, 12, 20, 25, 30, 36])
    providers = [provider(name, lambda name=name: lambda: calls.append(name), floor=1.5) for name in "ab"]
    rows = module("harness").measure("s", "w", providers, rounds=2, warmup=1, clock=lambda: next(times))
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [row.samples for row in rows] == [(1, 5), (2, 6)]
    lines = list(module("harness").table(rows))
    assert lines[0] == "s: w"
    shown = "one a 3000.00 ms 2000.00 ms - 4000.00 ms 2 things/s 50% 1.00"
    assert " ".join(lines[2].split()) == shown
    assert lines[3].split()[-1] == "1.60"  # the median of 2 / 1 and 6 / 5


def test_a_call_that_times_itself_is_believed():
    rows = module("harness").measure("s", "w", [provider("a", lambda: lambda: 0.25)], rounds=2)
    assert rows[0].samples == (0.25, 0.25)


def test_a_provider_that_fails_shows_why_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such device in /somewhere/private/lib.so\nand a long trace")

    def breaks_when_called():
        raise MemoryError

    rounds = iter(range(9))

    def breaks_later():
        if next(rounds) > 1:
            raise ValueError("late")

    never = []
    rows = module("harness").measure(
        "s",
        "w",
        [
            provider("a", broken),
            provider("b", lambda: breaks_when_called),
            provider("c", lambda: breaks_later),
            provider("d", lambda: never.append(1), probe=broken),
            provider("e", lambda: lambda: None),
        ],
        rounds=3,
    )
    assert [(row.reason, len(row.samples)) for row in rows] == [
        ("RuntimeError: no such device in ...", 0),
        ("MemoryError: no message", 0),
        ("ValueError: late", 0),
        ("RuntimeError: no such device in ...", 0),
        (None, 3),
    ]
    assert never == []  # what fails its tiny call is not prepared
    lines = list(module("harness").table(rows))
    assert lines[2].split(maxsplit=2)[2] == "RuntimeError: no such device in ..."
    assert lines[6].split()[-1] == "-"  # there is nothing to compare with


def test_a_suite_whose_time_is_used_up_says_so():
    harness = module("harness")
    rows = harness.measure("s", "w", [provider("a", lambda: lambda: None)], rounds=3, until=time.monotonic() - 1)
    assert [(row.reason, row.samples) for row in rows] == [("the suite's time was used up", ())]
    begun = time.monotonic()
    rows = harness.measure("s", "w", [provider("a", lambda: lambda: None)], rounds=10**9, until=begun + 0.2)
    assert 1 <= len(rows[0].samples) < 10**9


def test_other_work_on_the_cores_is_noticed():
    shared = module("harness").shared
    quiet = {"load_average": [0.2, 0.0, 0.0], "threads": 2, "cores": 2}
    assert [shared(quiet), shared(quiet | {"load_average": [1.0, 0.0, 0.0]})] == [False, True]
    assert shared(quiet | {"load_average": [1.0, 0.0, 0.0], "threads": 1}) is False


# ---- what is wrong gets no figure


def test_a_wrong_attention_gets_no_figure(monkeypatch):
    operations = module("peers.operations")
    right = operations.eager_attention

    def wrong_one(q, k, v, *, causal):
        return right(q, k, v, causal=causal) * 1.05

    monkeypatch.setitem(operations.ATTENTION, "eager bmm + softmax", (wrong_one, True))
    rows = by_provider(tiny("attention"))
    wrong = rows.pop("eager bmm + softmax")
    assert len(wrong) == 4
    assert all(row.samples == () and row.reason.startswith("AssertionError: result: error") for row in wrong)
    assert all(row.reason.startswith("UnsupportedError: attention(impl='triton')") for row in rows["antlm_fast triton"])
    assert all(row.reason.startswith("nothing is compiled at these sizes") for row in rows["FlexAttention"])
    for name in ("flash-attn", "xformers"):
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            assert all(row.reason.startswith("ModuleNotFoundError") for row in rows[name])
    assert_timed([row for name in ("antlm_fast torch", "antlm_fast reference", "SDPA") for row in rows[name]])


def test_a_wrong_visibility_gets_no_figure():
    """Our own step with every sequence bidirectional, held to the gradients of a causal one."""
    runners, config = module("step_runner"), asdict(module("sizes").SIZES["tiny"].models["BabyLlama tiny"])
    runner = runners.StepRunner(config, "ours", "auto", "fp32")
    wanted = runners.StepRunner(config, "ours", "reference", "fp64").gradients("CLM", 2, 16)
    assert runners.relative_error(runner.gradients("CLM", 2, 16), wanted) < 1e-5
    seen = runner.batch("CLM", 2, 16)
    assert int(seen.prefix_len.max()) == 0
    runner.batches["CLM", 2, 16] = replace(seen, prefix_len=torch.full_like(seen.prefix_len, 2**31 - 1))
    assert runners.relative_error(runner.gradients("CLM", 2, 16), wanted) > 1e-2


def test_a_variant_with_wrong_gradients_gets_no_figure(monkeypatch, tmp_path):
    runners = module("step_runner")
    save = runners.save_exact

    def spoilt(config, objective, seqlen, path):
        save(config, objective, seqlen, path)
        torch.save({name: 1.2 * x for name, x in torch.load(path).items()}, path)

    monkeypatch.setattr(module("step_workloads"), "save_exact", spoilt)
    sizes = module("sizes")
    scene = sizes._small("BabyLlama tiny", (2, 16), "antlm_fast", objectives=("CLM",))
    bench = module("harness").Bench(sizes=replace(sizes.SIZES["tiny"], scenes=(scene,)))
    ((row,),) = module("step_workloads").train_step(bench)
    assert row.samples == ()
    assert row.reason.startswith("AssertionError: gradients are off by 1.7e-01; the bound is 5e-02")


# ---- peers


@pytest.mark.parametrize("form", ["gathered", "einsum"])
@pytest.mark.parametrize("objective", ["CLM", "MLM"])
def test_the_eager_ltg_bert_is_our_ltg_bert(form, objective):
    runners = module("step_runner")
    config = asdict(replace(module("sizes").SIZES["tiny"].models["LTG-BERT tiny"], position_bucket_size=8))
    ours = runners.StepRunner(config, "ours", "reference", "fp64")
    peer = runners.StepRunner(config, "ltg", form, "fp64")
    for runner in (ours, peer):
        runner.losses = []
        backward = runner._backward
        runner._backward = lambda loss, runner=runner, backward=backward: runner.losses.append(float(backward(loss)))
    # 40 tokens: beyond the linear buckets; float32 is what `gradients` hands out
    wanted, found = (runner.gradients(objective, 2, 40) for runner in (ours, peer))
    assert peer.losses[0] == pytest.approx(ours.losses[0], rel=1e-12)
    assert runners.relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize(("bucket_size", "max_position", "seqlen"), [(32, 512, 600), (8, 32, 50), (2, 9, 12)])
def test_the_peers_buckets_are_the_kernels(bucket_size, max_position, seqlen):
    from antlm_fast.kernels.disentangled_attention import relative_bucket

    places = torch.arange(seqlen)
    wanted = relative_bucket(places[:, None] - places, bucket_size=bucket_size, max_position=max_position)
    found = module("peers.eager_ltg_bert").bucket_rows(seqlen, bucket_size, max_position, "cpu")
    assert torch.equal(found - (bucket_size - 1), wanted)


@pytest.mark.parametrize(
    ("family", "attention", "objective", "reason"),
    [
        ("llama", "eager", "CLM", None),
        ("llama", "sdpa", "MLM", None),
        ("gpt2", "sdpa", "CLM", None),
        ("gpt2", "eager", "MLM", None),
        ("modernbert", "sdpa", "MLM", None),
        ("modernbert", "eager", "CLM", "is_causal=True leaks"),
        ("bert", "eager", "MLM", None),
        ("bert", "eager", "CLM", "is_causal=True leaks"),
    ],
)
def test_stock_models_do_what_their_flag_says_or_get_no_figure(family, attention, objective, reason):
    pytest.importorskip("transformers")
    runners, models = module("step_runner"), module("sizes").SIZES["tiny"].models
    config = asdict(models["LTG-BERT tiny" if "bert" in family else "BabyLlama tiny"])
    runner = runners.StepRunner(config, family, attention, "fp32")
    if reason is not None:
        with pytest.raises(AssertionError, match=reason):
            runner.check(objective, 2, 16, None)
    else:
        assert runner.check(objective, 2, 16, None) < 1e-5


def test_hugging_face_has_our_weights_and_gradients():
    pytest.importorskip("transformers")
    runners, config = module("step_runner"), asdict(module("sizes").SIZES["tiny"].models["BabyLlama tiny"])
    wanted = runners.StepRunner(config, "ours", "reference", "fp64").gradients("MLM", 2, 16)
    found = runners.StepRunner(config, "llama", "sdpa", "fp32").gradients("MLM", 2, 16)
    assert runners.relative_error(found, wanted) < 1e-5


def test_dropout_can_be_left_out():
    runners, config = module("step_runner"), asdict(module("sizes").SIZES["tiny"].models["LTG-BERT tiny"])
    for source, form in (("ours", "auto"), ("ltg", "gathered")):
        losses = {}
        for dropout in (True, False):
            runner = runners.StepRunner(config, source, form, "fp32", dropout=dropout)
            loss = functools.partial(runner._backward, runner._loss_of("MLM", 2, 16))
            losses[dropout] = [float(loss()) for _ in range(2)]
            assert runner.drops is dropout
        assert losses[True][0] != losses[True][1]
        assert losses[False][0] == losses[False][1]


@pytest.mark.parametrize(
    ("source", "form", "model"),
    [
        ("llama", "eager", "BabyLlama tiny"),
        ("gpt2", "sdpa", "BabyLlama tiny"),
        ("bert", "eager", "LTG-BERT tiny"),
        ("modernbert", "sdpa", "LTG-BERT tiny"),
        ("ltg", "gathered", "LTG-BERT tiny"),
    ],
)
def test_a_compiled_step_is_held_to_the_same_model_not_compiled(monkeypatch, tmp_path, source, form, model):
    """With a backend that needs no compiler; what Inductor makes of the graphs is checked by the run itself."""
    if source != "ltg":
        pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    runners = module("step_runner")
    config = asdict(module("sizes").SIZES["tiny"].models[model])
    exact = None
    if source in ("llama", "ltg"):
        exact = str(tmp_path / "exact.pt")
        runners.save_exact(config, "MLM", 16, Path(exact))
    runner = runners.StepRunner(config, source, form, "bf16", compiled=True)
    before = runners.compiled_graphs()
    assert runner.first_step("MLM", 4, 16) > 0
    assert runner.check("MLM", 4, 16, exact) < 5e-2
    assert runners.compiled_graphs() > before
    right = runner._steps["MLM", 4, 16]
    monkeypatch.setattr(runner, "_loss_of", lambda *_, compiled=True: (lambda: 2 * right()) if compiled else right)
    with pytest.raises(AssertionError, match=r"compiled, .* off by"):
        runner._check_compiled("MLM", 4, 16)
