"""Random calls of the C++ kernels against the float64 reference, on every instruction set of this machine.

A few cases in the suite. `make sanitize` runs ten thousand with the sanitizers: ANTLM_FAST_FUZZ_CASES is how many,
ANTLM_FAST_FUZZ_LIBRARY the library that was built with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from antlm_fast.kernels.attention import attention_varlen
from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.kernels.fused_layers import add_norm, gated_unit
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.kernels.native import library as native
from antlm_fast.testing.budget import assert_within_budget

CASES = int(os.environ.get("ANTLM_FAST_FUZZ_CASES", "12"))
LIBRARY = Path(os.environ.get("ANTLM_FAST_FUZZ_LIBRARY", native.FOLDER / native.LIBRARY))
REASON = native.unavailable_reason("cpu", torch.float32)
SLACK = 4.0  # of a few results plain code may by chance be off by less than it rounds

pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
fuzzed = settings(
    max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

LENGTHS = st.one_of(st.sampled_from([0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127]), st.integers(0, 150))
HEAD_DIMS = st.sampled_from([1, 3, 8, 16, 31, 32, 33, 64, 64, 80, 128, 200, 256])


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The kernels of one instruction set serve while this is open."""
    loaded = native.Library(LIBRARY, name)
    with mock.patch.object(native, "_loaded", lambda: loaded):
        yield
    native.Library(LIBRARY)  # tiles are switched on and off for the whole process


@st.composite
def calls(draw: st.DrawFn, *, relative: bool) -> dict[str, Any]:
    """Tensors in float64, the packing and the options of a call."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    head_dim, kv_heads = draw(HEAD_DIMS), draw(st.integers(1, 2))
    heads = kv_heads * (1 if relative else draw(st.integers(1, 3)))
    lengths_q = draw(st.lists(LENGTHS, max_size=4))
    lengths_k = [draw(st.one_of(st.just(length), LENGTHS)) for length in lengths_q]
    options: dict[str, Any] = {}
    slack_q, slack_k = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if relative and draw(st.booleans()):
        places = [sorted(draw(st.sets(st.integers(0, length - 1), max_size=length))) for length in lengths_k if length]
        lengths_k, lengths_q = [length for length in lengths_k if length], [len(own) for own in places]
        options["positions_q"] = torch.tensor([*chain(*places), *[0] * slack_q], dtype=torch.int32)
    starts = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    total_q, total_k = sum(lengths_q) + slack_q, sum(lengths_k) + slack_k
    shapes = [(total_q, heads, head_dim), (total_k, kv_heads, head_dim), (total_k, kv_heads, head_dim)]
    inputs: list[torch.Tensor | None] = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if relative:
        rows = 2 * draw(st.sampled_from([2, 3, 8, 32, 40])) - 1
        for _ in range(2):
            there = draw(st.booleans())
            inputs.append(torch.randn(rows, heads, head_dim, dtype=torch.float64) if there else None)
        options["max_position"] = draw(st.sampled_from([2, 16, 128, 512]))
    if draw(st.booleans()):
        options["causal"] = draw(st.booleans())
    else:
        prefixes = [draw(st.integers(-3, 160)) for _ in lengths_q]
        options["prefix_len"] = torch.tensor(prefixes, dtype=torch.int32)
    if draw(st.booleans()):
        options |= {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "dropout_seed": draw(st.integers(0, 2**62))}
    options["softmax_scale"] = draw(st.sampled_from([None, 0.1, -0.2, 0.0]))
    packing = (*starts, max(lengths_q, default=0), max(lengths_k, default=0))
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    return {"inputs": inputs, "packing": packing, "options": options, "upstream": upstream}


def results(op: Any, call: dict[str, Any], dtype: torch.dtype, impl: str) -> dict[str, torch.Tensor]:
    inputs = [None if x is None else x.to(dtype).requires_grad_() for x in call["inputs"]]
    out, lse = op(*inputs, *call["packing"], **call["options"], return_lse=True, impl=impl)
    there = {f"d_{place}": x for place, x in enumerate(inputs) if x is not None}
    upstream = call["upstream"].to(dtype)
    gradients = torch.autograd.grad(out, list(there.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse, **dict(zip(there, gradients, strict=True))}


def check_against_reference(op: Any, call: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    call["inputs"] = [None if x is None else x.to(dtype).double() for x in call["inputs"]]
    exact, eager = results(op, call, torch.float64, "reference"), results(op, call, dtype, "reference")
    with instruction_set(name):
        found, again = results(op, call, dtype, "native"), results(op, call, dtype, "native")
    q, k, v = map(largest_of, call["inputs"][:3])
    # a score's gradient is a difference of two products of head_dim terms; 0.5 of the weights may be dropped
    terms = 2 * largest_of(call["upstream"]) * v * max(q, k)
    assert_alike(found, again, exact, eager, terms, values=max(1.0, v))


def assert_alike(
    found: dict[str, torch.Tensor],
    again: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    terms: float,
    values: float = 1.0,
) -> None:
    """Within budgets, and the same when repeated.

    Args:
        terms, values: the size of what is summed to a gradient, to a result: of one key, class or column that may be 0.
    """
    largest = max((x.abs().max().item() for key, x in exact.items() if key.startswith("d_") and x.numel()), default=0.0)
    for key, wanted in exact.items():
        assert torch.equal(found[key], again[key]), f"{key} is another when the call is repeated"
        if wanted.numel():
            scale = max(largest, terms) if key.startswith("d_") else values
            assert_within_budget(key, found[key], wanted, eager[key], SLACK, scale=scale)


def largest_of(x: torch.Tensor | None) -> float:
    return x.abs().max().item() if x is not None and x.numel() else 0.0


NAMES = () if REASON is not None else native.Library(LIBRARY).available


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@fuzzed
@given(call=calls(relative=False))
def test_attention(name: str, dtype: torch.dtype, call: dict[str, Any]) -> None:
    check_against_reference(attention_varlen, call, name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@fuzzed
@given(call=calls(relative=True))
def test_disentangled_attention(name: str, dtype: torch.dtype, call: dict[str, Any]) -> None:
    check_against_reference(disentangled_attention_varlen, call, name, dtype)


SIZES = st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 64, 127]), st.integers(0, 80))


def gradients_of(
    out: torch.Tensor, inputs: dict[str, torch.Tensor | None], upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    there = {f"d_{key}": x for key, x in inputs.items() if x is not None}
    found = torch.autograd.grad(
        out, list(there.values()), upstream.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return dict(zip(there, found, strict=True))


def bias_after_rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Logits are rounded where the native implementation rounds them: of a few rows, another place is another error."""
    logits = linear(x, weight)
    return logits if bias is None else logits + bias.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@fuzzed
