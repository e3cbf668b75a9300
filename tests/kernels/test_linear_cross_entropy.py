"""Linear cross-entropy: the reference by hand and against torch, every implementation against the reference."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.linear_cross_entropy import labelled, linear_cross_entropy, native_impl, torch_impl
from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.testing.budget import assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean")
IGNORED = -100


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLAIN = ("reference", "torch", "torch, row by row", "torch, in blocks", "torch, on device", "reference, on device")
NATIVE = ("native", "native, row by row", "native, on device")
TRITON = ("triton", "triton, small", "triton, on device", "triton, small, on device")


@pytest.fixture(
    params=TRITON if INTERPRETED else [*PLAIN, *NATIVE, *(pytest.param(way, marks=pytest.mark.gpu) for way in TRITON)]
)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An implementation, each of its ways: plain torch with chunks and with blocks of one row, Triton with small tiles.

    And with rows masked, not gathered. Triton's run where TRITON_INTERPRET=1 is set, in a process of their own, and on
    a GPU.
    """
    way: str = request.param
    reason = unavailable_reason("cpu", torch.float32)
    if way in NATIVE and reason is not None:
        pytest.skip(reason)
    if way.endswith("row by row"):
        monkeypatch.setattr(torch_impl._Run, "chunks", lambda run: _row_by_row(run.hidden))
        monkeypatch.setattr(native_impl, "_chunks", _row_by_row)
    if way.endswith("in blocks"):
        monkeypatch.setattr(torch_impl, "_BLOCK_KIB", 0)
    if way.endswith("on device"):
        monkeypatch.setattr(labelled, "_host_may_read", lambda x: False)
    if "small" in way:
        set_small_tiles(monkeypatch)
    with torch.device("cuda" if way in TRITON and not INTERPRETED else "cpu"):
        yield way.split(",")[0]


def _row_by_row(hidden: torch.Tensor, *_: Any) -> list[slice]:
    rows = hidden.shape[0]
    return [slice(row, min(row + 1, rows)) for row in range(max(rows, 1))]


