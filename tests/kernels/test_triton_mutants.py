"""The checks of the Triton kernels are checked: each planted fault must be caught, by the results it spoils."""

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

from antlm_fast.kernels.attention import attention_varlen
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the mutants run on the CPU, under TRITON_INTERPRET=1", allow_module_level=True)

from antlm_fast.kernels.attention import triton_launches
from antlm_fast.kernels.triton_support.launch import Tile

ROOT = Path(__file__).parents[2]
# causal, bidirectional, causal with rows that see nothing, prefix; keys of the second cross a tile
LENGTHS_Q, LENGTHS_K, SLACK = (33, 34, 7, 9), (33, 17, 5, 12), 3
PREFIXES = torch.tensor([0, 2**31 - 1, 0, 5], dtype=torch.int32)
Variant = Callable[..., dict[str, ModuleType]]


@pytest.fixture(scope="module")
def variant() -> Iterator[Variant]:
    """The folder of benchmarks is no installed package: it is importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.variants").variant
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences then cross edges, and cost little."""
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 16, 4, 1))


def _starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


PACKED = (_starts(LENGTHS_Q), _starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))


def _inputs(heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and an upstream gradient; slack rows hold NaN, which nothing may read."""
    torch.manual_seed(5)
    shapes = [(sum(LENGTHS_Q), heads), *[(sum(LENGTHS_K), kv_heads)] * 2, (sum(LENGTHS_Q), heads)]
    return [torch.cat([torch.randn(n, h, 16), torch.full((SLACK, h, 16), torch.nan)]) for n, h in shapes]


def _results(dtype: torch.dtype, impl: str, heads: int, kv_heads: int, **options: Any) -> dict[str, torch.Tensor]:
    q, k, v, upstream = (x.to(dtype) for x in _inputs(heads, kv_heads))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention_varlen(*inputs, *PACKED, prefix_len=PREFIXES, **options, return_lse=True, impl=impl)
    gradients = torch.autograd.grad(out, inputs, upstream)
    return dict(zip(("out", "lse", "d_q", "d_k", "d_v"), (out.detach(), lse.T, *gradients), strict=True))


_wanted = cache(_results)  # the reference's


def _over_budget(name: str, *rows: torch.Tensor) -> bool:
    try:
        assert_within_budget(name, *rows, 3.0 if name.startswith("d_") else 2.0)
    except AssertionError:
        return True
    return False


def numbers(heads: int = 1, kv_heads: int = 1, **options: Any) -> set[str]:
    """Results past the error budget, and results whose slack rows are not those of the reference."""
    exact, eager = (_wanted(dtype, "reference", heads, kv_heads, **options) for dtype in (torch.float64, torch.float32))
    actual = _results(torch.float32, "triton", heads, kv_heads, **options)
    wrong = {name for name in exact if _over_budget(name, *(x[name][:-SLACK] for x in (actual, exact, eager)))}
    return wrong | {f"{name}'s slack" for name in exact if not torch.equal(actual[name][-SLACK:], eager[name][-SLACK:])}


def dropped_numbers() -> set[str]:
    return numbers(dropout_p=0.3, dropout_seed=7)


def grouped_numbers() -> set[str]:
    return numbers(heads=4, kv_heads=2)


def leakage() -> set[str]:
    """The second half of each sequence's keys changes: of its causal rows those may that see a part of it, no other."""
    q, k, v, _ = _inputs(1, 1)
    before = attention_varlen(q, k, v, *PACKED, causal=True, impl="triton")
    wanted = []
    for start_q, start_k, len_q, len_k in zip(*(x.tolist() for x in PACKED[:2]), LENGTHS_Q, LENGTHS_K, strict=False):
        half = len_k // 2
        k[start_k + half : start_k + len_k], v[start_k + half : start_k + len_k] = 3.0, -3.0
        wanted += range(start_q + half + len_q - len_k, start_q + len_q)
    after = attention_varlen(q, k, v, *PACKED, causal=True, impl="triton")
    return set() if (after != before).flatten(1).any(1).nonzero().flatten().tolist() == wanted else {"leakage"}


def ignored_options() -> set[str]:
    q, k, v, _ = _inputs(1, 1)
    causal = torch.tensor([False, True, False, True])
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "flag": ({"causal": causal}, {"causal": ~causal}),
        "softmax_scale": ({"causal": True}, {"causal": True, "softmax_scale": 0.5}),
        "dropout_p": ({"causal": True}, {"causal": True, "dropout_p": 0.5, "dropout_seed": 1}),
        "dropout_seed": tuple({"causal": True, "dropout_p": 0.5, "dropout_seed": seed} for seed in (1, 2)),
    }
    return {
        name
        for name, (one, other) in changes.items()
        if _difference(*(attention_varlen(q, k, v, *PACKED, **x, impl="triton") for x in (one, other))) < 1e-2
    }


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b)[:-SLACK].abs().max().item()


