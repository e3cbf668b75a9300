"""Faults that only memory shows: an attention kernel without one of its masks must fail where it reads or writes.

The interpreter does not see them. It runs programs one after another, so rows that a sequence writes into the next are
written again; and past a tensor's end it reads and writes whatever is there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from antlm_fast.kernels.attention import attention_varlen

pytest.importorskip("triton")

from antlm_fast.kernels.attention import triton_launches
from antlm_fast.kernels.triton_support.launch import Tile

Executing = Callable[[str], AbstractContextManager[list[str]]]
Variant = Callable[..., dict[str, ModuleType]]
VISIBILITY, FORWARD, DQ, DKDV = "triton_visibility", "triton_forward", "triton_dq", "triton_dkdv"
MODULE_OF = {"forward": FORWARD, "delta": DQ, "dq": DQ, "dkdv": DKDV}
UNMASKED_LOADS = (VISIBILITY, "mask=(rows < stop)[:, None]", "mask=(rows >= 0)[:, None]")
# lengths and slack rows; tiles are of 32
ALONE, SLACK, PACKED = ((17,), 0), ((17,), 3), ((17, 47), 128)


@pytest.fixture(scope="module")
def variant() -> Iterator[Variant]:
    """The folder of benchmarks is no installed package: it is importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3]))
        yield importlib.import_module("benchmarks.variants").variant
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def _train_step(lengths: tuple[int, ...], slack: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rows = sum(lengths) + slack
    q, k, v = (torch.randn(rows, 1, 64).bfloat16().requires_grad_() for _ in range(3))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    out = attention_varlen(q, k, v, starts, starts, longest, longest, causal=torch.tensor(True), impl="triton")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


# fault: (kernel, (module, its text, the text in its place), batch, what the fault says)
MUTANTS = {
    "out's rows": (
        "forward",
        (FORWARD, "element_ty), mask=inside)", "element_ty))"),
        ALONE,
        "past the end .* `out_ptr`",
    ),
    "out's rows, packed": (
        "forward",
        (FORWARD, "element_ty), mask=inside)", "element_ty))"),
        PACKED,
        "program instances .* `out_ptr`",
    ),
    "the log-sums' rows": (
        "forward",
        (FORWARD, "log2_sum, mask=rows < len_q)", "log2_sum)"),
        ALONE,
        "past the end .* `log2_sums_ptr`",
    ),
    "the slack's last log-sums": (
        "forward",
        (FORWARD, "slack_rows < total_q", "slack_rows >= 0"),
        SLACK,
        "past the end .* `log2_sums_ptr`",
    ),
    "the slack's last rows": (
        "forward",
        (VISIBILITY, "inside = (rows < stop)[:, None]", "inside = (rows >= 0)[:, None]"),
        SLACK,
        "past the end .* `out_ptr`",
    ),
    "the forward's queries": (
        "forward",
        (FORWARD, "dims[None, :], mask=inside, other=0.0)", "dims[None, :])"),
        ALONE,
        "past the end .* `q_ptr`",
    ),
    "the forward's last keys": ("forward", UNMASKED_LOADS, ALONE, "past the end .* `k_ptr`"),
    "dQ's rows": (
        "dq",
        (DQ, "dq_ptr.dtype.element_ty), mask=inside)", "dq_ptr.dtype.element_ty))"),
        ALONE,
        "past the end .* `dq_ptr`",
    ),
    "dQ's rows, packed": (
        "dq",
        (DQ, "dq_ptr.dtype.element_ty), mask=inside)", "dq_ptr.dtype.element_ty))"),
        PACKED,
        "program instances .* `dq_ptr`",
    ),
    "dQ's last keys": ("dq", UNMASKED_LOADS, ALONE, "past the end .* `k_ptr`"),
    "dV's rows": (
        "dkdv",
        (DKDV, "dv_ptr.dtype.element_ty), mask=inside)", "dv_ptr.dtype.element_ty))"),
        ALONE,
        "past the end .* `dv_ptr`",
    ),
    "dK/dV's last queries": ("dkdv", UNMASKED_LOADS, ALONE, "past the end .* `q_ptr`"),
    "delta's rows": (
        "delta",
        (DQ, "1), mask=rows < total_q)", "1))"),
        ALONE,
        "past the end .* `delta_ptr`",
    ),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_missing_mask_is_caught(
    executing_ttgir: Executing, variant: Variant, monkeypatch: pytest.MonkeyPatch, fault: str, arch: str
) -> None:
    from ttsem.sanitize import KernelFault

    kernel, change, batch, message = MUTANTS[fault]
    module = variant(change)[MODULE_OF[kernel]]
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 32, 4, 2))
    monkeypatch.setattr(triton_launches, f"{kernel}_kernel", getattr(module, f"{kernel}_kernel"))
    with pytest.raises(KernelFault, match=message), executing_ttgir(arch):
        _train_step(*batch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_same_steps_without_a_fault_are_accepted(
    executing_ttgir: Executing, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 32, 4, 2))
    batches = (ALONE, SLACK, PACKED)
    with executing_ttgir(arch) as modules:
        results = [_train_step(*batch) for batch in batches]
    assert len(modules) == 4 * len(batches)
    for (lengths, slack), tensors in zip(batches, results, strict=True):
        used = sum(lengths)
        assert all(torch.isfinite(x).all() and x[:used].any() for x in tensors)
        assert not any(x[used:].any() for x in tensors), f"{slack} slack rows"
