"""The small operations between the matrix products, as the models have them, beside torch.compile and Liger.

Forward and backward; what they cost is memory traffic, so the floor is bytes at the measured bandwidth: every input,
result and gradient once. "antlm_fast" is what the models run at this version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fake_cuda import faces
from harness import Bench, Call, Provider, Row
from op_workloads import not_compiled
from peers import operations
from roofline import BYTES, Work
from sizes import DTYPES
from torch import Tensor
from torch.nn import functional as F

from antlm_fast.models import baby_llama
from antlm_fast.testing.budget import assert_within_budget

Function = Callable[..., Any]
EPS = 1e-6


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual), x + residual), as between two sublayers of BabyLlama."""
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, EPS), total


def rms_norm_by_hand(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' LlamaRMSNorm: in float32, then back."""
    total = x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * scaled.to(total.dtype), total


def layer_norm(x: Tensor) -> Tensor:
    """LTG-BERT's, without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-7)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.gelu(gate, approximate="tanh")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return baby_llama._rotate(q, (cos, sin)), baby_llama._rotate(k, (cos, sin))


def layers_suite(bench: Bench) -> Iterator[list[Row]]:
    tokens, hidden, intermediate, heads = bench.sizes.layers
    for dtype_name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(bench.device, dtype).requires_grad_()

        angles = torch.rand(tokens, 1, hidden // heads, generator=generator) * 6.28
        tables = [x.to(bench.device) for x in (angles.cos(), angles.sin())]
        eager: dict[str, tuple[Function, list[Tensor], dict[str, Function]]] = {
            "RMSNorm + residual": (
                rms_norm_residual,
                [draw(tokens, hidden), draw(tokens, hidden), draw(hidden)],
                {
                    "by hand": rms_norm_by_hand,
                    "Liger": functools.partial(operations.liger_rms_norm, eps=EPS),
                },
            ),
            "LayerNorm": (layer_norm, [draw(tokens, hidden)], {}),
            "SwiGLU": (
                swiglu,
                [draw(tokens, intermediate), draw(tokens, intermediate)],
                {"Liger": operations.liger_swiglu},
            ),
            "GEGLU": (
                geglu,
                [draw(tokens, intermediate), draw(tokens, intermediate)],
                {"Liger": operations.liger_geglu},
            ),
            "RoPE": (
                functools.partial(_with_tables, rope, tables),
                [draw(tokens, heads, hidden // heads), draw(tokens, heads, hidden // heads)],
                {},
            ),
        }
        providers = []
        for case, (function, inputs, peers) in eager.items():
            compiled = torch.compile(function, dynamic=False) if bench.sizes.compiled else not_compiled
            ways = {"antlm_fast": function, "torch.compile": compiled, **peers}
            # gradients in and out, the tensors and what comes out: each once
            moved = 4 * sum(x.numel() for x in inputs) * BYTES[dtype_name]
            providers += [
                Provider(
                    case=case,
                    name=name,
                    prepare=functools.partial(_checked, way, function, inputs),
                    amount=moved / 1e9,
                    unit="GB/s",
                    floor=bench.floor(Work(flops=0, bytes=moved), dtype_name),
                    faces=None if name == "torch.compile" else functools.partial(faces, way, inputs),
                    graph=True,
                )
                for name, way in ways.items()
            ]
        shape = f"tokens,hidden,intermediate,heads {tokens},{hidden},{intermediate},{heads}, {dtype_name}"
        yield bench.measure("layers", shape, providers, rounds=bench.sizes.rounds, warmup=2)


def _with_tables(function: Function, tables: Sequence[Tensor], *inputs: Tensor) -> Any:
    """Tables stay float32, as in the model; for the float64 truth they are widened, on a fake device made anew."""
    x = inputs[0]
    if x.device != tables[0].device:
        return function(*inputs, *(torch.empty(table.shape, device=x.device) for table in tables))
    return function(*inputs, *(table.double() if x.dtype == torch.float64 else table for table in tables))


def _run(function: Function, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Results and gradients; without given gradients of the results, those are ones."""
    out = function(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    gradients = [torch.ones_like(x) for x in outs] if gradients is None else gradients
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, list(inputs), list(gradients))]


def _checked(way: Function, function: Function, inputs: Sequence[Tensor]) -> Call:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact, plain, found = _run(function, wide), _run(function, inputs), _run(way, inputs)
    outs = len(found) - len(inputs)
    for place, (actual, wanted, eager) in enumerate(zip(found, exact, plain, strict=True)):
        assert_within_budget(f"tensor {place}", actual, wanted, eager, slack=2.0 if place < outs else 3.0)
    gradients = [torch.ones_like(x) for x in found[:outs]]
    return lambda: _run(way, inputs, gradients)
