"""Attention as each architecture's compiler leaves it, forward and backward, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from antlm_fast.kernels.attention import attention, attention_varlen
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")

from antlm_fast.kernels.attention import triton_launches

Executing = Callable[[str], AbstractContextManager[list[str]]]
# the matrix product that the compiler chooses
INSTRUCTIONS = {"sm_80": "tt.dot", "sm_90": "ttng.warp_group_dot", "sm_100": "ttng.tc_gen5_mma"}
LENGTHS, SLACK = (65, 0, 17, 127, 1), 9
PREFIXES = (0, 3, 2**31 - 1, 40, 0)  # causal, prefix, bidirectional, prefix, causal


@pytest.fixture(params=INSTRUCTIONS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backward's tensors say where they really lie, so the tiles of the architecture are named here."""
    monkeypatch.setattr(triton_launches, "arch_of", lambda device: request.param)
    return request.param


def _starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _tensors(rows: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and an upstream gradient, as the dtype holds them."""
    torch.manual_seed(0)
    return [torch.randn(*rows, n, head_dim).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def _results(
    op: Callable[..., Any], tensors: list[torch.Tensor], dtype: torch.dtype, impl: str, **options: Any
) -> dict[str, torch.Tensor]:
    *inputs, upstream = (x.to(dtype, copy=True) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = op(*inputs, **options, return_lse=True, impl=impl)
    gradients = torch.autograd.grad(out, inputs, upstream)
    return dict(zip(("out", "lse", "d_q", "d_k", "d_v"), (out.detach(), lse, *gradients), strict=True))


def _assert_within_budget(
    executing: Executing, arch: str, op: Callable[..., Any], tensors: list[torch.Tensor], **options: Any
) -> list[str]:
    """The TTGIR of the four kernels that ran."""
    dtype = tensors[0].dtype
    exact = _results(op, tensors, torch.float64, "reference", **options)
    eager = _results(op, tensors, dtype, "reference", **options)
    with executing(arch) as modules:
        actual = _results(op, tensors, dtype, "triton", **options)
    for name, wanted in exact.items():
        assert_within_budget(name, actual[name], wanted, eager[name], 3.0 if name.startswith("d_") else 2.0)
    assert len(modules) == 4
    forward, delta, *backward = modules
    assert "tt.reduce" in delta
    for module in (forward, *backward):
        assert f'ttg.target = "cuda:{arch[3:]}"' in module
        if dtype != torch.float32:  # "ieee" takes the fused multiply-adds of plain arithmetic
            assert INSTRUCTIONS[arch] in module
        if not tensors[0].shape[-1] % 16:  # other heads do not begin at 16-byte boundaries that the compiler can see
            assert "ttg.async_copy_global_to_local" in module
    return modules


@pytest.mark.parametrize(
    ("dtype", "head_dim", "dropout_p"),
    [
        (torch.bfloat16, 64, 0.0),
        (torch.bfloat16, 40, 0.2),
        (torch.bfloat16, 128, 0.0),
        (torch.float16, 64, 0.0),
        (torch.float32, 64, 0.0),
    ],
    ids=["bfloat16", "bfloat16-head40-dropout", "bfloat16-head128", "float16", "float32"],
)
def test_packed_sequences(
    executing_ttgir: Executing, arch: str, dtype: torch.dtype, head_dim: int, dropout_p: float
) -> None:
    starts = _starts(LENGTHS)
    options = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": max(LENGTHS),
        "max_seqlen_k": max(LENGTHS),
        "prefix_len": torch.tensor(PREFIXES, dtype=torch.int32),
        "dropout_p": dropout_p,
        "dropout_seed": torch.tensor(2**40 + 3),
    }
    tensors = _tensors((sum(LENGTHS) + SLACK,), 4, 2, head_dim, dtype)
    _assert_within_budget(executing_ttgir, arch, attention_varlen, tensors, **options)


def test_a_dense_batch_with_a_flag_a_sequence(executing_ttgir: Executing, arch: str) -> None:
    tensors = _tensors((2, 200), 2, 2, 64, torch.bfloat16)
    _assert_within_budget(executing_ttgir, arch, attention, tensors, causal=torch.tensor([True, False]))


def test_a_flag_flipped_in_place_runs_the_same_code(executing_ttgir: Executing, arch: str) -> None:
    tensors = _tensors((2, 70), 2, 1, 64, torch.bfloat16)
    flag, results = torch.tensor([True, False]), []
    with executing_ttgir(arch) as modules:
        for values in ([True, False], [False, True]):
            flag.copy_(torch.tensor(values))
            results.append(attention(*tensors[:3], causal=flag, impl="triton"))
    assert len(modules) == 2
    assert modules[0] == modules[1]
    for values, actual in zip(([True, False], [False, True]), results, strict=True):
        exact, eager = (
            attention(*(x.to(dtype) for x in tensors[:3]), causal=torch.tensor(values), impl="reference")
            for dtype in (torch.float64, torch.bfloat16)
        )
        assert_within_budget("out", actual, exact, eager)
    assert (results[0] - results[1]).abs().max() > 0.1
