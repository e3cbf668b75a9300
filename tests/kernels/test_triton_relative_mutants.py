"""The checks of the relative terms are checked: each planted fault must be caught, by the results it spoils."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the mutants run on the CPU, under TRITON_INTERPRET=1", allow_module_level=True)

from antlm_fast.kernels.attention import triton_launches
from antlm_fast.kernels.triton_support.launch import Tile

# causal, bidirectional, causal with rows that see nothing; rows and keys cross tiles
LENGTHS_Q, LENGTHS_K, SLACK = (34, 19, 7), (34, 18, 5), 3
PREFIXES = torch.tensor([0, 2**31 - 1, 0], dtype=torch.int32)
BUCKETS, MAX_POSITION = 4, 12
Variant = Callable[..., dict[str, ModuleType]]


@pytest.fixture(scope="module")
def variant() -> Iterator[Variant]:
    """The folder of benchmarks is no installed package: it is importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        yield importlib.import_module("benchmarks.variants").variant
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 16, 4, 1))


def _results(dtype: torch.dtype, impl: str, given: torch.dtype) -> dict[str, torch.Tensor]:
    """Slack rows of the inputs hold NaN, which nothing may read."""
    torch.manual_seed(5)
    rows = [sum(LENGTHS_Q), sum(LENGTHS_K), sum(LENGTHS_K), sum(LENGTHS_Q)]
    packed = [torch.cat([torch.randn(n, 2, 16), torch.full((SLACK, 2, 16), torch.nan)]) for n in rows]
    q, k, v, upstream, q_rel, k_rel = (
        x.to(given).to(dtype) for x in (*packed, *torch.randn(2, 2 * BUCKETS - 1, 2, 16))
    )
    inputs = [x.requires_grad_() for x in (q, k, v, q_rel, k_rel)]
    starts = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K)]
    out, lse = disentangled_attention_varlen(
        *inputs, *starts, max(LENGTHS_Q), max(LENGTHS_K), prefix_len=PREFIXES, max_position=MAX_POSITION,
        return_lse=True, impl=impl,
    )  # fmt: skip
    gradients = torch.autograd.grad(out, inputs, upstream)
    names = ("out", "lse", "d_q", "d_k", "d_v", "d_q_rel", "d_k_rel")
    return dict(zip(names, (out.detach(), lse.T, *gradients), strict=True))


_wanted = cache(_results)  # the reference's


def _over_budget(name: str, *rows: torch.Tensor) -> bool:
    try:
        assert_within_budget(name, *rows, 3.0 if name.startswith("d_") else 2.0)
    except AssertionError:
        return True
    return False


def numbers(dtype: torch.dtype = torch.float32) -> set[str]:
    """Results past the error budget, and results whose slack rows are not those of the reference."""
    exact, eager = (_wanted(wide, "reference", dtype) for wide in (torch.float64, dtype))
    actual = _results(dtype, "triton", dtype)
    wrong = set()
    for name, wanted in exact.items():
        used = len(wanted) if name.endswith("_rel") else len(wanted) - SLACK
        if _over_budget(name, *(x[name][:used] for x in (actual, exact, eager))):
            wrong.add(name)
        if not torch.equal(actual[name][used:], eager[name][used:]):
            wrong.add(f"{name}'s slack")
    return wrong


def half_numbers() -> set[str]:
    return numbers(torch.bfloat16)


RELATIVE, FORWARD, DQ, DKDV = "triton_relative", "triton_forward", "triton_dq", "triton_dkdv"
MODULE_OF = {"forward": FORWARD, "dq": DQ, "dkdv": DKDV}
EVERYTHING = {"out", "lse", "d_q", "d_k", "d_v", "d_q_rel", "d_k_rel"}
OF_C2P, OF_P2C = {"d_q", "d_k_rel"}, {"d_k", "d_q_rel"}
ADDED_P2C = "terms += tl.load(p2c_ptrs + buckets).to(tl.float32)"