def set_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and splits of the vocabulary so small that few rows and classes cross many of their edges."""
    from antlm_fast.kernels.linear_cross_entropy import triton_launches
    from antlm_fast.kernels.triton_support.launch import Tile

    tiles = {"forward": Tile(16, 32, 4, 1), "d_logits": Tile(16, 16, 4, 1)}
    monkeypatch.setattr(triton_launches, "tile_for", lambda use, arch: tiles[use.split()[0]])
    monkeypatch.setattr(triton_launches, "_SPLIT_COLS", 64)


# what an implementation computes, and how it says so of the rest
LIMITED = {
    "triton": ((torch.float16, torch.bfloat16, torch.float32), "compute float16, bfloat16 and float32, not"),
    "native": ((torch.bfloat16, torch.float32), "compute float32 and bfloat16, not"),
}


def _serves(impl: str, dtype: torch.dtype) -> bool:
    return impl not in LIMITED or dtype in LIMITED[impl][0]


def _finest(impl: str) -> torch.dtype:
    return torch.float64 if _serves(impl, torch.float64) else torch.float32


def _inputs(rows: int = 13, hidden_size: int = 12, vocab: int = 17, labels: str = "some") -> dict[str, torch.Tensor]:
    # the same numbers on every device
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    targets = torch.randint(vocab, (rows,), generator=generator, device="cpu")
    index = torch.arange(rows, device="cpu")
    labelled_rows = {"none": index < 0, "one": index == rows // 2, "some": index % 3 != 1, "all": index >= 0}[labels]
    inputs = {
        "hidden": torch.randn(rows, hidden_size, **options),
        "weight": torch.randn(vocab, hidden_size, **options),
        "bias": torch.randn(vocab, **options),
        "targets": targets.where(labelled_rows, IGNORED),
        # no two rows alike, and none of them 1
        "upstream": torch.linspace(-2.0, 3.5, rows, dtype=torch.float64),
    }
    return {name: x.to(torch.get_default_device()) for name, x in inputs.items()}


def test_by_hand(impl: str) -> None:
    # hidden 1, weights (0, ln 3): p = (1/4, 3/4), lse = ln 4. Targets 0 and 1: nll ln 4 and ln 4/3; one is ignored
    dtype = _finest(impl)
    rel, close = (1e-12, {}) if dtype == torch.float64 else (1e-6, {"rtol": 1e-6, "atol": 1e-7})
    hidden, targets = torch.ones(3, 1, dtype=dtype, requires_grad=True), torch.tensor([0, 1, IGNORED])
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=dtype, requires_grad=True)
    losses, lse = linear_cross_entropy(hidden, weight, targets, reduction="none", return_lse=True, impl=impl)
    first, second = math.log(4), math.log(4 / 3)
    torch.testing.assert_close(losses.tolist(), [first, second, 0.0], **close)
    torch.testing.assert_close(lse.tolist(), [math.log(4), math.log(4), 0.0], **close)
    # the mean is over two rows. d / d logits: (p - 1 at the target) / 2: (-3/8, 3/8) and (1/8, -1/8), together
    # (-1/4, 1/4), which is the gradient of weight; that of hidden is d logits . weight: 3/8 ln 3 and -1/8 ln 3
    mean = linear_cross_entropy(hidden, weight, targets, impl=impl)
    assert mean.item() == pytest.approx((first + second) / 2, rel=rel)
    d_hidden, d_weight = torch.autograd.grad(mean, (hidden, weight))
    torch.testing.assert_close(d_weight.flatten().tolist(), [-0.25, 0.25], **close)
    torch.testing.assert_close(d_hidden.flatten().tolist(), [3 / 8 * math.log(3), -math.log(3) / 8, 0.0], **close)
    # smoothing 1/2 mixes with the mean of -log p: row 0: (ln 4 + (ln 4 + ln 4/3) / 2) / 2; z-loss adds 0.1 (ln 4)^2
    smooth = linear_cross_entropy(hidden, weight, targets, reduction="none", label_smoothing=0.5, z_loss=0.1, impl=impl)
    assert smooth[0].item() == pytest.approx(first / 2 + (first + second) / 4 + 0.1 * first**2, rel=rel)
    # softcap 1: the logits become 0 and tanh(ln 3) = (3 - 1/3) / (3 + 1/3) = 0.8
    capped = linear_cross_entropy(hidden, weight, targets, reduction="none", softcap=1.0, impl=impl)
    assert capped[0].item() == pytest.approx(math.log(1 + math.exp(0.8)), rel=rel)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("vocab", [1, 7, 517])
def test_equals_torch_cross_entropy(impl: str, reduction: str, smoothing: float, biased: bool, vocab: int) -> None:
    inputs, dtype = _inputs(vocab=vocab), _finest(impl)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    names = ("hidden", "weight", "bias")[: 3 if biased else 2]
    # what the implementation gets, as its dtype holds it
    given = [inputs[name].to(dtype) for name in names]

    def results(kind: torch.dtype, ours: bool) -> list[torch.Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in given]
        bias = leaves[2] if biased else None
        if ours:
            loss = linear_cross_entropy(leaves[0], leaves[1], inputs["targets"], bias=bias, **options, impl=impl)
        else:
            loss = cross_entropy(linear(leaves[0], leaves[1], bias), inputs["targets"], **options)
        upstream = inputs["upstream"].to(kind) if reduction == "none" else torch.tensor(-2.5, dtype=kind)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    found, exact = results(dtype, True), results(torch.float64, False)
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact)
        return
    # a gradient is a sum of classes that cancel: of upstream times a factor
    largest = max(x.abs().max().item() for x in (inputs["upstream"], *given))
    for name, *three in zip(("loss", *names), found, exact, results(dtype, False), strict=True):
        assert_within_budget(name, *three, slack=2.0 if name == "loss" else 3.0, scale=largest)


def _results(inputs: dict[str, torch.Tensor], dtype: torch.dtype, impl: str, **options: Any) -> dict[str, torch.Tensor]:
    leaves = [inputs[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    loss, lse = linear_cross_entropy(
        hidden, weight, inputs["targets"], bias=bias, **options, return_lse=True, impl=impl
    )
    upstream = inputs["upstream"].to(loss.dtype) if loss.dim() else torch.tensor(-2.5, dtype=loss.dtype)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    assert loss.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad
    assert all(gradient.dtype == dtype for gradient in gradients)
    return dict(zip(("loss", "lse", "d_hidden", "d_weight", "d_bias"), (loss.detach(), lse, *gradients), strict=True))


@contextmanager
def _bias_after_rounding() -> Iterator[None]:
    """The reference rounds where the native implementation does: a product's logits, to which it adds the bias."""

    def rounded_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, weight) + bias.float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", rounded_product)
        yield


