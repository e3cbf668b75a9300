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

from antlm_fast.kernels import fused_layers
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


def fused_rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total, normed = fused_layers.add_norm(x, residual, weight=weight, eps=EPS)
    return normed, total


def layer_norm(x: Tensor) -> Tensor:
    """LTG-BERT's, without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-7)


def fused_layer_norm(x: Tensor) -> Tensor:
    return fused_layers.layer_norm(x, eps=1e-7)


def swiglu(wide: Tensor) -> Tensor:
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(wide: Tensor) -> Tensor:
    gate, up = wide.chunk(2, dim=-1)
    return up * F.gelu(gate, approximate="tanh")


def fused_unit(wide: Tensor, activation: str) -> Tensor:
    return fused_layers.gated_unit(wide, activation=activation, gate_first=True)


def in_halves(function: Function) -> Function:
    """A peer that takes gate and value apart, of one projection's output."""
    return lambda wide: function(*wide.chunk(2, dim=-1))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' apply_rotary_pos_emb."""
    return _rotated(q, cos.to(q.dtype), sin.to(q.dtype)), _rotated(k, cos.to(k.dtype), sin.to(k.dtype))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def fused_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return fused_layers.rotary(q, cos, sin), fused_layers.rotary(k, cos, sin)


def layers_suite(bench: Bench) -> Iterator[list[Row]]:
    tokens, hidden, intermediate, heads = bench.sizes.layers
    for dtype_name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(bench.device, dtype).requires_grad_()

        angles = torch.rand(tokens, 1, hidden // heads, generator=generator) * 6.28
        tables = [x.to(bench.device) for x in (angles.cos(), angles.sin())]
        # plain torch, ours, inputs, further peers
        cases: dict[str, tuple[Function, Function, list[Tensor], dict[str, Function]]] = {
            "RMSNorm + residual": (
                rms_norm_residual,
                fused_rms_norm_residual,
                [draw(tokens, hidden), draw(tokens, hidden), draw(hidden)],
                {
                    "by hand": rms_norm_by_hand,
                    "Liger": functools.partial(operations.liger_rms_norm, eps=EPS),
                },
            ),
            "LayerNorm": (layer_norm, fused_layer_norm, [draw(tokens, hidden)], {}),
            "SwiGLU": (
                swiglu,
                functools.partial(fused_unit, activation="silu"),
                [draw(tokens, 2 * intermediate)],
                {"Liger": in_halves(operations.liger_swiglu)},
            ),
            "GEGLU": (
                geglu,
                functools.partial(fused_unit, activation="gelu_tanh"),
                [draw(tokens, 2 * intermediate)],
                {"Liger": in_halves(operations.liger_geglu)},
            ),
            "RoPE": (
                functools.partial(_with_tables, rope, tables),
                functools.partial(_with_tables, fused_rope, tables),
                [draw(tokens, heads, hidden // heads), draw(tokens, heads, hidden // heads)],
                {},
            ),
        }
        providers = []
        for case, (function, ours, inputs, peers) in cases.items():
            compiled = torch.compile(function, dynamic=False) if bench.sizes.compiled else not_compiled
            ways = {"antlm_fast": ours, "torch": function, "torch.compile": compiled, **peers}
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