# fault: (check, {what it finds wrong}, kernels replaced, changes of their sources)
MUTANTS: dict[str, tuple[Any, ...]] = {
    "the forward's distances have the other sign": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "cols[None, :] - positions[:, None]", "positions[:, None] - cols[None, :]"),
    ),
    "dQ's distances have the other sign": (
        numbers,
        OF_C2P,
        "dq",
        (DQ, "cols[None, :] - positions[:, None]", "positions[:, None] - cols[None, :]"),
    ),
    "dK/dV's distances have the other sign": (
        numbers,
        OF_P2C | {"d_v"},
        "dkdv",
        (DKDV, "(rows + len_k - len_q)[None, :] - cols[:, None]", "cols[:, None] - (rows + len_k - len_q)[None, :]"),
    ),
    "distances forget that keys are more or fewer": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "positions = rows + len_k - len_q", "positions = rows"),
    ),
    "distances are one too far": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "buckets_ptr += reach", "buckets_ptr += reach + 1"),
    ),
    "the forward lacks a term": (numbers, EVERYTHING, "forward", (RELATIVE, ADDED_P2C, "terms += 0.0")),
    "dQ lacks a term": (numbers, OF_C2P, "dq", (RELATIVE, ADDED_P2C, "terms += 0.0")),
    "dK/dV lacks a term": (numbers, OF_P2C | {"d_v"}, "dkdv", (RELATIVE, ADDED_P2C, "terms += 0.0")),
    "queries read the keys' term": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "term_rows(c2p_ptr, head, total_q", "term_rows(p2c_ptr, head, total_q"),
    ),
    "every head reads the first one's term": (
        numbers,
        EVERYTHING,
        "forward",
        (RELATIVE, "(head.to(tl.int64) * total + start)", "(0 * total + start)"),
    ),
    "sequences read the first one's term": (
        numbers,
        EVERYTHING,
        "forward",
        (RELATIVE, "(head.to(tl.int64) * total + start)", "(head.to(tl.int64) * total)"),
    ),
    "rows past a sequence's end are read as they are": (
        numbers,
        OF_P2C | {"d_v"},
        "dkdv",
        (RELATIVE, "if CLAMPED:", "if CLAMPED and False:"),
    ),
    "dQ's runs end one key early": (numbers, OF_C2P, "dq", (DQ, "(positions + 1 - col)", "(positions - col)")),
    "dQ's runs end one key late": (numbers, OF_C2P, "dq", (DQ, "(positions + 1 - col)", "(positions + 2 - col)")),
    "dK/dV's runs end one row early": (
        numbers,
        OF_P2C,
        "dkdv",
        (DKDV, "(cols - len_k + len_q - top)", "(cols - 1 - len_k + len_q - top)"),
    ),
    "dK/dV's runs end one row late": (
        numbers,
        OF_P2C,
        "dkdv",
        (DKDV, "(cols - len_k + len_q - top)", "(cols + 1 - len_k + len_q - top)"),
    ),
    "a run that ends before the tile has its first value": (
        numbers,
        OF_C2P,
        "dq",
        (RELATIVE, "counts > 0", "counts > -9"),
    ),
    "a run past the tile's end lacks its last value": (
        numbers,
        OF_P2C,
        "dkdv",
        (RELATIVE, "tl.maximum(counts, 1), LENGTH)", "tl.maximum(counts, 1), LENGTH - 1)"),
    ),
    "running sums lack their own value": (
        half_numbers,
        OF_C2P,
        "dq",
        (RELATIVE, "at[:, None] <= at[None, :]", "at[:, None] < at[None, :]"),
    ),
    "dQ keeps the last tile's runs": (numbers, OF_C2P, "dq", (DQ, "runs += first_sums", "runs = first_sums")),
    "dK/dV keeps the last tile's runs": (numbers, OF_P2C, "dkdv", (DKDV, "runs += first_sums", "runs = first_sums")),
    "a bucket keeps what lies beyond it": (
        numbers,
        OF_C2P,
        "dq",
        (RELATIVE, "return sums - tl.gather(sums, after, 1)", "return sums"),
    ),
    "dC2P is not scaled": (
        numbers,
        OF_C2P,
        "dq",
        (DQ, "(less_next(runs, TABLE_ROWS) * softmax_scale)", "less_next(runs, TABLE_ROWS)"),
    ),
    "dP2C has the other sign": (numbers, OF_P2C, "dkdv", (DKDV, "* -softmax_scale", "* softmax_scale")),
    "dC2P's slack rows are not written": (
        numbers,
        {"d_q's slack", "d_k_rel"},
        "dq",
        (DQ, "dc2p_ptr, first_slack, total_q", "dc2p_ptr, total_q, total_q"),
    ),
    "dP2C's slack rows are not written": (
        numbers,
        {"d_k's slack", "d_q_rel"},
        "dkdv",
        (DKDV, "dp2c_ptr, first_slack, total_k", "dp2c_ptr, total_k, total_k"),
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_caught(fault: str, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    check, found, kernels, *changes = MUTANTS[fault]
    built = variant(*changes)
    for kernel in kernels.split():
        monkeypatch.setattr(triton_launches, f"{kernel}_kernel", getattr(built[MODULE_OF[kernel]], f"{kernel}_kernel"))
    assert check() == found


def test_kernels_without_a_fault_pass_every_check(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers() == half_numbers() == set()
    built = variant()
    for kernel, module in MODULE_OF.items():
        monkeypatch.setattr(triton_launches, f"{kernel}_kernel", getattr(built[module], f"{kernel}_kernel"))
    assert numbers() == set()