def _assert_all_within_budget(inputs: dict[str, torch.Tensor], dtype: torch.dtype, impl: str, **options: Any) -> None:
    if not _serves(impl, dtype):
        with pytest.raises(UnsupportedError, match=f"{LIMITED[impl][1]} {str(dtype).removeprefix('torch.')}"):
            _results(inputs, dtype, impl, **options)
        return
    # the exact result is that of the inputs as the dtype holds them
    rounded = {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = _results(rounded, torch.float64, "reference", **options)
    actual = _results(rounded, dtype, impl, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
        return
    with _bias_after_rounding() if impl == "native" else nullcontext():
        eager = _results(rounded, dtype, "reference", **options)
    for name, wanted in exact.items():
        assert_within_budget(name, actual[name], wanted, eager[name], 3.0 if name.startswith("d_") else 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"softcap": 3.0}, {"z_loss": 0.02, "softcap": 5.0}],
    ids=str,
)
def test_matches_reference(impl: str, dtype: torch.dtype, reduction: str, options: dict[str, Any]) -> None:
    _assert_all_within_budget(_inputs(), dtype, impl, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 517])
@pytest.mark.parametrize("labels", ["one", "all"])
def test_vocabularies_and_labels(impl: str, dtype: torch.dtype, vocab: int, labels: str) -> None:
    for reduction in REDUCTIONS:
        _assert_all_within_budget(_inputs(vocab=vocab, labels=labels), dtype, impl, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_label_gives_zero_loss_and_gradients(impl: str, reduction: str, rows: int) -> None:
    results = _results(_inputs(rows, labels="none"), torch.float32, impl, reduction=reduction)
    assert results["loss"].shape == ((rows,) if reduction == "none" else ())
    for name, x in results.items():
        assert torch.equal(x, torch.zeros_like(x)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_near_one_keep_their_gradient(impl: str, dtype: torch.dtype, reduction: str) -> None:
    """p = 0.999 at the target: p - 1 formed in bfloat16 would be 0 or 4 times too large."""
    if not _serves(impl, dtype):
        pytest.skip(f"{impl} does not compute {dtype}")
    hidden = torch.tensor([[1.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[7.0], [0.0]], dtype=dtype, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]), reduction=reduction, impl=impl)
    (d_weight,) = torch.autograd.grad(loss.sum(), weight)
    wanted = -1.0 / (1.0 + math.exp(7.0))
    torch.testing.assert_close(d_weight[0].item(), wanted, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_extreme_logits_stay_finite(impl: str) -> None:
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), reduction="none", impl=impl)
    assert losses.tolist() == [0.0, 2e4]
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(losses.sum(), (hidden, weight)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(impl: str, reduction: str) -> None:
    if _finest(impl) != torch.float64:
        pytest.skip(f"gradcheck needs float64, which {impl} does not compute")
    inputs = _inputs(rows=4, hidden_size=3, vocab=5)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 2.0, "reduction": reduction}
        result = linear_cross_entropy(hidden, weight, inputs["targets"], bias=bias, **options, impl=impl)
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.autograd.gradcheck(loss, leaves)


