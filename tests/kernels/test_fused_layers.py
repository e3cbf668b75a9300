"""The fused layers: the reference against numbers worked by hand, and every implementation against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from antlm_fast.kernels.fused_layers import (
    add_dropout,
    add_norm,
    gated_unit,
    layer_norm,
    native_impl,
    native_norm,
    native_rotary,
    rotary,
    rotary_qkv,
)
from antlm_fast.kernels.native.build import FOLDER, LIBRARY
from antlm_fast.kernels.native.library import INSTRUCTION_SETS, Library, library, unavailable_reason
from antlm_fast.kernels.philox import keep_elements, philox
from antlm_fast.testing.budget import assert_within_budget

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
NATIVE = [f"native {instruction_set}" for instruction_set in INSTRUCTION_SETS]
ROWS, COLUMNS = (0, 1, 3), (1, 5, 16, 17, 384, 1023)
# the last has blocks of rows of different sizes
SHAPES = [*((rows, columns) for rows in ROWS for columns in COLUMNS), (131, 70)]


@pytest.fixture(params=["reference", "torch", *NATIVE])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every implementation, the native one with every instruction set that is there."""
    name, *instruction_sets = request.param.split()
    if not instruction_sets:
        yield name
        return
    use_native(monkeypatch, *instruction_sets)
    yield name
    Library(FOLDER / LIBRARY, library().instruction_set)  # what the processor has is chosen for the whole process


@pytest.fixture
def native() -> None:
    if reason := unavailable_reason("cpu", F32):
        pytest.skip(reason)


def use_native(monkeypatch: pytest.MonkeyPatch, instruction_set: str) -> None:
    if reason := unavailable_reason("cpu", F32):
        pytest.skip(reason)
    if instruction_set not in library().available:
        pytest.skip(f"no {instruction_set} here")
    chosen = Library(FOLDER / LIBRARY, instruction_set)
    for module in (native_impl, native_norm, native_rotary):
        monkeypatch.setattr(module, "library", lambda: chosen)


def widest(impl: str) -> torch.dtype:
    return F32 if impl == "native" else F64


def assert_is(actual: torch.Tensor, *values: float) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(values, dtype=actual.dtype))


# by hand


def test_sum_and_root_mean_square_by_hand(impl: str) -> None:
    x, residual, weight, bias = (
        torch.tensor(values, dtype=widest(impl), requires_grad=True)
        for values in ([[3.0, 0.0]], [[0.0, 4.0]], [2.0, 4.0], [1.0, -1.0])
    )
    # total (3, 4): the mean square is 12.5, with eps 16, whose root is 4
    total, normed = add_norm(x, residual, weight=weight, bias=bias, eps=3.5, kind="rms", impl=impl)
    assert_is(total, 3, 4)
    assert_is(normed, 2 * 0.75 + 1, 4 * 1 - 1)
    # normed_0 / 2 = t_0 / s: d / dt_0 = 1/4 - 3 * 3 / (2 * 64), d / dt_1 = -3 * 4 / (2 * 64); and total_1 adds 1
    d_x, d_residual, d_weight, d_bias = torch.autograd.grad(normed[0, 0] / 2 + total[0, 1], (x, residual, weight, bias))
    assert_is(d_x, 0.1796875, 1 - 0.09375)
    assert_is(d_residual, 0.1796875, 1 - 0.09375)
    assert_is(d_weight, 0.75 / 2, 0)
    assert_is(d_bias, 0.5, 0)


def test_layer_norm_by_hand(impl: str) -> None:
    x = torch.tensor([[2.0, 6.0]], dtype=widest(impl), requires_grad=True)
    # mean 4, variance 4, with eps 9: (-2, 2) / 3
    normed = layer_norm(x, eps=5.0, impl=impl)
    assert_is(normed, -2 / 3, 2 / 3)
    assert_is(layer_norm(x, eps=5.0, weight=torch.tensor([3.0, 6.0], dtype=x.dtype), impl=impl), -2, 4)
    # d normed_0 / dx_0 = (1/2) / 3 - (-2) * (-2) / (2 * 27)
    (d_x,) = torch.autograd.grad(normed[0, 0], x)
    assert_is(d_x, 1 / 6 - 2 / 27, -1 / 6 + 2 / 27)


