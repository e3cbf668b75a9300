"""What must hold of every op in every implementation, whatever surrounds the call: strides, torch's defaults,
transforms, modes, subclasses, second derivatives."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from antlm_fast.kernels.attention import attention, attention_varlen
from antlm_fast.kernels.disentangled_attention import disentangled_attention, disentangled_attention_varlen
from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.fused_layers import add_dropout, add_norm, gated_unit, layer_norm, rotary, rotary_qkv
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.kernels.mixed_linear import mixed_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, I32 = torch.float32, torch.bfloat16, torch.int32
Tensors = dict[str, torch.Tensor]
Result = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A small call of an op.

    Args:
        inputs: makes its tensors, by name.
        call: (impl, tensors) -> its differentiable results.
        impls: those with an implementation.
        composed: those that are made of torch's own differentiable operations.
    """

    inputs: Callable[[], Tensors]
    call: Callable[[str, Tensors], Result]
    impls: tuple[str, ...] = ("native", "torch", "triton", "reference")
    composed: tuple[str, ...] = ("reference",)


def random(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cpu")


def whole(*numbers: int, dtype: torch.dtype = I32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def attention_inputs() -> Tensors:
    return {
        "q": random(2, 5, 2, 8),
        "k": random(2, 7, 1, 8),
        "v": random(2, 7, 1, 8),
        "prefix_len": whole(3, 0),
        "dropout_seed": torch.tensor(5, dtype=torch.int64, device="cpu"),
    }


def packed_inputs() -> Tensors:
    return {
        "q": random(9, 2, 8),
        "k": random(12, 1, 8),
        "v": random(12, 1, 8),
        "cu_seqlens_q": whole(0, 3, 8),
        "cu_seqlens_k": whole(0, 4, 11),
        "prefix_len": whole(0, 6),
    }


def relative_inputs() -> Tensors:
    tables = {"q_rel": random(7, 2, 8), "k_rel": random(7, 2, 8)}
    return {"q": random(2, 6, 2, 8), "k": random(2, 6, 2, 8), "v": random(2, 6, 2, 8), **tables}


def some_rows_inputs() -> Tensors:
    return {
        "q": random(5, 2, 8),
        "k": random(11, 2, 8),
        "v": random(11, 2, 8),
        "q_rel": random(7, 2, 8),
        "k_rel": random(7, 2, 8),
        "cu_seqlens_q": whole(0, 2, 5),
        "cu_seqlens_k": whole(0, 4, 11),
        "positions_q": whole(1, 3, 0, 2, 6),
        "prefix_len": whole(2, 0),
    }


def loss_inputs(dtype: torch.dtype = F32) -> Tensors:
    targets = whole(3, 0, -100, 18, 7, -100, 3, dtype=torch.int64)
    shapes = {"hidden": (7, 16), "weight": (19, 16), "bias": (19,)}
    return {**{name: random(*shape, dtype=dtype) for name, shape in shapes.items()}, "targets": targets}


def call_loss(impl: str, t: Tensors, **options: Any) -> torch.Tensor:
    return linear_cross_entropy(
        t["hidden"], t["weight"], t["targets"], bias=t["bias"], z_loss=0.1, softcap=9.0, impl=impl, **options
    )


def linear_inputs() -> Tensors:
    return {"x": random(6, 8, dtype=BF16), "first": random(5, 8), "second": random(3, 8), "bias": random(5)}


def layer_inputs() -> Tensors:
    return {"x": random(6, 32), "residual": random(6, 32), "weight": random(32), "bias": random(32)}


def rotary_inputs() -> Tensors:
    angles = torch.arange(30, dtype=F32, device="cpu").view(5, 1, 6)
    return {"x": random(5, 4, 6), "cos": angles.cos(), "sin": angles.sin()}


LAYERS: dict[str, Any] = {"impls": ("native", "torch", "reference"), "composed": ("torch", "reference")}
CASES = {
    "attention": Case(attention_inputs, lambda impl, t: attention(**t, dropout_p=0.2, impl=impl)),
    "attention_varlen": Case(
        packed_inputs, lambda impl, t: attention_varlen(**t, max_seqlen_q=5, max_seqlen_k=7, impl=impl)
    ),
    "disentangled_attention": Case(
        relative_inputs, lambda impl, t: disentangled_attention(**t, max_position=5, causal=False, impl=impl)
    ),
    "disentangled_attention_varlen": Case(
        some_rows_inputs,
        lambda impl, t: disentangled_attention_varlen(
            **t, max_seqlen_q=3, max_seqlen_k=7, max_position=5, dropout_p=0.2, dropout_seed=3, impl=impl
        ),
    ),
    "linear_cross_entropy": Case(loss_inputs, lambda impl, t: call_loss(impl, t, label_smoothing=0.1)),
    "linear_cross_entropy of rows": Case(loss_inputs, lambda impl, t: call_loss(impl, t, reduction="none")),
    "linear_cross_entropy in bfloat16": Case(lambda: loss_inputs(BF16), call_loss),
    "mixed_linear": Case(
        linear_inputs,
        lambda impl, t: mixed_linear(t["x"], (t["first"], t["second"]), (t["bias"], None), impl=impl),
        ("native", "torch", "reference"),
    ),
    "add_norm": Case(
        layer_inputs,
        lambda impl, t: add_norm(**t, eps=1e-3, kind="layer", dropout_p=0.2, dropout_seed=2, impl=impl),
        **LAYERS,
    ),
    "layer_norm": Case(
        lambda: {name: x for name, x in layer_inputs().items() if name != "residual"},
        lambda impl, t: layer_norm(**t, eps=1e-3, kind="rms", impl=impl),
        **LAYERS,
    ),
    "add_dropout": Case(
        lambda: {name: x for name, x in layer_inputs().items() if name in ("x", "residual")},
        lambda impl, t: add_dropout(**t, dropout_p=0.2, dropout_seed=2, impl=impl),
        **LAYERS,
    ),
    "gated_unit": Case(
        lambda: {"x": random(6, 32)},
        lambda impl, t: gated_unit(t["x"], activation="gelu", gate_first=True, norm_eps=1e-3, impl=impl),
        **LAYERS,
    ),
    "rotary": Case(rotary_inputs, lambda impl, t: rotary(**t, impl=impl), **LAYERS),
    "rotary_qkv": Case(rotary_inputs, lambda impl, t: rotary_qkv(**t, heads=2, kv_heads=1, impl=impl), **LAYERS),
}
EVERY = [
    pytest.param(name, impl, id=f"{name}-{impl}")
    for name, case in CASES.items()
    for impl in case.impls
    if (impl == "triton") == INTERPRETED
]
every_op = pytest.mark.parametrize(("op", "impl"), EVERY)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes with the size of tiles."""
    if INTERPRETED:
        from antlm_fast.kernels.attention import triton_launches
        from antlm_fast.kernels.triton_support.launch import Tile

        monkeypatch.setattr(triton_launches, "tile_for", lambda use, arch, head_dim: Tile(16, 16, 4, 1))


def inputs_of(op: str) -> Tensors:
    torch.manual_seed(0)
    return CASES[op].inputs()


def differentiable(tensors: Tensors) -> list[str]:
    """The names of those that get a gradient."""
    return [name for name, x in tensors.items() if x.is_floating_point() and name not in ("cos", "sin")]


def results_of(op: str, impl: str, tensors: Tensors, upstream: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """An op's results and its gradients, for upstream(result)."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name in differentiable(tensors)}
    try:
        found = CASES[op].call(impl, {**tensors, **leaves})
    except UnsupportedError as error:
        pytest.skip(str(error))
    several = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(several, list(leaves.values()), [upstream(x) for x in several])
    return [*(x.detach() for x in several), *gradients]


def waves(x: torch.Tensor) -> torch.Tensor:
    """An upstream gradient."""
    return torch.arange(x.numel(), dtype=F32, device="cpu").cos().view(x.shape).to(x.dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second column of a matrix whose others are another number."""
    wide = torch.full((*x.shape, 2), 3, dtype=x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


def apart(names: list[str]) -> list[list[str]]:
    """One at a time; all at once in the interpreter, which is slow."""
    return [names] if INTERPRETED else [[name] for name in names]


@every_op
def test_an_argument_that_is_a_column_of_a_matrix_is_read_where_it_lies(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, waves)
    for names in apart(list(tensors)):
        found = results_of(op, impl, {**tensors, **{name: strided(tensors[name]) for name in names}}, waves)
        for expected, actual in zip(wanted, found, strict=True):
            torch.testing.assert_close(actual, expected, msg=lambda message, names=names: f"{names}: {message}")
    for expected, actual in zip(wanted, results_of(op, impl, tensors, lambda x: strided(waves(x))), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "default",
    [
        pytest.param(torch.float64, id="float64"),
        pytest.param(BF16, id="bfloat16"),
        pytest.param("meta", id="meta"),
    ],
)
@every_op
def test_torchs_default_dtype_and_device_change_nothing(
    op: str, impl: str, default: Any, default_dtype: Callable[..., Any]
) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, waves)
    with torch.device(default) if default == "meta" else default_dtype(default):
        found = results_of(op, impl, tensors, waves)
    for expected, actual in zip(wanted, found, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@every_op
def test_a_second_derivative_is_never_left_out(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, torch.ones_like)

    def penalty(impl: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The gradients of the sum of results, and those of their squares' sum."""
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name in differentiable(tensors)}
        found = CASES[op].call(impl, {**tensors, **leaves})
        several = found if isinstance(found, tuple) else (found,)
        first = torch.autograd.grad([x.sum() for x in several], list(leaves.values()), create_graph=True)
        loss = sum(x.sum() for x in several) + sum(x.square().sum() for x in first)
        return [x.detach() for x in first], list(torch.autograd.grad(loss, list(leaves.values())))

    if impl in CASES[op].composed:
        first, second = penalty(impl)
        for expected, actual in zip(penalty("reference")[1], second, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for expected, actual in zip(wanted[-len(first) :], first, strict=True):
            torch.testing.assert_close(actual, expected)
    else:
        with pytest.raises(UnsupportedError, match="no second derivative, .* impl='reference' has one"):
            penalty(impl)


# torch's own, where it first meets a dual number or a trace
torch_jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@torch_jit_is_deprecated
@every_op
def test_transforms_of_functions_are_followed_or_refused(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    results_of(op, impl, tensors, waves)
    name = differentiable(tensors)[0]
    x = tensors[name]

    def of_first(x: torch.Tensor) -> torch.Tensor:
        found = CASES[op].call(impl, {**tensors, name: x})
        return sum(x.sum() for x in found) if isinstance(found, tuple) else found.sum()

    def forward_mode() -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(of_first(dual)).tangent

    ways = {
        "grad": lambda: torch.func.grad(of_first)(x).float().sum(),
        "jvp": lambda: torch.func.jvp(of_first, (x,), (torch.ones_like(x),))[1],
        "dual numbers": forward_mode,
    }
    leaf = x.detach().requires_grad_()
    reference = CASES[op].call("reference", {**tensors, name: leaf})
    several = reference if isinstance(reference, tuple) else (reference,)
    (gradient,) = torch.autograd.grad([y.sum() for y in several], leaf)
    for way in ways.values():
        if impl in CASES[op].composed or op == "mixed_linear":
            torch.testing.assert_close(way().float(), gradient.float().sum(), rtol=2e-2, atol=1e-3)
        else:
            with pytest.raises(UnsupportedError, match="kernels do not follow (torch.func|forward-mode)"):
                way()


@every_op
def test_a_transform_over_something_else_leaves_the_call_as_it_is(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, waves)[0]

    def scaled(scale: torch.Tensor) -> torch.Tensor:
        found = CASES[op].call(impl, tensors)
        return (found[0] if isinstance(found, tuple) else found) * scale

    scales = torch.arange(3.0)
    if impl == "torch" and op.split("_varlen")[0] in ("attention", "disentangled_attention"):
        with pytest.raises(UnsupportedError, match="runs within no torch.func transform; impl='reference' does"):
            torch.vmap(scaled)(scales)
        return
    torch.testing.assert_close(torch.vmap(scaled)(scales)[2], 2 * wanted)
    gradient = torch.func.grad(lambda scale: scaled(scale).sum())(torch.tensor(2.0))
    torch.testing.assert_close(gradient, wanted.sum().to(gradient.dtype), rtol=1e-2, atol=1e-2)


@every_op
def test_batched_gradients_are_followed_or_refused(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    names = differentiable(tensors)[:1]
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    results_of(op, impl, tensors, waves)
    found = CASES[op].call(impl, {**tensors, **leaves})
    found = found[0] if isinstance(found, tuple) else found
    upstream = [waves(found), torch.ones_like(found)]
    try:
        batched = torch.autograd.grad(
            found, list(leaves.values()), torch.stack(upstream), is_grads_batched=True, retain_graph=True
        )
    except UnsupportedError as error:
        assert "follow no batched gradients; impl='reference' does" in str(error)
        assert impl not in CASES[op].composed
        return
    for place, each in enumerate(upstream):
        (wanted,) = torch.autograd.grad(found, list(leaves.values()), each, retain_graph=True)
        torch.testing.assert_close(batched[0][place], wanted, rtol=2e-2, atol=2e-2)


@torch_jit_is_deprecated
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_op
def test_jit_trace_is_followed_or_refused(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    names = list(tensors)

    def call(*several: torch.Tensor) -> Result:
        return CASES[op].call(impl, dict(zip(names, several, strict=True)))

    if impl in CASES[op].composed or op == "mixed_linear":
        results_of(op, impl, tensors, waves)
        traced = torch.jit.trace(call, tuple(tensors.values()), check_trace=False)
        torch.testing.assert_close(traced(*tensors.values()), call(*tensors.values()))
        return
    with pytest.raises(UnsupportedError, match="kernels do not follow torch.jit.trace"):
        torch.jit.trace(call, tuple(tensors.values()), check_trace=False)


@every_op
def test_a_graph_that_make_fx_records_computes_what_the_call_did(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, waves)
    names = list(tensors)

    def call(*several: torch.Tensor) -> list[Any]:
        return results_of(op, impl, dict(zip(names, several, strict=True)), waves)

    try:
        graph = make_fx(call)(*tensors.values())
    except RuntimeError as error:
        assert "trying to get value out of a tracing tensor" in str(error)  # torch says so: it depends on values
        return
    for expected, actual in zip(wanted, graph(*tensors.values()), strict=True):
        # a graph holds no kept copies of weights, and without them a bias's gradient is a sum in bfloat16
        torch.testing.assert_close(actual, expected, **({"rtol": 1e-2, "atol": 1e-2} if op == "mixed_linear" else {}))


@every_op
def test_fake_tensors_are_never_read_through_a_pointer(op: str, impl: str) -> None:
    wanted = results_of(op, impl, inputs_of(op), waves)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(x) for name, x in inputs_of(op).items()}
        try:
            found = results_of(op, impl, tensors, waves)
        except (DataDependentOutputException, DynamicOutputShapeException):
            found = None  # torch says so: the call depends on values
    if found is not None:
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]
    # nothing fake is left in a table
    for expected, actual in zip(wanted, results_of(op, impl, inputs_of(op), waves), strict=True):
        assert torch.equal(actual, expected)


@every_op
def test_a_wrapper_subclass_gets_the_results_of_its_parts(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, waves)
    name = differentiable(tensors)[0]
    wrapped = TwoTensor(tensors[name], tensors[name].clone())
    try:
        found = CASES[op].call(impl, {**tensors, name: wrapped})
    except (RuntimeError, TypeError) as error:  # torch's own refusal of a mix, never a crash
        assert str(error)
        return
    several = found if isinstance(found, tuple) else (found,)
    for expected, actual in zip(wanted, several, strict=False):
        for part in (actual.a, actual.b) if isinstance(actual, TwoTensor) else (actual,):
            torch.testing.assert_close(part, expected)


@every_op
def test_a_view_that_negates_is_read_negated(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    wanted = results_of(op, impl, tensors, waves)
    for names in apart(differentiable(tensors)):
        negated = {name: torch._neg_view(-tensors[name]) for name in names}
        found = results_of(op, impl, {**tensors, **negated}, waves)
        # a weight that is no plain memory is not rounded once, but in torch's own product
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if op == "mixed_linear" else {}
        for expected, actual in zip(wanted, found, strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)


@every_op
def test_a_sparse_argument_is_refused_by_its_name(op: str, impl: str) -> None:
    tensors = inputs_of(op)
    name = differentiable(tensors)[0]
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor; got layout torch.sparse_coo"):
        CASES[op].call(impl, {**tensors, name: tensors[name].to_sparse()})