OPTIONS: dict[str, tuple[Any, Any]] = {
    "bias": (None, torch.linspace(-1, 1, 17)),
    "ignore_index": (IGNORED, 3),
    "reduction": ("mean", "sum"),
    "z_loss": (0.0, 0.1),
    "label_smoothing": (0.0, 0.1),
    "softcap": (None, 2.0),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_every_implementation(impl: str, option: str) -> None:
    inputs = _inputs(labels="all")
    hidden, weight = inputs["hidden"].float().requires_grad_(), inputs["weight"].float()
    targets = torch.tensor([3, 5] * 6 + [3])
    results = []
    for value in OPTIONS[option]:
        value = value.to(hidden.device) if isinstance(value, torch.Tensor) else value
        loss = linear_cross_entropy(hidden, weight, targets, **{option: value}, impl=impl)
        results.append((loss.item(), torch.autograd.grad(loss, hidden)[0]))
    assert abs(results[0][0] - results[1][0]) > 1e-2, f"{impl} ignores {option}"
    assert (results[0][1] - results[1][1]).abs().max() > 1e-4, f"the gradient of {impl} ignores {option}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_is_bitwise_equal(impl: str, reduction: str) -> None:
    inputs = _inputs()
    leaves = [inputs[name].float().requires_grad_() for name in ("hidden", "weight", "bias")]
    loss = linear_cross_entropy(leaves[0], leaves[1], inputs["targets"], bias=leaves[2], reduction=reduction, impl=impl)
    upstream = torch.full_like(loss, 1.5)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_an_unlabelled_row_holds_does_not_matter(impl: str, reduction: str) -> None:
    inputs = _inputs()
    clean = [inputs[name].to(_finest(impl)).requires_grad_() for name in ("hidden", "weight")]
    ignored = (inputs["targets"] == IGNORED)[:, None]
    dirty = clean[0].detach().masked_fill(ignored, 1e3).requires_grad_()
    wanted = linear_cross_entropy(*clean, inputs["targets"], reduction=reduction, impl=impl)
    loss = linear_cross_entropy(dirty, clean[1], inputs["targets"], reduction=reduction, impl=impl)
    assert torch.equal(loss, wanted)
    gradients = torch.autograd.grad(loss.sum(), (dirty, clean[1]))
    for a, b in zip(gradients, torch.autograd.grad(wanted.sum(), clean), strict=True):
        torch.testing.assert_close(a, b)
    assert not gradients[0][ignored.flatten()].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_computes_as_its_dtype_does(impl: str, reduction: str) -> None:
    """Products of bfloat16 inputs, gradients in the inputs' own dtypes; a mixed pair of inputs is accepted."""
    inputs = _inputs()
    leaves = [inputs[name].float().requires_grad_() for name in ("hidden", "weight", "bias")]
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    wanted = linear_cross_entropy(*halves[:2], inputs["targets"], bias=halves[2], reduction=reduction, impl=impl)
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        loss = linear_cross_entropy(*leaves[:2], inputs["targets"], bias=leaves[2], reduction=reduction, impl=impl)
        mixed = linear_cross_entropy(
            halves[0], leaves[1], inputs["targets"], bias=leaves[2], reduction=reduction, impl=impl
        )
        if _finest(impl) == torch.float64:  # which autocast leaves alone
            double = linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["targets"], impl=impl)
            torch.testing.assert_close(
                double, linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["targets"])
            )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wanted)
    assert torch.equal(mixed, wanted)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    for a, b in zip(gradients, torch.autograd.grad(wanted.sum(), halves), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_go_where_they_are_wanted(impl: str, reduction: str) -> None:
    inputs = _inputs()
    plain = {name: inputs[name].to(_finest(impl)) for name in ("hidden", "weight", "bias")}
    leaves = {name: x.clone().requires_grad_() for name, x in plain.items()}
    loss = linear_cross_entropy(**leaves, targets=inputs["targets"], reduction=reduction, impl=impl)
    wanted = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
    for name, leaf in leaves.items():
        others = {other: plain[other] for other in leaves if other != name}
        loss = linear_cross_entropy(**others, **{name: leaf}, targets=inputs["targets"], reduction=reduction, impl=impl)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], wanted[name])
    with torch.no_grad():
        detached = linear_cross_entropy(**leaves, targets=inputs["targets"], reduction=reduction, impl=impl)
    assert torch.equal(detached, loss)
    assert not detached.requires_grad