@given(data=st.data())
def test_linear_cross_entropy(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    rows, hidden, vocab = data.draw(SIZES), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    made = {"hidden": torch.randn(rows, hidden), "weight": torch.randn(vocab, hidden) / hidden**0.5}
    made["bias"] = torch.randn(vocab) if data.draw(st.booleans()) else None
    targets = torch.randint(vocab, (rows,)).where(torch.rand(rows) < data.draw(st.sampled_from([0.0, 0.15, 1.0])), -100)
    options: dict[str, Any] = {
        "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
        "z_loss": data.draw(st.sampled_from([0.0, 1e-2])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "softcap": data.draw(st.sampled_from([None, 5.0])),
    }
    upstream = torch.rand(rows if options["reduction"] == "none" else ()) + 0.5

    def run(kind: torch.dtype, impl: str) -> dict[str, torch.Tensor]:
        inputs = {key: None if x is None else x.to(dtype).to(kind).requires_grad_() for key, x in made.items()}
        weights = (inputs["hidden"], inputs["weight"], targets)
        loss, lse = linear_cross_entropy(*weights, bias=inputs["bias"], **options, return_lse=True, impl=impl)
        return {"loss": loss.detach(), "lse": lse, **gradients_of(loss, inputs, upstream)}

    exact = run(torch.float64, "reference")
    with mock.patch.object(torch.nn.functional, "linear", bias_after_rounding):
        eager = run(dtype, "reference")
    with instruction_set(name):
        found, again = run(dtype, "native"), run(dtype, "native")
    terms = largest_of(upstream) * max(1.0, largest_of(made["hidden"]), largest_of(made["weight"]))
    assert_alike(found, again, exact, eager, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@fuzzed
@given(data=st.data())
def test_fused_layers(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    rows, columns = data.draw(SIZES), data.draw(st.integers(1, 150))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    kind, eps = data.draw(st.sampled_from(["rms", "layer"])), data.draw(st.sampled_from([1e-6, 1e-2]))
    p, activation = data.draw(st.sampled_from([0.0, 0.3])), data.draw(st.sampled_from(["silu", "gelu_tanh", "gelu"]))
    affine, gate_first, inner = (data.draw(st.booleans()) for _ in range(3))
    made = {
        "x": torch.randn(rows, columns),
        "residual": torch.randn(rows, columns),
        "wide": torch.randn(rows, 2 * columns),
    }
    made |= {"weight": torch.randn(columns), "bias": torch.randn(columns)} if affine else {}
    upstream = torch.randn(rows, columns)

    def run(as_dtype: torch.dtype, impl: str) -> dict[str, torch.Tensor]:
        inputs = {key: x.to(dtype).to(as_dtype).requires_grad_() for key, x in made.items()}
        weight, bias = inputs.get("weight"), inputs.get("bias") if kind == "layer" else None
        total, normed = add_norm(
            inputs["x"], inputs["residual"], weight=weight, bias=bias, eps=eps, kind=kind, dropout_p=p, dropout_seed=3,
            impl=impl,
        )  # fmt: skip
        unit = gated_unit(
            inputs["wide"], activation=activation, gate_first=gate_first, norm_eps=1e-2 if inner else None, impl=impl
        )
        out = normed + unit
        return {"total": total.detach(), "out": out.detach(), **gradients_of(out, inputs, upstream)}

    exact, eager = run(torch.float64, "reference"), run(dtype, "reference")
    with instruction_set(name):
        found, again = run(dtype, "native"), run(dtype, "native")
    assert_alike(found, again, exact, eager, terms=largest_of(upstream) * rows**0.5)
