"""The C++ gradient of a linear layer's weight against float64: every edge of its blocks, and what memory it touches."""

import math

import pytest
import torch

from antlm_fast.kernels.native.weight_gradient import no_tiles_reason, weight_gradient
from antlm_fast.testing.budget import assert_within_budget

REASON = no_tiles_reason("cpu", torch.bfloat16)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def drawn(rows, out_rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(rows, size, generator=generator).to(BFLOAT16) for size in (out_rows, columns))
    return dy, x


def plain(dy, x, dtype):
    return dy.to(dtype).t() @ x.to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 255, 256, 257, 600])
@pytest.mark.parametrize(
    ("out_rows", "columns"), [(1, 1), (32, 32), (33, 31), (16, 100), (100, 16), (257, 64), (520, 40), (0, 5), (5, 0)]
)
def test_numbers(rows, out_rows, columns):
    dy, x = drawn(rows, out_rows, columns)
    exact, eager = plain(dy, x, torch.float64), plain(dy, x, FLOAT32)
    for dtype in (FLOAT32, BFLOAT16):
        sums = torch.full((out_rows,), math.nan)
        found = weight_gradient(dy, x, dtype=dtype, column_sums=sums)
        assert found.dtype == dtype
        if found.numel():
            # terms of size 1 that cancel: a single sum may come out small, and plain code's error with it
            assert_within_budget("gradient", found, exact, eager.to(dtype), slack=3.0, scale=math.sqrt(rows))
        if out_rows:
            assert_within_budget("sums", sums, dy.double().sum(0), dy.float().sum(0), scale=math.sqrt(rows))
        assert torch.equal(found, weight_gradient(dy, x, dtype=dtype))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_what_is_there_may_be_added_to(dtype):
    dy, x = drawn(70, 45, 50)
    before = torch.randn(45, 50).to(dtype)
    found = weight_gradient(dy, x, out=before.clone(), add=True)
    exact = before.double() + plain(dy, x, torch.float64)
    assert_within_budget("sum", found, exact, (before.float() + plain(dy, x, FLOAT32)).to(dtype))
    assert torch.equal(weight_gradient(dy, x, out=before.clone()), weight_gradient(dy, x, dtype=dtype))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_nothing_is_written_beside_the_result(dtype):
    dy, x = drawn(40, 35, 37)
    around = torch.full((37, 41), 3.0, dtype=dtype)
    out = around[1:36, 2:39]
    sums = torch.full((37,), 3.0)
    weight_gradient(dy, x, out=out, column_sums=sums[1:36])
    assert torch.equal(out, weight_gradient(dy, x, dtype=dtype))
    out.fill_(3.0)
    assert (around == 3.0).all()
    assert sums[0] == sums[36] == 3.0


def test_nothing_is_read_beside_the_factors():
    """Neither NaN that lies between rows nor rows of a former call may get into a result."""
    dy, x = drawn(40, 35, 37)
    wanted = weight_gradient(dy, x)
    weight_gradient(torch.full((512, 512), math.nan, dtype=BFLOAT16), torch.full((512, 64), math.nan, dtype=BFLOAT16))
    wide = [torch.full((42, 64), math.nan, dtype=BFLOAT16) for _ in range(2)]
    inner = [each[1:41, 3 : 3 + size] for each, size in zip(wide, (35, 37), strict=True)]
    for narrow, values in zip(inner, (dy, x), strict=True):
        narrow.copy_(values)
    assert torch.equal(weight_gradient(*inner), wanted)


def test_any_strides():
    dy, x = drawn(70, 45, 50)
    wanted = weight_gradient(dy, x)
    assert torch.equal(weight_gradient(dy.t().contiguous().t(), x.t().contiguous().t()), wanted)
    ones = torch.ones((), dtype=BFLOAT16).expand(70, 45)
    assert torch.equal(weight_gradient(ones, x), weight_gradient(ones.contiguous(), x))


def test_the_number_of_threads_changes_no_bit():
    dy, x = drawn(600, 700, 90)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            sums = torch.empty(700)
            found.append((weight_gradient(dy, x, dtype=FLOAT32, column_sums=sums), sums))
    finally:
        torch.set_num_threads(threads)
    for each in found[1:]:
        assert torch.equal(each[0], found[0][0])
        assert torch.equal(each[1], found[0][1])


def test_what_is_not_finite_is_seen():
    dy, x = drawn(40, 35, 37)
    dy[39, 34] = math.inf
    found = weight_gradient(dy, x)
    assert not found[34].isfinite().any()
    assert found[:34].isfinite().all()
