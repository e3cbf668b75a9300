"""That executing a GPU's TTGIR tells right kernels from wrong ones: each planted mistake must be caught."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

Executing = Callable[[str], AbstractContextManager[list[str]]]


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    inner,
    MASK_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (rows, 64) = a (rows, inner) @ b (inner, 64), 64 rows a program, STEP rows apart."""
    row = tl.program_id(0) * STEP + tl.arange(0, 64)[:, None]
    col, at = tl.arange(0, 64)[None, :], tl.arange(0, 32)
    inside = row < rows if MASK_ROWS else row >= 0
    acc = tl.zeros((64, 64), tl.float32)
    for start in tl.range(0, inner, 32):
        a = tl.load(a_ptr + row * inner + (start + at)[None, :], mask=inside, other=0.0)
        b = tl.load(b_ptr + (start + at)[:, None] * 64 + col)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + row * 64 + col, acc, mask=inside)


def product(
    a: torch.Tensor, b: torch.Tensor, *, mask_rows: bool = True, step: int = 64, precision: str = "tf32"
) -> torch.Tensor:
    rows, inner = a.shape
    out = a.new_empty(rows, 64, dtype=torch.float32)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    _product[(triton.cdiv(rows, step),)](a, b, out, rows, inner, mask_rows, step, precision, **options)
    return out


def operands(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 128, generator=generator), torch.randn(128, 64, generator=generator)
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.bfloat16, "tf32", 3e-5),
        (torch.float16, "tf32", 3e-5),
        (torch.float32, "ieee", 3e-5),
        (torch.float32, "tf32", 4e-2),
    ],
    ids=["bfloat16", "float16", "float32", "tf32"],
)
@pytest.mark.parametrize(
    ("arch", "instruction"), [("sm_80", "tt.dot"), ("sm_90", "ttng.warp_group_dot"), ("sm_100", "ttng.tc_gen5_mma")]
)
def test_a_pipelined_product_is_right(
    executing_ttgir: Executing, arch: str, instruction: str, dtype: torch.dtype, precision: str, tolerance: float
) -> None:
    a, b = operands(100, dtype)
    with executing_ttgir(arch) as modules:
        out = product(a, b, precision=precision)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=tolerance)
    (module,) = modules
    assert "ttg.async_copy_global_to_local" in module
    if precision != "ieee":  # which takes the fused multiply-adds of plain arithmetic
        assert instruction in module
    if (dtype, precision) == (torch.float32, "tf32"):
        error = (out.double() - a.double() @ b.double()).abs().max()
        assert error > 1e-3, "tf32 was not rounded"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_an_access_outside_a_tensor_is_an_error(executing_ttgir: Executing, arch: str) -> None:
    from ttsem.sanitize import KernelFault

    a, b = operands(100, torch.bfloat16)
    message = "a = tl.load.* past the end of the tensor passed as `a_ptr`"
    with pytest.raises(KernelFault, match=message), executing_ttgir(arch):
        product(a, b, mask_rows=False)


@triton.jit
def _add_into(x_ptr, out_ptr):
    at = tl.arange(0, 64)
    tl.store(out_ptr + at, tl.load(out_ptr + at) + tl.load(x_ptr + at))


def add_into(x: torch.Tensor, out: torch.Tensor, programs: int) -> None:
    _add_into[(programs,)](x, out, enable_fp_fusion=True)


def test_an_overrun_that_lands_in_another_tensor_is_an_error(executing_ttgir: Executing) -> None:
    from ttsem.sanitize import KernelFault

    both = np.zeros(96, dtype=np.float32)
    x, out = torch.from_numpy(both[:32]), torch.from_numpy(both[32:])
    with pytest.raises(KernelFault, match=r"reads 32 element\(s\) past .* `x_ptr`"), executing_ttgir("sm_80"):
        add_into(x, out, 1)


def test_programs_that_write_the_same_rows_are_a_race(executing_ttgir: Executing) -> None:
    from ttsem.sanitize import KernelFault

    with executing_ttgir("sm_90"):
        add_into(torch.ones(64), torch.zeros(64), 1)
    with pytest.raises(KernelFault, match="program instances .* `out_ptr`"), executing_ttgir("sm_90"):
        add_into(torch.ones(64), torch.zeros(64), 2)


def test_memory_that_no_program_wrote_is_nan(executing_ttgir: Executing) -> None:
    a, b = operands(128, torch.bfloat16)
    with executing_ttgir("sm_80"):
        out = product(a, b, step=128)
    assert not out[:64].isnan().any()
    assert out[64:].isnan().all()


def test_everything_is_put_back(executing_ttgir: Executing) -> None:
    from triton.runtime.driver import driver

    def state() -> tuple[Any, ...]:
        x = torch.zeros(1)
        return (
            torch.cuda.is_available(),
            torch.cuda.device,
            x.is_cuda,
            x.device,
            getattr(driver, "_active", None),
            triton.runtime.JITFunction.run,
        )

    before = state()
    a, b = operands(64, torch.bfloat16)
    with executing_ttgir("sm_80"):
        assert a.is_cuda
        product(a, b)
    assert state() == before


def test_other_compilations_print_as_before(executing_ttgir: Executing, tmp_path: Any, monkeypatch: Any) -> None:
    from antlm_fast.kernels.triton_support.offline import compile_offline, target

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    a, b = operands(64, torch.bfloat16)
    with executing_ttgir("sm_80") as modules:
        product(a, b)
    assert '"builtin.module"' in modules[0]
    x = torch.zeros(64)
    compiled = compile_offline(_add_into, {"x_ptr": x, "out_ptr": x}, target("sm_80"), num_warps=4, num_stages=3)
    assert '"builtin.module"' not in compiled.asm["ttgir"]
