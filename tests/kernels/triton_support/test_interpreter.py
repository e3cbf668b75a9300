"""bfloat16 in Triton's interpreter, bit for bit against torch; and tl.philox against this package's philox."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from antlm_fast.kernels.philox import philox
from antlm_fast.kernels.triton_support.interpreter import correct_interpreter, interpreting

if not interpreting():
    pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

# what the interpreter of older Triton computes otherwise, in every dtype; no kernel of the package depends on it
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
before_3_8 = pytest.mark.skipif(VERSION < (3, 8), reason="Triton before 3.8: -x is 0 - x, a maximum with NaN is NaN")
before_3_9 = pytest.mark.skipif(VERSION < (3, 9), reason="Triton before 3.9: the constant -0.0 is 0.0")
BF16_MAX = torch.finfo(torch.bfloat16).max


@pytest.fixture(autouse=True)
def corrected() -> None:
    correct_interpreter()
    correct_interpreter()  # a second call must not widen twice


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def some_bfloat16(seed: int) -> torch.Tensor:
    """All of them, shuffled, so that pairs meet across signs, exponents, infinities and NaNs."""
    return every_bfloat16()[torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))].contiguous()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    differs = (bits(got) != bits(expected)) & ~(got.isnan() & expected.isnan())
    assert not differs.any(), f"{int(differs.sum())} differ: {got[differs][:4]}, not {expected[differs][:4]}"


@triton.jit
def _cast(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def _cast_rtne(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtne"))


def cast(x: torch.Tensor, dtype: torch.dtype, kernel: Any = _cast) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    kernel[(1,)](x, y, x.numel())
    return y


@pytest.mark.parametrize("kernel", [_cast, _cast_rtne], ids=["default", "rtne"])
@pytest.mark.parametrize("low_half", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_rounds_to_bfloat16_ties_to_even(low_half: int, kernel: Any) -> None:
    # with every high half: subnormals, both zeros, infinities, NaNs, and what overflows to infinity
    x = ((torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) | low_half).view(torch.float32)
    assert_same_bits(cast(x, torch.bfloat16, kernel), x.to(torch.bfloat16))


@pytest.mark.parametrize("kernel", [_cast, _cast_rtne], ids=["default", "rtne"])
def test_float32_rounds_to_float16_ties_to_even(kernel: Any) -> None:
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    for x in (exact, exact * (1 + 2.0**-11), exact * (1 + 2.0**-12), exact * (1 + 2.0**-11 + 2.0**-20)):
        assert_same_bits(cast(x, torch.float16, kernel), x.to(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_casts_to_other_floats(dtype: torch.dtype) -> None:
    assert_same_bits(cast(every_bfloat16(), dtype), every_bfloat16().to(dtype))


def test_integers_cast_to_bfloat16_and_back() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for scaled in (x, x * 2**10, x * 2**16 + 2**15):
        assert_same_bits(cast(scaled, torch.bfloat16), scaled.to(torch.bfloat16))
    fits = every_bfloat16().where(every_bfloat16().abs() < 2.0**31, torch.tensor(-3.5, dtype=torch.bfloat16))
    assert torch.equal(cast(fits, torch.int32), fits.to(torch.int32))


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "constant":
        z = x * 0.1 + 1.0
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "where":
        z = tl.where(x > y, x, y)
    elif OP == "full":
        z = tl.full((SIZE,), 0.1, dtype=tl.bfloat16) + tl.zeros((SIZE,), dtype=tl.bfloat16)
    elif OP == "exp2":
        z = tl.exp2(x.to(tl.float32)).to(tl.bfloat16)
    else:
        z = tl.fma(x, y, x)
    tl.store(out_ptr + at, z)


ARITHMETIC = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "constant": lambda x, y: x * torch.tensor(0.1, dtype=torch.bfloat16) + 1.0,
    # torch.fmax gives NaN for a signalling NaN
    "maximum": lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))),
    "where": lambda x, y: torch.where(x > y, x, y),
    "full": lambda x, y: torch.full_like(x, 0.1),
    "exp2": lambda x, y: torch.exp2(x.float()).to(torch.bfloat16),
    "fma": lambda x, y: (x.double() * y.double() + x.double()).float().to(torch.bfloat16),
}


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[before_3_8] if op in ("neg", "maximum") else []) for op in ARITHMETIC]
)
def test_arithmetic(op: str) -> None:
    x, y = some_bfloat16(0), some_bfloat16(1)
    if op == "maximum":  # which zero wins is nobody's promise
        y = y.where(y != 0, torch.ones((), dtype=y.dtype))
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, x.numel(), op)
    assert_same_bits(out, ARITHMETIC[op](x, y))


@triton.jit
def _compare(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x < y)
    tl.store(out_ptr + SIZE + at, x <= y)
    tl.store(out_ptr + 2 * SIZE + at, x > y)
    tl.store(out_ptr + 3 * SIZE + at, x >= y)
    tl.store(out_ptr + 4 * SIZE + at, x == y)
    tl.store(out_ptr + 5 * SIZE + at, x != y)
    tl.store(out_ptr + 6 * SIZE + at, x < 0.1)


def test_comparisons() -> None:
    x = some_bfloat16(0)
    x[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=torch.bfloat16)
    y = some_bfloat16(1).where(torch.arange(2**16) % 4 > 0, x)
    y[:2] = torch.tensor([-0.0, 0.0], dtype=torch.bfloat16)
    out = torch.empty(7, x.numel(), dtype=torch.bool)
    _compare[(1,)](x, y, out, x.numel())
    tenth = torch.tensor(0.1, dtype=torch.bfloat16)
    assert torch.equal(out, torch.stack([x < y, x <= y, x > y, x >= y, x == y, x != y, x < tenth]))


@triton.jit
def _masked_load(x_ptr, out_ptr, length, SIZE: tl.constexpr, OTHER: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < length, other=OTHER))


@pytest.mark.parametrize("other", [0.0, -float("inf"), 0.1, pytest.param(-0.0, marks=before_3_9)])
def test_masked_load_fills_with_other(other: float) -> None:
    x = some_bfloat16(0)[:64]
    out = torch.empty_like(x)
    _masked_load[(1,)](x, out, 37, 64, other)
    assert_same_bits(out, torch.cat([x[:37], torch.full((27,), other, dtype=torch.bfloat16)]))


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reduce(x_ptr, out_ptr, where_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.arange(0, ROWS)
    x = tl.load(x_ptr + row[:, None] * COLS + tl.arange(0, COLS)[None, :])
    tl.store(out_ptr + row, tl.max(x, 1))
    tl.store(out_ptr + ROWS + row, tl.min(x, axis=1))
    tl.store(out_ptr + 2 * ROWS + row, tl.sum(x, axis=1))
    tl.store(out_ptr + 3 * ROWS + row, tl.sum(x.to(tl.float32), axis=1))
    tl.store(out_ptr + 4 * ROWS + row, tl.reduce(x, 1, _larger))
    largest, where = tl.max(x, axis=1, return_indices=True)
    tl.store(out_ptr + 5 * ROWS + row, largest)
    tl.store(where_ptr + row, where)


def test_reductions() -> None:
    # multiples of 1/8 below 4: every partial sum is exact in float32, so the order of the sum does not matter
    x = (torch.randint(-31, 32, (16, 64), generator=torch.Generator().manual_seed(0)) / 8).to(torch.bfloat16)
    x[0] = -x[0].abs() - 1
    out, where = torch.empty(6, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int32)
    _reduce[(1,)](x, out, where, 16, 64)
    largest, total = x.amax(1), x.float().sum(1).to(torch.bfloat16)
    for got, expected in zip(out, (largest, x.amin(1), total, total, largest, largest), strict=True):
        assert_same_bits(got, expected)
    assert torch.equal(where.long(), (x == largest[:, None]).int().argmax(1))


@triton.jit
def _dot(a_ptr, b_ptr, acc_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, col, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + row * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + col)
    acc = tl.load(acc_ptr + row * N + col)
    tl.store(out_ptr + row * N + col, tl.dot(a, b, acc, out_dtype=acc_ptr.dtype.element_ty))
    tl.store(out_ptr + M * N + row * N + col, tl.dot(a, b))
    tl.store(out_ptr + 2 * M * N + row * N + col, tl.dot(tl.trans(b), tl.trans(a)).trans())


def dot(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(3, m, n, dtype=acc.dtype)
    _dot[(1,)](a, b, acc, out, m, n, k)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_is_exact_where_float32_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # whole numbers whose products and sums need more bits than dtype has, and fewer than float32 has
    a, b = (torch.randint(-120, 121, size, generator=generator).to(dtype) for size in ((32, 64), (64, 16)))
    acc = torch.randint(-9999, 10000, (32, 16), generator=generator).float()
    product = a.float() @ b.float()
    assert_same_bits(dot(a, b, acc), torch.stack([product + acc, product, product]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_random_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, acc = (torch.randn(size, generator=generator) for size in ((32, 64), (64, 16), (32, 16)))
    a, b = a.to(dtype), b.to(dtype)
    product = a.double() @ b.double()
    expected = torch.stack([product + acc, product, product])
    torch.testing.assert_close(dot(a, b, acc).double(), expected, rtol=0, atol=2e-5)


def test_dot_into_float16_accumulates_in_float32() -> None:
    a, b = torch.ones(16, 64, dtype=torch.float16), torch.ones(64, 16, dtype=torch.float16)
    a[:, 0], a[:, 63] = 2048.0, -2048.0  # at 2048 float16 cannot count on by ones
    acc = torch.ones(16, 16, dtype=torch.float16)
    assert dot(a, b, acc)[0].unique().tolist() == [63.0]


@triton.jit
def _philox(seed_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, head):
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    # counters of different shapes, int32 like the kernels' own
    word0, word1, word2, word3 = tl.philox(tl.load(seed_ptr), cols + (2**31 - 8), rows + 70000, head, 0, 7)
    at = out_ptr + rows * COLS + cols
    tl.store(at, word0)
    tl.store(at + ROWS * COLS, word1)
    tl.store(at + 2 * ROWS * COLS, word2)
    tl.store(at + 3 * ROWS * COLS, word3)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32, 2**31, 2**63 - 1, -1, -(2**63), -(2**63) + 1, 0x123456789ABCDEF0])
def test_philox_draws_the_same_words(seed: int) -> None:
    rows, cols, head = 8, 8, 11
    words = torch.empty(4, rows, cols, dtype=torch.uint32)
    _philox[(1,)](torch.tensor(seed), words, rows, cols, head)
    query_rows, key_rows = torch.arange(rows)[:, None] + 70000, torch.arange(cols) + (2**31 - 8)
    expected = philox(torch.tensor(seed), key_rows, query_rows, torch.tensor(head), torch.tensor(0))
    assert torch.equal(words.long(), torch.stack(expected))