BATTERY = (numbers, dropped_numbers, grouped_numbers, leakage, ignored_options)
VISIBILITY, FORWARD, DQ, DKDV = "triton_visibility", "triton_forward", "triton_dq", "triton_dkdv"
MODULE_OF = {"forward": FORWARD, "delta": DQ, "dq": DQ, "dkdv": DKDV}
EVERYTHING = {"out", "lse", "d_q", "d_k", "d_v"}
GRADIENTS = {"d_q", "d_k", "d_v"}
READ_PREFIX = "prefix_len = tl.load(prefix_len_ptr + seq * stride_prefix, mask=seq < num_seqs, other=0)"

# fault: (check, {what it finds wrong}, kernels replaced, changes of their sources)
MUTANTS: dict[str, tuple[Any, ...]] = {
    "a row sees one key too many": (
        leakage,
        {"leakage"},
        "forward",
        (VISIBILITY, "rows + 1 + len_k", "rows + 2 + len_k"),
    ),
    "a row sees one key too many, in every kernel": (
        numbers,
        EVERYTHING,
        "forward dq dkdv",
        (VISIBILITY, "rows + 1 + len_k", "rows + 2 + len_k"),
    ),
    "a row sees one key too few": (
        numbers,
        EVERYTHING,
        "forward dq dkdv",
        (VISIBILITY, "rows + 1 + len_k", "rows + len_k"),
    ),
    "the forward ignores the prefix": (numbers, EVERYTHING, "forward", (FORWARD, READ_PREFIX, f"{READ_PREFIX} * 0")),
    "the forward ignores the flag": (
        ignored_options,
        {"flag"},
        "forward",
        (FORWARD, READ_PREFIX, f"{READ_PREFIX} * 0"),
    ),
    "dQ ignores the prefix": (numbers, {"d_q"}, "dq", (DQ, READ_PREFIX, f"{READ_PREFIX} * 0")),
    "dK/dV ignores the prefix": (numbers, {"d_k", "d_v"}, "dkdv", (DKDV, READ_PREFIX, f"{READ_PREFIX} * 0")),
    "the forward's masked loop does not compare": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "cols[None, :] < limits[:, None]", "cols[None, :] >= 0"),
    ),
    "dQ's masked loop does not compare": (
        numbers,
        {"d_q"},
        "dq",
        (DQ, "cols[None, :] < limits[:, None]", "cols[None, :] >= 0"),
    ),
    "dK/dV's masked loop does not compare": (
        numbers,
        {"d_k", "d_v"},
        "dkdv",
        (DKDV, "first_rows[:, None] <= rows[None, :]", "rows[None, :] >= 0"),
    ),
    "the unmasked loop goes on to the last row's limit": (
        leakage,
        {"leakage"},
        "forward",
        (FORWARD, "row_limit(top, len_q", "row_limit(top + BLOCK_M - 1, len_q"),
    ),
    "the running sum is not rescaled": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "running_sum * alpha", "running_sum"),
    ),
    "the running output is not rescaled": (
        numbers,
        {"out", "d_q", "d_k"},
        "forward",
        (FORWARD, "acc * alpha[:, None]", "acc"),
    ),
    # out and d_q of such a row are cleared outside of the kernels
    "a row that sees nothing has a maximum of -inf": (
        numbers,
        {"lse", "d_k"},
        "forward",
        (FORWARD, 'tl.where(new_max == float("-inf"), 0.0, new_max)', "new_max"),
    ),
    "a row that sees nothing divides by its sum": (
        numbers,
        {"d_k"},
        "forward",
        (FORWARD, "tl.where(saw_none, 0.0, 1.0 / running_sum)", "1.0 / running_sum"),
    ),
    "queries begin at the first key's row": (
        numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "q_ptr += start_q", "q_ptr += start_k"),
    ),
    "the log-sum is a natural logarithm": (
        numbers,
        {"lse", *GRADIENTS},
        "forward",
        (FORWARD, "running_max + tl.log2(running_sum)", "(running_max + tl.log2(running_sum)) * 0.6931471805599453"),
    ),
    "slack rows are not written": (
        numbers,
        {f"{x}'s slack" for x in ("out", *GRADIENTS)},
        "forward dq dkdv",
        (VISIBILITY, "tl.range(first, stop, step)", "tl.range(first, first, step)"),
    ),
    "slack log-sums are not written": (
        numbers,
        {"lse's slack"},
        "forward",
        (FORWARD, "tl.range(first_slack, total_q, step)", "tl.range(first_slack, first_slack, step)"),
    ),
    "a key is seen from one row later": (
        numbers,
        {"d_k", "d_v"},
        "dkdv",
        (VISIBILITY, "tl.maximum(col + len_q - len_k, 0)", "tl.maximum(col + 1 + len_q - len_k, 0)"),
    ),
    "a key is seen from one row earlier": (
        numbers,
        {"d_k", "d_v"},
        "dkdv",
        (VISIBILITY, "tl.maximum(col + len_q - len_k, 0)", "tl.maximum(col - 1 + len_q - len_k, 0)"),
    ),
    "the last rows of a sequence are lost": (
        numbers,
        {"d_k", "d_v"},
        "dkdv",
        (DKDV, "has_tail = (len_q % BLOCK_M != 0)", "has_tail = (len_q < 0)"),
    ),
    "the whole row tiles are lost": (
        numbers,
        {"d_k", "d_v"},
        "dkdv",
        (DKDV, "num_whole = tl.maximum(whole_tiles - all_see, 0)", "num_whole = 0"),
    ),
    "dK is not scaled": (numbers, {"d_k"}, "dkdv", (DKDV, "dk * softmax_scale", "dk")),
    "dQ is not scaled": (numbers, {"d_q"}, "dq", (DQ, "dq * softmax_scale", "dq")),
    "only the first head of a group counts": (
        grouped_numbers,
        {"d_k", "d_v"},
        "dkdv",
        (DKDV, "tl.range(0, group)", "tl.range(0, 1)"),
    ),
    "a query head takes another group's keys": (
        grouped_numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "(head // group)", "(head % (heads // group))"),
    ),
    "dQ ignores delta": (numbers, {"d_q"}, "dq", (DQ, "(dp - delta[:, None])", "dp")),
    "dK/dV ignores delta": (numbers, {"d_k"}, "dkdv", (DKDV, "(dp - delta[None, :])", "dp")),
    "delta is of the wrong head": (
        grouped_numbers,
        {"d_q", "d_k"},
        "delta",
        (DQ, "delta_ptr + head.to(tl.int64) * total_q", "delta_ptr + (heads - 1 - head).to(tl.int64) * total_q"),
    ),
    "the forward ignores the seed": (
        ignored_options,
        {"dropout_seed"},
        "forward",
        (FORWARD, "tl.load(dropout_seed_ptr)", "tl.load(dropout_seed_ptr) * 0"),
    ),
    "dQ's dropout mask is transposed": (
        dropped_numbers,
        {"d_q"},
        "dq",
        (VISIBILITY, "groups[None, :], packed_rows[:, None]", "packed_rows[:, None], groups[None, :]"),
    ),
    "dK/dV's dropout mask is transposed": (
        dropped_numbers,
        {"d_k", "d_v"},
        "dkdv",
        (VISIBILITY, "groups[:, None], packed_rows[None, :]", "packed_rows[None, :], groups[:, None]"),
    ),
    "four keys take their words in another order": (
        dropped_numbers,
        {"out", "d_q", "d_k"},
        "forward",
        (VISIBILITY, "tl.join(tl.join(k0, k2), tl.join(k1, k3))", "tl.join(tl.join(k0, k1), tl.join(k2, k3))"),
    ),
    "dK/dV's keys take their words in another order": (
        dropped_numbers,
        {"d_k", "d_v"},
        "dkdv",
        (VISIBILITY, "permute(0, 2, 3, 1)", "permute(0, 3, 2, 1)"),
    ),
    "the forward's dropout mask is one row further": (
        dropped_numbers,
        {"out", "d_q", "d_k"},
        "forward",
        (FORWARD, "kept_keys(seed, packed_rows, col", "kept_keys(seed, packed_rows + 1, col"),
    ),
    "dropout does not scale what it keeps": (
        dropped_numbers,
        {"out", "d_q", "d_k"},
        "forward",
        (FORWARD, "inverse_sum *= inverse_keep", "inverse_sum *= 1.0"),
    ),
    "dV forgets dropout's scale": (
        dropped_numbers,
        {"d_v"},
        "dkdv",
        (DKDV, "(p * weight)", "tl.where(kept, p, 0.0)"),
    ),
    "dV forgets dropout": (dropped_numbers, {"d_v"}, "dkdv", (DKDV, "(p * weight)", "p")),
    "dK forgets dropout": (dropped_numbers, {"d_k"}, "dkdv", (DKDV, "dp *= weight", "dp *= inverse_keep")),
    "dropout changes the softmax's denominator": (
        dropped_numbers,
        EVERYTHING,
        "forward",
        (FORWARD, "        running_sum = running_sum * alpha + tl.sum(p, 1)\n", ""),
        (
            FORWARD,
            "        acc = tl.dot(p.to(",
            "        running_sum = running_sum * alpha + tl.sum(p, 1)\n        acc = tl.dot(p.to(",
        ),
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_caught(fault: str, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    check, found, kernels, *changes = MUTANTS[fault]
    built = variant(*changes)
    for kernel in kernels.split():
        module = built[MODULE_OF[kernel]]
        monkeypatch.setattr(triton_launches, f"{kernel}_kernel", getattr(module, f"{kernel}_kernel"))
    assert check() == found


def test_kernels_without_a_fault_pass_every_check(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, and copies of them: it is the fault that is caught, not the copying."""
    assert {check.__name__: check() for check in BATTERY} == {check.__name__: set() for check in BATTERY}
    built = variant()
    for kernel in ("forward", "delta", "dq", "dkdv"):
        module = built[MODULE_OF[kernel]]
        monkeypatch.setattr(triton_launches, f"{kernel}_kernel", getattr(module, f"{kernel}_kernel"))
    assert numbers() == set()
