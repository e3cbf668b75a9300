"""Linear cross-entropy's Triton ops as torch sees them, at odd sizes and splits, and with faults planted in them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.linear_cross_entropy import labelled, linear_cross_entropy
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on the CPU only under TRITON_INTERPRET=1", allow_module_level=True)

from antlm_fast.kernels.linear_cross_entropy import triton_impl, triton_kernels, triton_launches
from antlm_fast.kernels.triton_support.launch import Launch, Tile, read_tiles
from antlm_fast.kernels.triton_support.offline import TARGETS

IGNORED = -100
ROWS, HIDDEN, VOCAB = 19, 12, 37
EVERY_OPTION: dict[str, Any] = {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 3.0}
GRADIENTS = ("d_hidden", "d_weight", "d_bias")
Numbers = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few rows and classes cross edges; and every row goes through, with a mask that tells which count."""
    torch._dynamo.reset()
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(16, 16, 4, 1))
    monkeypatch.setattr(triton_launches, "_SPLIT_COLS", 32)
    monkeypatch.setattr(labelled, "_host_may_read", lambda x: False)


def _inputs(rows: int = ROWS, hidden_size: int = HIDDEN, vocab: int = VOCAB) -> Numbers:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden": (rows, hidden_size), "weight": (vocab, hidden_size), "bias": (vocab,), "upstream": (rows,)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    targets = torch.randint(vocab, (rows,), generator=generator)
    # a third is predicted right, a quarter has no label
    targets[::3] = (inputs["hidden"] @ inputs["weight"].t() + inputs["bias"]).argmax(1)[::3]
    targets[1] = vocab - 1
    targets[2::4] = IGNORED
    return {**inputs, "targets": targets}


def _results(inputs: Numbers, dtype: torch.dtype, impl: str, reduction: str = "none", **options: Any) -> Numbers:
    leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, metrics = linear_cross_entropy(
        *leaves[:2], inputs["targets"], bias=leaves[2], reduction=reduction, return_metrics=True, impl=impl, **options
    )
    upstream = inputs["upstream"].to(loss.dtype) if loss.dim() else torch.tensor(-2.5, dtype=loss.dtype)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    return {
        "loss": loss.detach(),
        "lse": metrics.lse,
        "correct": metrics.correct.float(),
        **dict(zip(GRADIENTS, gradients, strict=True)),
    }