@pytest.mark.parametrize(
    ("activation", "gate", "value"),
    [
        ("silu", math.log(3), 0.75 * math.log(3)),
        ("silu", -100.0, 0.0),
        ("gelu", 1.0, 0.8413447460685429),  # of the normal distribution's table
        ("gelu", -1.0, 0.8413447460685429 - 1.0),
        ("gelu_tanh", 1.0, 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))),
        ("gelu_tanh", 60.0, 60.0),
    ],
)
@pytest.mark.parametrize("gate_first", [True, False])
def test_gated_unit_by_hand(impl: str, activation: str, gate: float, value: float, gate_first: bool) -> None:
    gates, values = [gate, gate], [2.0, -4.0]
    x = torch.tensor([gates + values if gate_first else values + gates], dtype=widest(impl))
    assert_is(gated_unit(x, activation=activation, gate_first=gate_first, impl=impl), 2 * value, -4 * value)


def test_gated_unit_with_norm_by_hand(impl: str) -> None:
    gate = math.log(3)
    one = 1 / (0.75 * gate)
    x = torch.tensor([[gate, gate, one, 3 * one]], dtype=widest(impl))
    # products (1, 3): mean 2, variance 1, with eps 4
    assert_is(gated_unit(x, activation="silu", gate_first=True, norm_eps=3.0, impl=impl), -0.5, 0.5)


def test_rotary_by_hand(impl: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=widest(impl)).view(1, 1, 4).requires_grad_()
    # the first plane turns by 90 degrees, the second not at all
    cos, sin = (torch.tensor(values).view(1, 1, 4) for values in ([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]))
    out = rotary(x, cos, sin, impl=impl)
    assert_is(out, -3, 2, 1, 4)
    (d_x,) = torch.autograd.grad((out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), x)
    assert_is(d_x, 3, 2, -1, 4)
    q, k, v = rotary_qkv(x.expand(1, 4, 4), cos, sin, heads=2, kv_heads=1, impl=impl)
    assert_is(q, -3, 2, 1, 4, -3, 2, 1, 4)
    assert_is(k, -3, 2, 1, 4)
    assert_is(v, 1, 2, 3, 4)