class _LargestResult(TorchDispatchMode):
    """The most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_never_all_exist(reduction: str) -> None:
    """600 rows by 4096 words; in 1 MiB there is room for 64 rows of float32 logits."""
    hidden, weight = torch.randn(600, 4, requires_grad=True), torch.randn(4096, 4, requires_grad=True)
    with _LargestResult() as largest:
        loss = linear_cross_entropy(
            hidden, weight, torch.arange(600), reduction=reduction, impl="torch", workspace_mib=1
        )
        torch.autograd.grad(loss.sum(), (hidden, weight))
    assert largest.elements == 64 * 4096


def test_labelled_rows_by_hand() -> None:
    some = labelled.labelled_rows(torch.tensor([3, -1, 0, -1]), -1)
    assert some.rows is not None
    assert (some.rows.tolist(), some.counts, some.count) == ([0, 2], None, 2)
    every = labelled.labelled_rows(torch.tensor([3, 0]), -1)
    assert (every.rows, every.counts, every.count) == (None, None, 2)


HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, IGNORED])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN[0]}, ValueError, "hidden must have shape (rows, hidden_size); got (4,)"),
        ({"weight": WEIGHT[:, :3]}, ValueError, "weight must have shape (vocab, 4); got (5, 3)"),
        ({"targets": TARGETS[:2]}, ValueError, "targets must have shape (3,); got (2,)"),
        ({"targets": TARGETS.int()}, TypeError, "targets must be int64; got torch.int32"),
        ({"bias": WEIGHT}, ValueError, "bias must have shape (5,); got (5, 4)"),
        ({"hidden": HIDDEN.int()}, TypeError, "hidden must be float16, bfloat16, float32 or float64; got torch.int32"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have hidden's dtype torch.float32; got torch.float16"),
        ({"bias": WEIGHT[:, 0].half()}, TypeError, "bias must have weight's dtype torch.float32; got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on hidden's device cpu; got meta"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'none', 'sum', 'mean'; got 'max'"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be finite and at least 0; got -1.0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be at least 0 and at most 1; got 1.5"),
        ({"workspace_mib": 0}, ValueError, "workspace_mib must be at least 1; got 0"),
        (
            {"return_lse": True, "return_metrics": True},
            ValueError,
            "return_lse must be False with return_metrics, which holds the lse; got True",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and above 0, or None; got 0.0"),
        ({"targets": TARGETS + 1}, ValueError, "targets must be in [0, 5) or ignore_index -100; got -99"),
        ({"targets": TARGETS[[0, 1, 1]] + 1}, ValueError, "targets must be in [0, 5) or ignore_index -100; got 5"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change})


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_class_that_a_bias_of_minus_infinity_rules_out(impl: str, reduction: str) -> None:
    """It has no probability, and the others are as if it were not there; as a target it costs infinitely much."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    kept = torch.tensor([0, 1, 3, 4, 5])
    bias[2] = -torch.inf
    targets = torch.tensor([0, 1, 3, 5])
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, impl=impl)
    alone = cross_entropy(hidden @ weight[kept].T + bias[kept], torch.tensor([0, 1, 2, 4]), reduction=reduction)
    torch.testing.assert_close(loss, alone)
    ruled_out = linear_cross_entropy(hidden[:1], weight, torch.tensor([2]), bias=bias, reduction=reduction, impl=impl)
    assert ruled_out.max().item() == float("inf")