def _wrong(inputs: Numbers, dtype: torch.dtype = torch.float32, *, scale: float = 0.0, **options: Any) -> set[str]:
    """Triton's results that are past the error budget; scale is the size of what cancels in the gradients."""
    rounded = {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact, eager = (_results(rounded, of, "reference", **options) for of in (torch.float64, dtype))
    actual, found = _results(rounded, dtype, "triton", **options), set()
    for name, wanted in exact.items():
        budget = {"slack": 3.0, "scale": scale} if name.startswith("d_") else {}
        try:
            assert_within_budget(name, actual[name], wanted, eager[name], **budget)
        except AssertionError:
            found.add(name)
    return found


@pytest.mark.parametrize("vocab", [1, 7, 517])
@pytest.mark.parametrize("hidden_size", [1, 12, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(vocab: int, hidden_size: int, dtype: torch.dtype) -> None:
    inputs = _inputs(hidden_size=hidden_size, vocab=vocab)
    inputs["weight"] /= hidden_size**0.5
    assert _wrong(inputs, dtype) == set()
    # the probability of a class that is alone is 1, and 1 is taken from it
    assert _wrong(inputs, dtype, scale=2.5 * (vocab == 1), reduction="mean", **EVERY_OPTION) == set()


@pytest.mark.parametrize("programs", [1, 4, 6, 512])
def test_however_many_share_the_vocabulary(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """2 tiles of rows, 3 units of the vocabulary."""
    monkeypatch.setattr(triton_launches, "_PROGRAMS", programs)
    inputs = _inputs(vocab=85)
    call = triton_launches.LinearCrossEntropyLaunches(
        inputs["hidden"], inputs["weight"], None, inputs["targets"], None, None
    )
    assert call.num_splits == {1: 1, 4: 2, 6: 3, 512: 3}[programs]
    assert _wrong(inputs, **EVERY_OPTION) == set()


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 64)])
def test_every_shape_of_tile(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(*tile, 4, 1))
    monkeypatch.setattr(triton_launches, "_SPLIT_COLS", 64)
    assert _wrong(_inputs(rows=70, vocab=150), **EVERY_OPTION) == set()


def test_more_row_tiles_than_a_group() -> None:
    """11 tiles of rows: a whole group of 8, and one of 3."""
    assert _wrong(_inputs(rows=170, vocab=50)) == set()


def test_every_tile_of_the_table_is_there() -> None:
    """And splits of the vocabulary are whole numbers of each."""
    for arch, uses in read_tiles(triton_launches.TILES).items():
        kinds = ("half", "ieee") if arch == "gfx942" else ("half", "tf32", "ieee")
        assert list(uses) == [f"{kernel} {kind}" for kind in kinds for kernel in ("forward", "d_logits")]
        for use, sizes in uses.items():
            (tile,) = sizes.values()
            assert list(sizes) == [str(triton_launches.block_k(use.split()[1]))]
            assert 256 % tile.block_n == 0
    assert list(read_tiles(triton_launches.TILES)) == list(TARGETS)


def test_views_are_read_where_they_lie() -> None:
    inputs = _inputs()
    wanted = _results(inputs, torch.float32, "triton", **EVERY_OPTION)
    wide = torch.stack([inputs["hidden"], torch.full_like(inputs["hidden"], torch.nan)], 1)
    turned = inputs["weight"].t().contiguous().t()
    actual = _results(inputs | {"hidden": wide[:, 0], "weight": turned}, torch.float32, "triton", **EVERY_OPTION)
    for name, x in wanted.items():
        assert torch.equal(actual[name], x), name


def test_a_class_that_a_bias_rules_out() -> None:
    """-inf for 20 classes, the first tile of 16 among them: they have no probability and no gradient."""
    inputs = _inputs()
    inputs["targets"] = torch.full((ROWS,), 30)
    ruled_out = inputs | {"bias": inputs["bias"].index_fill(0, torch.arange(20), -torch.inf)}
    rest = inputs | {name: inputs[name][20:] for name in ("weight", "bias")} | {"targets": inputs["targets"] - 20}
    actual, wanted = (_results(x, torch.float32, "triton") for x in (ruled_out, rest))
    for name in ("loss", "lse", "correct", "d_hidden"):
        torch.testing.assert_close(actual[name], wanted[name])
    for name in ("d_weight", "d_bias"):
        torch.testing.assert_close(actual[name][20:], wanted[name])
        assert not actual[name][:20].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_workspace_of_a_row_or_of_sixteen(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A weight's gradient that is a sum of products, which half precision must not round one by one too often."""
    inputs = _inputs()
    for rows in (1, 16):
        step = lambda self, mib, rows=rows: [  # noqa: E731
            slice(at, min(at + rows, self.rows)) for at in range(0, self.rows, rows)
        ]
        monkeypatch.setattr(triton_launches.LinearCrossEntropyLaunches, "chunks", step)
        assert _wrong(inputs, dtype, **EVERY_OPTION) == set()


@pytest.mark.parametrize("mib", [1, 2, 64])
def test_logits_never_all_exist(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """1000 rows by 30,001 words, padded to 30,016; the kernels do not run, as what they are given is asked."""
    given = []
    monkeypatch.setattr(Launch, "run", lambda self, device: given.append(self.arguments))
    hidden, weight = (torch.zeros(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (1000, 30_001))
    loss = linear_cross_entropy(hidden, weight, torch.arange(1000), impl="triton", workspace_mib=mib)
    assert torch.autograd.grad(loss, weight)[0].shape == weight.shape
    forward, *backward = given
    assert forward["partials_ptr"].numel() < 1000 * 30_001 / 10
    rows = [arguments["d_logits_ptr"].shape[0] for arguments in backward]
    assert sum(rows) == 1000
    assert len({arguments["d_logits_ptr"].data_ptr() for arguments in backward}) == 1, "each chunk has its own memory"
    assert mib * 2**19 < max(rows) * 30_016 * 2 <= mib * 2**20 or max(rows) == 1000


def test_a_small_mean_in_float16_keeps_its_gradient() -> None:
    """An upstream gradient of 2**-20: the products are taken where float16 is precise, and only results are rounded."""
    inputs = {name: x.half() if x.is_floating_point() else x for name, x in _inputs().items()}
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    loss = linear_cross_entropy(*leaves, inputs["targets"], reduction="sum", impl="triton")
    plain, small = (torch.autograd.grad(loss, leaves, torch.tensor(x), retain_graph=True) for x in (1.0, 2.0**-20))
    for a, b in zip(plain, small, strict=True):
        # half a step of float16's smallest numbers, which are 2**-24 apart
        torch.testing.assert_close(b.float() * 2**20, a.float(), rtol=2e-3, atol=2.0**-5)
        assert b.any()


def test_rows_further_apart_than_32_bits_reach() -> None:
    """Rows of hidden, weight and d_logits 2**30 numbers apart, of memory that is never touched in between."""
    step = 2**30
    memory = [torch.from_numpy(np.zeros(2 * step + 16, np.float16)).as_strided((3, 16), (step, 1)) for _ in range(3)]
    torch.manual_seed(0)
    small = [torch.randn(3, 16).half() for _ in range(2)]
    for x, values in zip(memory, small, strict=False):
        x.copy_(values)
    results = []
    for hidden, weight, d_logits in ((*small, torch.zeros(3, 16).half()), memory):
        targets, ones = torch.tensor([2, 0, 1]), torch.ones(3)
        call = triton_launches.LinearCrossEntropyLaunches(hidden, weight, None, targets, None, None)
        partials = call.new_partials(False)
        call.forward(partials).run(hidden.device)
        launch = call.d_logits(slice(0, 3), ones, ones, d_logits, 0.0, 0.0)
        launch.arguments["stride_d"] = d_logits.stride(0)  # type: ignore[index]
        launch.kernel[(1,)](**launch.with_tile(launch.tile))
        results.append((partials, d_logits[:, :3].clone()))
    assert results[0][1].any()
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def _op_arguments(inputs: Numbers, **changes: Any) -> tuple[Any, ...]:
    arguments: dict[str, Any] = {
        **{name: inputs[name] for name in ("hidden", "weight", "bias", "targets")},
        "counts": inputs["targets"] != IGNORED,
        "compute_dtype": inputs["hidden"].dtype,
        **EVERY_OPTION,
        "workspace_mib": 1,
        **changes,
    }
    return tuple(arguments.values())


BARE: dict[str, Any] = {"bias": None, "counts": None, "label_smoothing": 0.0, "softcap": None}


def _arguments_of(op: str, case: str) -> tuple[Any, ...]:
    inputs = _inputs()
    if case == "bare":
        inputs["targets"].clamp_(min=0)
    if case == "views":
        inputs |= {name: torch.stack([inputs[name]] * 2, 1)[:, 1] for name in ("hidden", "weight")}
    arguments = _op_arguments(inputs, **(BARE if case == "bare" else {}))
    if op == "forward_op":
        return arguments
    _, lse, _ = triton_impl.forward_op(*arguments)
    upstream = torch.tensor(1.5).expand(ROWS) if case == "views" else inputs["upstream"]
    return (upstream, lse, *arguments, True, case != "bare", case != "bare")


@pytest.mark.parametrize("case", ["contiguous", "views", "bare"])
@pytest.mark.parametrize("op", ["forward_op", "backward_op"])
def test_opcheck(op: str, case: str) -> None:
    """Schema, autograd registration, fake tensors and tracing; the backward has no gradient of its own."""
    arguments = _arguments_of(op, case)
    if op == "forward_op":
        arguments = tuple(
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in arguments
        )
    passed = torch.library.opcheck(getattr(triton_impl, op), arguments)
    assert list(passed.values()) == ["SUCCESS"] * 4


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_compiled_call_is_the_eager_one_for_any_targets(reduction: str) -> None:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, impl="triton")

    inputs, counter = _inputs(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    seen = []
    for shift in (0, 1, 2):
        targets = inputs["targets"].roll(shift)
        leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        results = []
        for function in (loss, compiled):
            value = function(*leaves, targets)
            upstream = inputs["upstream"] if value.dim() else torch.tensor(2.0)
            results.append((value.detach(), *torch.autograd.grad(value, leaves, upstream)))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)
        seen.append(results[0][1])
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[1])


def test_a_second_derivative_is_refused() -> None:
    inputs = _inputs()
    hidden = inputs["hidden"].requires_grad_()
    loss = linear_cross_entropy(hidden, inputs["weight"], inputs["targets"], impl="triton")
    with pytest.raises(UnsupportedError, match="linear_cross_entropy: this implementation has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["contiguous", "views", "bare"])
@pytest.mark.parametrize("op", ["forward_op", "backward_op"])
def test_fake_results_have_the_face_of_real_ones(op: str, case: str, dtype: torch.dtype) -> None:
    arguments = [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 2 else x
        for x in _arguments_of(op, case)
    ]
    real = getattr(triton_impl, op)(*arguments)
    with FakeTensorMode():
        on_cuda = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x
            for x in arguments
        ]
        fake = getattr(triton_impl, op)(*on_cuda)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert (a.device.type, b.device.type) == ("cpu", "cuda")


Variant = Callable[..., dict[str, ModuleType]]


@pytest.fixture(scope="module")
def variant() -> Iterator[Variant]:
    """The folder of benchmarks is no installed package: it is importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        yield importlib.import_module("benchmarks.variants").variant
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def every_option() -> set[str]:
    return _wrong(_inputs(), **EVERY_OPTION)


def plain() -> set[str]:
    return _wrong(_inputs())


def unlabelled() -> set[str]:
    """Rows without a label, a whole tile among them, hold what exp2 makes infinite: no result may change."""
    inputs = _inputs(rows=48)
    inputs["targets"][16:32] = IGNORED
    results = _results(inputs, torch.float32, "triton")
    ignored = inputs["targets"] == IGNORED
    inputs["hidden"][ignored] *= 1e6
    spoiled = _results(inputs, torch.float32, "triton")
    return {name for name in results if not torch.equal(results[name], spoiled[name])}


KERNELS = "triton_kernels"
D_LOGITS, FORWARD = "d_logits_kernel", "forward_kernel"
BOTH, SPLIT = f"{FORWARD} {D_LOGITS}", "first_col + split_cols"
REPLACED = "tl.where(valid, d_logits * upstream[:, None], 0.0)"
DERIVED = set(GRADIENTS)
LOSS, NUMBERS, EVERYTHING = {"loss", "correct"}, {"loss", "lse", *DERIVED}, {"loss", "lse", "correct", *DERIVED}
# fault: (check, {what it finds wrong}, kernels, text of their source, text in its place)
MUTANTS: dict[str, tuple[Callable[[], set[str]], set[str], str, str, str]] = {
    "the target's logit is dropped": (plain, LOSS, FORWARD, "target_logit += tl.sum", "target_logit += 0.0 * tl.sum"),
    "the target's logit is its neighbour's": (plain, LOSS, FORWARD, "(targets - col)", "(targets + 1 - col)"),
    "the target's 1 stays": (plain, DERIVED, D_LOGITS, "d_logits - certain, d_logits)", "d_logits, d_logits)"),
    "z_loss has no gradient": (every_option, DERIVED, D_LOGITS, "p * (1.0 + twice_z_loss * lse)[:, None]", "p"),
    "smoothing has no gradient": (every_option, DERIVED, D_LOGITS, "lse)[:, None] - share", "lse)[:, None]"),
    "smoothing leaves logits out": (every_option, {"loss"}, FORWARD, "logit_sum += tl.sum", "tl.sum"),
    "smoothing sums too many": (every_option, {"loss"}, FORWARD, "tl.where(inside, logits, 0.0)", "logits"),
    "softcap has no slope": (every_option, DERIVED, D_LOGITS, "1.0 - level * level", "1.0"),
    "softcap is ignored": (every_option, NUMBERS, BOTH, "if CAPPED:", "if False:"),
    "the bias is ignored": (plain, EVERYTHING, BOTH, "if BIASED:", "if False:"),
    "counts are ignored": (plain, DERIVED, D_LOGITS, "tl.load(counts_ptr + at) != 0", "rows >= 0"),
    "rows are multiplied by 0": (unlabelled, DERIVED, D_LOGITS, REPLACED, "d_logits * upstream[:, None] * valid"),
    "a split ends a tile early": (plain, EVERYTHING, FORWARD, SPLIT, f"{SPLIT} - BLOCK_N"),
    "a split ends a tile late": (plain, NUMBERS, FORWARD, SPLIT, f"{SPLIT} + BLOCK_N"),
    "the sum is not rescaled": (plain, NUMBERS, FORWARD, "running_sum * tl.exp2", "running_sum + 0.0 * tl.exp2"),
    "the exponents are of e": (plain, NUMBERS, FORWARD, "safe_max[:, None]) * _LOG2_E", "safe_max[:, None])"),
    "too many classes count": (plain, NUMBERS, FORWARD, 'tl.where(inside, logits, float("-inf"))', "logits"),
    "the upstream gradient is ignored": (plain, DERIVED, D_LOGITS, "d_logits * upstream[:, None]", "d_logits"),
    "hidden's last column is lost": (plain, EVERYTHING, BOTH, "(dims < hidden_size)", "(dims < hidden_size - 1)"),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_caught(fault: str, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    check, found, kernels, old, new = MUTANTS[fault]
    built = variant((KERNELS, old, new), modules=[triton_kernels])[KERNELS]
    for kernel in kernels.split():
        monkeypatch.setattr(triton_launches, kernel, getattr(built, kernel))
    assert check() == found


def test_kernels_without_a_fault_pass_every_check(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, and copies of them: it is the fault that is caught, not the copying."""
    assert [check() for check in (plain, every_option, unlabelled)] == [set(), set(), set()]
    built = variant(modules=[triton_kernels])[KERNELS]
    for kernel in (FORWARD, D_LOGITS):
        monkeypatch.setattr(triton_launches, kernel, getattr(built, kernel))
    assert [check() for check in (plain, every_option, unlabelled)] == [set(), set(), set()]