def test_a_dropped_element_is_the_one_whose_word_is_small() -> None:
    seed = torch.tensor(-3)
    kept = keep_elements(seed, 3, 150, 0.4)
    for row, column in ((0, 0), (0, 15), (1, 16), (2, 63), (2, 64), (1, 149)):
        counter = [torch.tensor(word) for word in (column // 64 * 16 + column % 16, row, 0, 1)]
        word = philox(seed, *counter)[column // 16 % 4]
        assert kept[row, column].item() == (word.item() >= int(0.4 * 2**32))
    assert 0.5 < kept.double().mean().item() < 0.7


# within the budget

Call = Callable[..., tuple[torch.Tensor, ...]]


def results(call: Call, tensors: list[torch.Tensor], upstream: list[torch.Tensor], impl: str, **options: Any):  # type: ignore[no-untyped-def]
    """Outputs and the gradients of every input."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    outs = call(*leaves, impl=impl, **options)
    gradients = torch.autograd.grad(outs, leaves, [u.to(out.dtype) for u, out in zip(upstream, outs, strict=True)])
    return [out.detach() for out in outs], gradients


def assert_all_within_budget(
    call: Call,
    tensors: list[torch.Tensor],
    out_dtypes: list[torch.dtype],
    impl: str,
    factor: float = 1.0,
    **options: Any,
) -> None:
    """call(*tensors, impl=, out_dtype=, **options) against the reference in float64 and in its own dtypes.

    factor: what the upstream gradient is multiplied by in the terms that a gradient is made of.
    """
    wide = [x.double() for x in tensors]
    shapes = [out.shape for out in call(*wide, impl="reference", out_dtype=F64, **options)]
    torch.manual_seed(1)
    upstream = [torch.randn(shape).to(dtype).double() for shape, dtype in zip(shapes, out_dtypes, strict=True)]
    exact = results(call, wide, upstream, "reference", out_dtype=F64, **options)
    eager, actual = (
        results(call, tensors, upstream, each, out_dtype=out_dtypes[-1], **options) for each in ("reference", impl)
    )
    assert [out.dtype for out in actual[0]] == out_dtypes
    assert [gradient.dtype for gradient in actual[1]] == [x.dtype for x in tensors]
    # terms that cancel are of the upstream gradient's size, or a factor larger; a norm of one column is a constant,
    # whose gradient is made of nothing else, over a standard deviation that is nothing but eps
    scale = factor * max((u.abs().max().item() for u in upstream if u.numel()), default=0.0)
    eps = options.get("eps") or options.get("norm_eps")
    if eps is not None and shapes[-1][-1] == 1:
        scale /= math.sqrt(eps)
    for kind, slack in ((0, 2.0), (1, 3.0)):
        for number, wanted in enumerate(exact[kind]):
            name = f"{('output', 'gradient')[kind]} {number}, {tuple(shapes[-1])}"
            assert_within_budget(
                name, actual[kind][number], wanted, eager[kind][number], slack, scale=scale if kind else 0.0
            )


def call_add_norm(x, residual, weight=None, bias=None, **options):  # type: ignore[no-untyped-def]
    return add_norm(x, residual, weight=weight, bias=bias, **options)


def call_layer_norm(x, weight=None, bias=None, **options):  # type: ignore[no-untyped-def]
    return (layer_norm(x, weight=weight, bias=bias, **options),)


def call_add_dropout(x, residual, *, out_dtype, **options):  # type: ignore[no-untyped-def]
    return (add_dropout(x, residual, **options),)


def call_gated_unit(x, **options):  # type: ignore[no-untyped-def]
    return (gated_unit(x, **options),)


def drawn(*shapes_and_dtypes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape, dtype in shapes_and_dtypes]


# (x, residual, normed)
MIXES = [(F32, F32, F32), (BF16, F32, BF16), (BF16, F32, F32), (BF16, BF16, BF16), (F32, F32, BF16)]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_add_norm_matches_reference(impl: str, kind: str, dtypes: tuple[Any, ...]) -> None:
    x_dtype, residual_dtype, out_dtype = dtypes
    options = {"eps": 1e-5, "kind": kind, "dropout_p": 0.25, "dropout_seed": 5}
    for shape in SHAPES:
        tensors = drawn((shape, x_dtype), (shape, residual_dtype), (shape[1:], F32), (shape[1:], F32))
        assert_all_within_budget(call_add_norm, tensors, [residual_dtype, out_dtype], impl, **options)
        # without dropout and bias, and without a weight
        for count in (3, 2):
            outs = [residual_dtype, out_dtype]
            assert_all_within_budget(call_add_norm, tensors[:count], outs, impl, eps=1e-3, kind=kind)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_layer_norm_matches_reference(impl: str, kind: str, dtypes: tuple[Any, ...]) -> None:
    for shape in SHAPES:
        tensors = drawn((shape, dtypes[0]), (shape[1:], F32), (shape[1:], F32))
        for count in (1, 2, 3):
            assert_all_within_budget(call_layer_norm, tensors[:count], [dtypes[1]], impl, eps=1e-5, kind=kind)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
def test_add_dropout_matches_reference(impl: str, dtypes: tuple[Any, ...]) -> None:
    for shape in SHAPES:
        tensors = drawn((shape, dtypes[0]), (shape, dtypes[1]))
        assert_all_within_budget(call_add_dropout, tensors, [dtypes[1]], impl, dropout_p=0.3, dropout_seed=2)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_gated_unit_matches_reference(
    impl: str, norm_eps: float | None, activation: str, dtypes: tuple[Any, ...]
) -> None:
    for number, (rows, columns) in enumerate(SHAPES):
        tensors = [3 * x for x in drawn(((rows, 2 * columns), dtypes[0]))]
        options = {"activation": activation, "gate_first": number % 2 == 0, "norm_eps": norm_eps}
        # each half's gradient is a sum of terms that the other half multiplies
        largest = max((x.abs().max().item() for x in tensors if x.numel()), default=1.0)
        assert_all_within_budget(call_gated_unit, tensors, [dtypes[1]], impl, largest, **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 2), (3, 6, 10), (5, 3, 32), (37, 9, 64), (2, 12, 74)], ids=str)
def test_rotary_matches_reference(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, heads, head_dim = shape
    # two independent halves of the tables: a rotation is the special case
    x, cos, sin = drawn((shape, dtype), ((tokens, 1, head_dim), F32), ((tokens, 1, head_dim), F32))
    assert_all_within_budget(lambda x, *, out_dtype, impl: (rotary(x, cos, sin, impl=impl),), [x], [dtype], impl)
    for kv_heads in {heads // 3, heads // 2} - {0}:
        counts = {"heads": heads - 2 * kv_heads, "kv_heads": kv_heads}
        assert_all_within_budget(
            lambda x, *, out_dtype, impl, counts=counts: rotary_qkv(x, cos, sin, **counts, impl=impl),
            [x],
            [dtype] * 3,
            impl,
        )


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradcheck(kind: str) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 6, dtype=F64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(6, dtype=F64, requires_grad=True) for _ in range(2))
    cos, sin = torch.randn(3, 1, 2), torch.randn(3, 1, 2)
    for impl in ("reference", "torch"):
        options = {"eps": 1e-3, "kind": kind, "dropout_p": 0.3, "dropout_seed": 1, "impl": impl}
        assert torch.autograd.gradcheck(
            lambda *t, options=options: call_add_norm(*t, **options), (x, residual, weight, bias)
        )
        for activation in ("silu", "gelu", "gelu_tanh"):
            options = {"activation": activation, "gate_first": kind == "rms", "norm_eps": 1e-2, "impl": impl}
            assert torch.autograd.gradcheck(lambda t, options=options: gated_unit(t, **options), (x,))
        assert torch.autograd.gradcheck(lambda t, impl=impl: rotary(t.view(3, 3, 2), cos, sin, impl=impl), (x,))


# options

ADD_NORM = {"eps": 1e-3, "kind": "rms", "dropout_p": 0.5, "dropout_seed": 1, "weight": None, "out_dtype": None}
ADD_NORM_OPTIONS: dict[str, Any] = {
    "eps": 0.1,
    "kind": "layer",
    "dropout_p": 0.25,
    "dropout_seed": 2**40 + 1,
    "weight": torch.linspace(1, 2, 40),
    "out_dtype": BF16,
}
GATED = {"activation": "silu", "gate_first": True, "norm_eps": None, "out_dtype": None}
GATED_OPTIONS: dict[str, Any] = {"activation": "gelu", "gate_first": False, "norm_eps": 1e-3, "out_dtype": BF16}


@pytest.mark.parametrize("option", ADD_NORM_OPTIONS)
def test_every_option_of_add_norm_reaches_every_implementation(impl: str, option: str) -> None:
    x, residual = drawn(((4, 40), F32), ((4, 40), F32))
    _, before = add_norm(x, residual, **ADD_NORM, impl=impl)
    _, after = add_norm(x, residual, **ADD_NORM | {option: ADD_NORM_OPTIONS[option]}, impl=impl)
    assert (before - after).abs().max() > 1e-4
    if option in ("eps", "kind", "weight", "out_dtype"):
        options = {name: ADD_NORM[name] for name in ("eps", "kind", "weight", "out_dtype")}
        before = layer_norm(x, **options, impl=impl)
        after = layer_norm(x, **options | {option: ADD_NORM_OPTIONS[option]}, impl=impl)
        assert (before - after).abs().max() > 1e-4
    else:
        options = {name: ADD_NORM[name] for name in ("dropout_p", "dropout_seed")}
        before = add_dropout(x, residual, **options, impl=impl)
        after = add_dropout(x, residual, **options | {option: ADD_NORM_OPTIONS[option]}, impl=impl)
        assert (before - after).abs().max() > 1e-4


def test_bias_and_residual_reach_every_implementation(impl: str) -> None:
    x, residual, weight, bias = drawn(((4, 40), F32), ((4, 40), F32), ((40,), F32), ((40,), F32))
    _, plain = add_norm(x, residual, weight=weight, eps=1e-3, impl=impl)
    _, biased = add_norm(x, residual, weight=weight, bias=bias, eps=1e-3, impl=impl)
    torch.testing.assert_close(biased - plain, bias.expand(4, 40), rtol=1e-5, atol=1e-6)
    alone = add_norm(x, None, eps=1e-3, impl=impl)
    assert torch.equal(alone[0], x)
    assert torch.equal(alone[1], layer_norm(x, eps=1e-3, kind="rms", impl=impl))
    dropped, _ = add_norm(x, None, eps=1e-3, dropout_p=0.5, dropout_seed=3, impl=impl)
    assert torch.equal(dropped, add_dropout(x, dropout_p=0.5, dropout_seed=3, impl=impl))
    summed = add_dropout(x, residual, dropout_p=0.5, dropout_seed=3, impl=impl)
    torch.testing.assert_close(summed, dropped + residual)
    assert torch.equal(add_dropout(x, residual, dropout_p=0.0, impl=impl), x + residual)


@pytest.mark.parametrize("option", GATED_OPTIONS)
def test_every_option_of_gated_unit_reaches_every_implementation(impl: str, option: str) -> None:
    (x,) = drawn(((4, 80), F32))
    before, after = (
        gated_unit(x, **options, impl=impl) for options in (GATED, GATED | {option: GATED_OPTIONS[option]})
    )
    assert (before - after).abs().max() > 1e-4


# dropout


@pytest.mark.parametrize("columns", [3, 64, 150])
@pytest.mark.parametrize("seed", [0, -7, 2**62 + 5])
def test_every_implementation_drops_the_same_elements(impl: str, seed: int, columns: int) -> None:
    kept = keep_elements(torch.tensor(seed), 33, columns, 0.3)
    for dtype in (F32, BF16):
        x = torch.ones(33, columns, dtype=dtype, requires_grad=True)
        out = add_dropout(x, dropout_p=0.3, dropout_seed=torch.tensor(seed), impl=impl)
        expected = (kept / 0.7).to(dtype)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
        (d_x,) = torch.autograd.grad(out.sum(), x)  # the mask is formed again
        torch.testing.assert_close(d_x, expected, rtol=1e-6, atol=0)
        total, _ = add_norm(x, eps=1e-3, dropout_p=0.3, dropout_seed=seed, impl=impl)
        assert torch.equal(total, out)


def test_without_a_seed_dropout_draws_from_torchs_generator(impl: str) -> None:
    x = torch.ones(50, 70)
    drops = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drops += [add_dropout(x, dropout_p=0.4, impl=impl), add_norm(x, eps=1.0, dropout_p=0.4, impl=impl)[0]]
    first, second, again, _, other, _ = drops
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    for drop in drops:
        assert 0.55 < (drop != 0).double().mean().item() < 0.65
        torch.testing.assert_close(drop[drop != 0], torch.full_like(drop[drop != 0], 1 / 0.6))


# properties


def test_strided_inputs_are_read_where_they_lie(impl: str) -> None:
    wide, table = drawn(((12, 5, 48), F32), ((12, 2, 40), F32))
    x, residual = wide[:, 1, ::2], wide[:, 3, 1::2]
    for kind in ("rms", "layer"):
        got = add_norm(x, residual, eps=1e-3, kind=kind, impl=impl)
        expected = add_norm(x.contiguous(), residual.contiguous(), eps=1e-3, kind=kind, impl=impl)
        assert all(map(torch.equal, got, expected))
    gated = [gated_unit(each, activation="silu", gate_first=True, impl=impl) for each in (x, x.contiguous())]
    assert torch.equal(*gated)
    cos, sin = table[:, :1], table[:, 1:]
    for view in (wide[:, 1:4, 8:], wide[:, ::2, 3:43], wide.transpose(0, 1)[:, :, :40].transpose(0, 1)):
        assert torch.equal(rotary(view, cos, sin, impl=impl), rotary(view.contiguous(), cos, sin, impl=impl))
        upstream = torch.randn(12, 48, view.shape[1]).transpose(1, 2)[:, :, 8:]
        gradients = []
        for each in (upstream, upstream.contiguous()):
            leaf = view.clone().requires_grad_()
            gradients += torch.autograd.grad(rotary(leaf, cos, sin, impl=impl), leaf, each)
        assert torch.equal(*gradients)


def test_a_projection_that_is_used_up_gives_the_same(impl: str) -> None:
    wide, table = drawn(((12, 9, 16), BF16), ((12, 2, 16), F32))
    tables = (table[:, :1], table[:, 1:])
    found = []
    for overwrite in (False, True):
        leaf = wide.clone().requires_grad_()
        parts = rotary_qkv(leaf * 2, *tables, heads=5, kv_heads=2, overwrite=overwrite, impl=impl)
        found.append((*parts, *torch.autograd.grad([x * x.detach() for x in parts], leaf, [x.detach() for x in parts])))
    assert all(map(torch.equal, *found))
    kept = wide.clone()
    rotary_qkv(kept, *tables, heads=5, kv_heads=2, impl=impl)
    assert torch.equal(kept, wide)


@pytest.mark.usefixtures("native")
def test_a_graph_that_needs_what_was_used_up_says_so() -> None:
    wide, table = drawn(((12, 9, 16), BF16), ((12, 2, 16), F32))
    product = wide.requires_grad_().exp()  # its gradient needs its values
    q, _, _ = rotary_qkv(product, table[:, :1], table[:, 1:], heads=5, kv_heads=2, overwrite=True, impl="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_any_number_of_leading_axes(impl: str) -> None:
    x, residual = drawn(((2, 3, 10), F32), ((2, 3, 10), F32))
    for got, flat in zip(
        add_norm(x, residual, eps=1e-3, impl=impl),
        add_norm(x.view(6, 10), residual.view(6, 10), eps=1e-3, impl=impl),
        strict=True,
    ):
        assert torch.equal(got, flat.view(2, 3, 10))
    assert gated_unit(x, activation="silu", gate_first=True, impl=impl).shape == (2, 3, 5)
    assert layer_norm(x[0, 0], eps=1e-3, impl=impl).shape == (10,)


def test_backward_twice_is_bitwise_equal_for_any_number_of_threads(impl: str) -> None:
    tensors = drawn(((300, 70), BF16), ((300, 70), F32), ((70,), F32), ((70,), F32))
    leaves = [x.requires_grad_() for x in tensors]
    found = []
    before = torch.get_num_threads()
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        total, normed = call_add_norm(*leaves, eps=1e-3, dropout_p=0.2, dropout_seed=1, out_dtype=BF16, impl=impl)
        gated = gated_unit(normed, activation="gelu", gate_first=True, norm_eps=1e-3, impl=impl)
        found.append((total, normed, *torch.autograd.grad((gated.sum() + total.square().sum()), leaves)))
    torch.set_num_threads(before)
    for others in found[1:] if impl == "native" else found[1:2]:
        assert all(map(torch.equal, found[0], others))


def test_an_output_that_is_not_used_adds_nothing(impl: str) -> None:
    tensors = drawn(((9, 20), BF16), ((9, 20), F32), ((20,), F32))
    x, residual, weight = (each.requires_grad_() for each in tensors)
    total, normed = add_norm(x, residual, weight=weight, eps=1e-3, impl=impl)
    d_x, d_residual = torch.autograd.grad(total.sum(), (x, residual), retain_graph=True)
    assert torch.equal(d_x, torch.ones_like(x))
    assert torch.equal(d_residual, torch.ones_like(residual))
    (d_weight,) = torch.autograd.grad(total.sum(), weight, retain_graph=True, allow_unused=True, materialize_grads=True)
    assert not d_weight.any()
    both = torch.autograd.grad(total.sum() + normed.sum(), (x, residual, weight), retain_graph=True)
    alone = torch.autograd.grad(normed.sum(), (x, residual, weight))
    torch.testing.assert_close(both[1], alone[1] + 1)
    torch.testing.assert_close(both[2], alone[2])


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_one_gradient_alone_is_what_it_is_among_all(impl: str, wanted: str) -> None:
    names = ("x", "residual", "weight", "bias")
    tensors = dict(zip(names, drawn(((9, 20), BF16), ((9, 20), F32), ((20,), F32), ((20,), F32)), strict=True))

    def gradient(leaves: tuple[str, ...]) -> torch.Tensor:
        held = {name: x.clone().requires_grad_(name in leaves) for name, x in tensors.items()}
        total, normed = call_add_norm(*held.values(), eps=1e-3, kind="layer", impl=impl)
        upstream = torch.linspace(0, 1, 20)
        return torch.autograd.grad((normed * upstream + total).sum(), held[wanted])[0]

    assert torch.equal(gradient((wanted,)), gradient(names))


def test_parameters_of_another_dtype_get_gradients_in_theirs(impl: str) -> None:
    tensors = drawn(((9, 20), BF16), ((9, 20), BF16), ((20,), BF16), ((20,), BF16))
    options = {"eps": 1e-3, "kind": "layer", "dropout_p": 0.1, "dropout_seed": 4}
    assert_all_within_budget(call_add_norm, tensors, [BF16, BF16], impl, **options)


def test_autocast_changes_nothing(impl: str) -> None:
    x, cos, sin = drawn(((6, 4, 10), F32), ((6, 1, 10), F32), ((6, 1, 10), F32))
    weight = torch.linspace(1, 2, 10)

    def outs() -> list[torch.Tensor]:
        normed = add_norm(x, x, weight=weight, eps=1e-3, dropout_p=0.2, dropout_seed=1, impl=impl)
        gated = (gated_unit(x, activation=each, gate_first=True, impl=impl) for each in ("silu", "gelu", "gelu_tanh"))
        return [*normed, *gated, rotary(x, cos, sin, impl=impl), layer_norm(x, eps=1e-3, impl=impl)]

    plain = outs()
    with torch.autocast("cpu", BF16):
        assert all(map(torch.equal, plain, outs()))


def test_numbers_that_are_not_finite_stay_so(impl: str) -> None:
    x = torch.tensor([[math.nan, 1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 3.0]])
    for out in (
        *add_norm(x, x, eps=1e-3, impl=impl),
        *(gated_unit(x, activation=each, gate_first=True, impl=impl) for each in ("silu", "gelu", "gelu_tanh")),
    ):
        assert out[0].isnan().any()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_large_gates_give_no_nan(impl: str, activation: str) -> None:
    gates = torch.tensor([-1e4, -300.0, -90.0, -20.0, 20.0, 90.0, 300.0, 1e4])
    x = torch.cat((gates, torch.ones(8)))[None].requires_grad_()
    out = gated_unit(x, activation=activation, gate_first=True, impl=impl)
    torch.testing.assert_close(out[0], gates.clamp(min=0), rtol=1e-6, atol=1e-6)
    (d_x,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(d_x[0, :8], (gates > 0).float(), rtol=1e-6, atol=1e-6)
