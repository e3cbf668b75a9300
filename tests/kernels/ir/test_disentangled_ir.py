"""Disentangled attention as each architecture's compiler leaves it; and faults that only memory shows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")

from antlm_fast.kernels.attention import triton_launches
from antlm_fast.kernels.triton_support.launch import Tile

Executing = Callable[[str], AbstractContextManager[list[str]]]
Variant = Callable[..., dict[str, ModuleType]]
LENGTHS, SLACK = (65, 0, 17, 40), 9
PREFIXES = (0, 3, 2**31 - 1, 20)  # causal, prefix, bidirectional, prefix
NAMES = ("out", "lse", "d_q", "d_k", "d_v", "d_q_rel", "d_k_rel")


@pytest.fixture(params=["sm_80", "sm_90", "sm_100"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backward's tensors say where they really lie, so the tiles of the architecture are named here."""
    monkeypatch.setattr(triton_launches, "arch_of", lambda device: request.param)
    return request.param


def _tensors(total: int, heads: int, head_dim: int, bucket_size: int) -> list[torch.Tensor]:
    """q, k, v, q_rel, k_rel and an upstream gradient."""
    torch.manual_seed(0)
    rows = (total, total, total, 2 * bucket_size - 1, 2 * bucket_size - 1, total)
    return [torch.randn(n, heads, head_dim) for n in rows]


def _results(
    tensors: list[torch.Tensor], dtype: torch.dtype, impl: str, lengths: tuple[int, ...], **options: Any
) -> dict[str, torch.Tensor]:
    *inputs, upstream = (x.to(dtype, copy=True) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    out, lse = disentangled_attention_varlen(
        *inputs, starts, starts, longest, longest, return_lse=True, impl=impl, **options
    )
    return dict(zip(NAMES, (out.detach(), lse, *torch.autograd.grad(out, inputs, upstream)), strict=True))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "dropout_p"),
    [(torch.bfloat16, 64, 0.0), (torch.bfloat16, 64, 0.1), (torch.float32, 32, 0.0)],
    ids=["bfloat16", "bfloat16-dropout", "float32-head32"],
)
def test_packed_sequences(
    executing_ttgir: Executing, arch: str, dtype: torch.dtype, head_dim: int, dropout_p: float
) -> None:
    options: dict[str, Any] = {
        "lengths": LENGTHS,
        "prefix_len": torch.tensor(PREFIXES, dtype=torch.int32),
        "dropout_p": dropout_p,
        "dropout_seed": torch.tensor(2**40 + 3),
    }
    tensors = [x.to(dtype) for x in _tensors(sum(LENGTHS) + SLACK, 2, head_dim, 32)]
    exact = _results(tensors, torch.float64, "reference", **options)
    eager = _results(tensors, dtype, "reference", **options)
    with executing_ttgir(arch) as modules:
        actual = _results(tensors, dtype, "triton", **options)
    for name, wanted in exact.items():
        assert_within_budget(name, actual[name], wanted, eager[name], 3.0 if name.startswith("d_") else 2.0)
    assert len(modules) == 4
    for module in modules[2:]:
        assert "tt.gather" in module


@pytest.fixture(scope="module")
def variant() -> Iterator[Variant]:
    """The folder of benchmarks is no installed package: it is importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3]))
        yield importlib.import_module("benchmarks.variants").variant
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


RELATIVE, DQ, DKDV = "triton_relative", "triton_dq", "triton_dkdv"
UNCLAMPED = (RELATIVE, "if CLAMPED:", "if CLAMPED and False:")
# fault: (kernel, (module, its text, the text in its place), lengths and slack, what the fault says); tiles are of 32
MUTANTS = {
    "the forward's last terms": ("forward", UNCLAMPED, ((17,), 0), "past the end .* `c2p_ptr`"),
    "dK/dV's last terms": ("dkdv", UNCLAMPED, ((17,), 0), "past the end .* `c2p_ptr`"),
    "dC2P's rows": (
        "dq",
        (DQ, "dc2p, mask=(rows < len_q)[:, None])", "dc2p)"),
        ((17, 47), 128),
        "program instances .* `dc2p_ptr`",
    ),
    "dP2C's rows": (
        "dkdv",
        (DKDV, "dp2c, mask=(cols < len_k)[:, None])", "dp2c)"),
        ((17,), 0),
        "past the end .* `dp2c_ptr`",
    ),
    "distances": (
        "forward",
        ("triton_forward", "buckets_ptr += reach", "buckets_ptr += 2 * reach + 1"),
        ((17,), 0),
        "past the end .* `buckets_ptr`",
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_missing_mask_is_caught(
    executing_ttgir: Executing, variant: Variant, monkeypatch: pytest.MonkeyPatch, fault: str, arch: str
) -> None:
    from ttsem.sanitize import KernelFault

    kernel, change, (lengths, slack), message = MUTANTS[fault]
    module = variant(change)[f"triton_{kernel}"]
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 32, 4, 2))
    monkeypatch.setattr(triton_launches, f"{kernel}_kernel", getattr(module, f"{kernel}_kernel"))
    tensors = _tensors(sum(lengths) + slack, 1, 64, 8)
    with pytest.raises(KernelFault, match=message), executing_ttgir(arch):
        _results(tensors, torch.bfloat16, "triton", lengths, causal=True, max_position=16)
