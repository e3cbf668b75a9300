"""The Triton attention ops as torch sees them: op contracts, torch.compile, checkpointing, and tensors without data."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from antlm_fast.kernels.attention import attention, attention_varlen
from antlm_fast.kernels.dispatch import UnsupportedError

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on the CPU only under TRITON_INTERPRET=1", allow_module_level=True)

from antlm_fast.kernels.attention import triton_impl

LENGTHS = (9, 7)
TOTAL = sum(LENGTHS) + 2
MIXED = torch.tensor([True, False])
BACKENDS = ("eager", "aot_eager")
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def _inputs(total: int = TOTAL, heads: int = 1, kv_heads: int = 1, grad: bool = True) -> Tensors:
    torch.manual_seed(2)
    return tuple(torch.randn(total, n, 16, requires_grad=grad) for n in (heads, kv_heads, kv_heads))


def _starts(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flag: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (2, 9)) for x in (q, k, v))
    return attention(q, k, v, causal=flag, **{"impl": "triton", **options}).flatten(0, 1)


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flag: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention_varlen(q, k, v, _starts(), _starts(), 9, 12, causal=flag, **{"impl": "triton", **options})


def _results(op: Callable[..., torch.Tensor], inputs: Tensors, *rest: Any, **options: Any) -> Tensors:
    out = op(*inputs, *rest, **options)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), inputs))


def _assert_equal(actual: Tensors, wanted: Tensors) -> None:
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), actual, wanted, strict=True):
        assert torch.equal(a, b), f"{name} differs by up to {(a - b).abs().max():.1e}"


def _op_arguments(dropout_p: float, case: str) -> tuple[Any, ...]:
    """The forward op's.

    "views": q, k and v are slices of one tensor, one flag for all sequences, strides of its own. "relative": with both
    relative terms, in 4 buckets.
    """
    q, k, v = (x.detach() for x in _inputs(heads=2, kv_heads=1 if case == "grouped" else 2))
    prefix = torch.tensor([3, 2**31 - 1], dtype=torch.int32)
    if case == "views":
        q, k, v = torch.stack((q, k, v), 1).unbind(1)
        prefix = prefix[:1].expand(2)
    terms = (torch.randn(2, TOTAL, 16), torch.randn(2, TOTAL, 16)) if case == "relative" else (None, None)
    sizes = (4, 6) if case == "relative" else (0, 0)
    seed = torch.tensor(11) if dropout_p else None
    return q, k, v, _starts(), _starts(), prefix, seed, *terms, *sizes, 0.25, dropout_p, 9, 9, True


OPS = ("forward_op", "delta_op", "backward_q_op", "backward_kv_op")


CASES = ("grouped", "views", "relative")


def _arguments_of(op: str, dropout_p: float, case: str) -> tuple[Any, ...]:
    arguments = _op_arguments(dropout_p, case)
    if op == "forward_op":
        return arguments
    out, log2_sums = triton_impl.forward_op(*arguments)
    d_out = torch.randn_like(out)
    return (out, d_out) if op == "delta_op" else (d_out, log2_sums, triton_impl.delta_op(out, d_out), *arguments)


def _wanting_gradients(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dropout_p: float, case: str) -> None:
    """Schema, autograd registration, fake tensors and tracing; the gradient ops have no gradients of their own."""
    arguments, tested = _arguments_of(op, dropout_p, case), getattr(triton_impl, op)
    if op == "forward_op":
        arguments = _wanting_gradients(arguments)
    else:  # tracing would differentiate them
        passed = torch.library.opcheck(tested, _wanting_gradients(arguments), test_utils="test_autograd_registration")
        assert passed == {"test_autograd_registration": "SUCCESS"}
    passed = torch.library.opcheck(tested, arguments)
    assert list(passed.values()) == ["SUCCESS"] * 4


def test_a_second_derivative_is_refused() -> None:
    inputs = _inputs()
    out = _packed(*inputs, torch.tensor(True))
    with pytest.raises(UnsupportedError, match="attention: this implementation has no second derivative"):
        torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)


@pytest.mark.parametrize("dropout", ["none", "seed given", "seed drawn"])
@pytest.mark.parametrize("op", [_dense, _packed])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_the_eager_one_bit_for_bit(
    backend: str, op: Callable[..., torch.Tensor], dropout: str
) -> None:
    options: dict[str, Any] = {} if dropout == "none" else {"dropout_p": 0.3}
    if dropout == "seed given":
        options["dropout_seed"] = torch.tensor(5)
    flag, inputs = MIXED, _inputs()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    # one seed cannot serve to compare a drawn one: aot_eager may draw while it traces
    drawn = dropout == "seed drawn" and backend == "aot_eager"
    if drawn:
        compiled(*inputs, flag, **options)
    torch.manual_seed(3)
    wanted = _results(op, inputs, flag, **options)
    torch.manual_seed(3)
    _assert_equal(_results(compiled, inputs, flag, **options), wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", [_dense, _packed])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flags_flipped_in_place_reach_one_graph(backend: str, op: Callable[..., torch.Tensor]) -> None:
    flag, inputs = torch.ones(2, dtype=torch.bool), _inputs()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    results = []
    for values in ((1, 1), (0, 0), (1, 0), (0, 1), (1, 1)):
        flag.copy_(torch.tensor(values))
        results.append(_results(compiled, inputs, flag))
        _assert_equal(results[-1], _results(op, inputs, flag.clone()))
    assert counter.frame_count == 1
    _assert_equal(results[4], results[0])
    for earlier, later in ((0, 1), (1, 2), (2, 3)):
        for a, b in zip(results[earlier], results[later], strict=True):
            assert (a - b).abs().max() > 1e-2, "a flip changed nothing"


def test_batches_of_other_lengths_reach_one_graph() -> None:
    """With dynamic shapes: totals, lengths, the longest sequence and a seed that is an int are data as well."""

    def step(q: Any, k: Any, v: Any, starts: Any, longest: int, flag: Any, seed: int) -> torch.Tensor:
        options = {"causal": flag, "dropout_p": 0.2, "dropout_seed": seed, "impl": "triton"}
        return attention_varlen(q, k, v, starts, starts, longest, longest, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for seed, lengths in enumerate([(7, 20), (23, 4), (0, 31)], start=3):
        inputs = _inputs(sum(lengths) + seed)
        rest = (_starts(lengths), max(lengths), MIXED, seed)
        _assert_equal(_results(compiled, inputs, *rest), _results(step, inputs, *rest))
    assert counter.frame_count == 1


def test_auto_compiles_to_the_triton_op() -> None:
    inputs, flag = _inputs(), MIXED
    compiled = torch.compile(lambda *x: _packed(*x, impl="auto"), fullgraph=True, backend="aot_eager")
    _assert_equal(_results(compiled, inputs, flag), _results(_packed, inputs, flag))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_a_compiled_call_changes_nothing(backend: str) -> None:
    inputs, flag = _inputs(), MIXED
    compiled = torch.compile(_packed, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = _results(compiled, inputs, flag)
    _assert_equal(actual, _results(_packed, inputs, flag))


@pytest.mark.parametrize("dropout", ["none", "seed given", "seed drawn"])
@pytest.mark.parametrize("op", [_dense, _packed])
def test_checkpointing_changes_nothing(op: Callable[..., torch.Tensor], dropout: str) -> None:
    options: dict[str, Any] = {} if dropout == "none" else {"dropout_p": 0.3}
    if dropout == "seed given":
        options["dropout_seed"] = torch.tensor(5)
    inputs, flag = _inputs(), MIXED
    torch.manual_seed(4)
    wanted = _results(op, inputs, flag, **options)
    torch.manual_seed(4)
    _assert_equal(_results(lambda *x: checkpoint(op, *x, use_reentrant=False, **options), inputs, flag), wanted)


def _faces(*tensors: torch.Tensor, device: str | None = None) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.stride(), device or x.device.type) for x in tensors]


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors of a device that is not there. Autograd on them would end a process whose torch has no CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return FakeTensorMode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_fake_results_have_the_face_of_real_ones(
    fake_cuda: FakeTensorMode, op: str, case: str, dtype: torch.dtype
) -> None:
    arguments = [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 3 else x
        for x in _arguments_of(op, 0.3, case)
    ]
    real = getattr(triton_impl, op)(*arguments)
    with fake_cuda:
        on_cuda = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x
            for x in arguments
        ]
        fake = getattr(triton_impl, op)(*on_cuda)
    real, fake = ((x,) if torch.is_tensor(x) else x for x in (real, fake))
    assert _faces(*fake) == _faces(*real, device="cuda")


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("dropout_seed", [None, 7])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_call_on_fake_cuda_tensors_gives_cuda_tensors(
    fake_cuda: FakeTensorMode, backend: str | None, dropout_seed: int | None, impl: str
) -> None:
    options: dict[str, Any] = {"dropout_p": 0.1, "dropout_seed": dropout_seed, "impl": impl}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, flag: torch.Tensor) -> Tensors:
        packed = attention_varlen(q, k, v, starts, starts, 9, 9, causal=flag, return_lse=True, **options)
        return *packed, _dense(q, k, v, flag, **options)

    inputs = (*(x.bfloat16() for x in _inputs(grad=False)), _starts(), MIXED)
    wanted = _faces(*call(*inputs), device="cuda")
    tested = torch.compile(call, fullgraph=True, backend=backend) if backend else call
    with fake_cuda:
        results = tested(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs))
    assert _faces(*results) == wanted
