"""The mixed-precision linear layer: its numbers, gradients and messages."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.mixed_linear import mixed_linear
from antlm_fast.kernels.native.weight_gradient import no_tiles_reason
from antlm_fast.kernels.working_copies import KeptCopies, destination
from antlm_fast.testing.budget import assert_within_budget

ROWS = (24, 8, 16)
IN_FEATURES = 40
NATIVE_REASON = no_tiles_reason("cpu", torch.bfloat16)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(NATIVE_REASON is not None, reason=str(NATIVE_REASON)))
PLAIN = ("torch", "reference")
KEEPING = ("torch", NATIVE)
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def parameters(rows=ROWS, biases=(True, False, True), dtype=FLOAT32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def made(*shape):
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype))

    weights = [made(size, IN_FEATURES) for size in rows]
    return weights, [made(size) if has else None for size, has in zip(rows, biases, strict=False)]


def inputs(n=33, dtype=FLOAT32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, IN_FEATURES, generator=generator, dtype=FLOAT64).to(dtype).requires_grad_()


def run(impl, x, weights, biases, autocast=None):
    """y and the gradients of a sum of its elements with different weights, by x, weights and biases."""
    with torch.autocast("cpu", autocast or BFLOAT16, enabled=autocast is not None):
        y = mixed_linear(x, weights, biases, impl=impl)
    held = [x, *weights, *(bias for bias in biases or () if bias is not None)]
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=FLOAT64).to(y.dtype)
    gradients = torch.autograd.grad(y, held, upstream)
    for tensor, gradient in zip(held, gradients, strict=True):
        assert gradient.dtype == tensor.dtype
    return y, gradients


# x's dtype, the weights', autocast's, the products'
CASES = {
    "autocast": (FLOAT32, FLOAT32, BFLOAT16, BFLOAT16),
    "autocast, narrow input": (BFLOAT16, FLOAT32, BFLOAT16, BFLOAT16),
    "autocast to float16": (FLOAT32, FLOAT32, FLOAT16, FLOAT16),
    "narrow input": (BFLOAT16, FLOAT32, None, BFLOAT16),
    "all bfloat16": (BFLOAT16, BFLOAT16, None, BFLOAT16),
    "all float32": (FLOAT32, FLOAT32, None, FLOAT32),
}


@pytest.mark.parametrize("biases", [None, (True, True, True), (True, False, True)], ids=("none", "all", "some"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", [*PLAIN, NATIVE])
def test_numbers(impl, case, biases):
    x_dtype, dtype, autocast, compute_dtype = CASES[case]
    rows = ROWS[: 3 if biases else 1]
    weights, given = parameters(rows, biases or (), dtype)
    x = inputs(dtype=x_dtype)
    if impl == "native" and (dtype == compute_dtype or compute_dtype == FLOAT16):
        with pytest.raises(UnsupportedError):
            run(impl, x, weights, given if biases else None, autocast)
        return
    y, gradients = run(impl, x, weights, given if biases else None, autocast)
    assert y.dtype == compute_dtype

    def plain(dtype):
        """Each layer by itself, in one dtype from start to end; gradients in it too."""
        tensors = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, *weights, *given)]
        head, layers, added = tensors[0], tensors[1 : 1 + len(rows)], tensors[1 + len(rows) :]
        return run("reference", head, layers, added if biases else None)

    exact, exact_gradients = plain(FLOAT64)
    eager, eager_gradients = plain(compute_dtype)
    assert_within_budget("y", y, exact, eager)
    for found, wanted, rounded in zip(gradients, exact_gradients, eager_gradients, strict=True):
        # rounded as the products are, whatever dtype they arrive in
        assert_within_budget("gradient", found.to(compute_dtype), wanted, rounded, slack=3.0)


@pytest.mark.parametrize("impl", PLAIN)
def test_float64_is_exact(impl):
    weights, biases = parameters(dtype=FLOAT64)
    x = inputs(dtype=FLOAT64)
    with torch.autocast("cpu", BFLOAT16):  # leaves float64 alone
        y = mixed_linear(x, weights, biases, impl=impl)
    wanted = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=1)
    torch.testing.assert_close(y, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("impl", [*PLAIN, NATIVE])
def test_few_rows(impl, n):
    weights, biases = parameters()
    x = inputs(n)
    y, gradients = run(impl, x, weights, biases, BFLOAT16)
    assert y.shape == (n, sum(ROWS))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if n == 0:
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("impl", KEEPING)
def test_strides_do_not_matter(impl):
    weights, biases = parameters()
    x = inputs().detach()
    wide = torch.stack([x, -x], dim=1)[:, 0]
    assert not wide.is_contiguous()
    one = torch.ones((), dtype=BFLOAT16)
    found = []
    for given in (x.requires_grad_(), wide.requires_grad_()):
        with torch.autocast("cpu", BFLOAT16):
            y = mixed_linear(given, weights, biases, impl=impl)
        found.append((y, *torch.autograd.grad(y, [given, *weights], one.expand(y.shape))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", KEEPING)
def test_each_input_alone_gets_its_gradient(impl):
    weights, biases = parameters()
    x = inputs()
    _, wanted = run(impl, x, weights, biases, BFLOAT16)
    every = [x, *weights, biases[0], biases[2]]
    for place, chosen in enumerate(every):
        for tensor in every:
            tensor.requires_grad_(tensor is chosen)
        with torch.autocast("cpu", BFLOAT16):
            y = mixed_linear(x, weights, biases, impl=impl)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=FLOAT64).to(y.dtype)
        (found,) = torch.autograd.grad(y, [chosen], upstream)
        # a bias alone is summed elsewhere
        torch.testing.assert_close(found, wanted[place], rtol=1e-5, atol=1e-5)
    for tensor in every:
        tensor.requires_grad_(False)
    with torch.autocast("cpu", BFLOAT16):
        assert not mixed_linear(x, weights, biases).requires_grad


def test_a_weight_used_twice_gets_the_sum():
    (weight,), _ = parameters((8,), ())
    x = inputs()
    with torch.autocast("cpu", BFLOAT16):
        mixed_linear(x, [weight]).sum().backward()
        once = weight.grad.clone()
        weight.grad = None
        (mixed_linear(x, [weight]).sum() + mixed_linear(x, [weight, weight])[:, 8:].sum()).backward()
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-2, atol=1e-2)


def test_inference_first_does_not_spoil_training():
    weights, biases = parameters()
    x = inputs()
    with torch.inference_mode(), torch.autocast("cpu", BFLOAT16):
        mixed_linear(x.detach(), weights, biases)
    y, gradients = run("torch", x, weights, biases, BFLOAT16)
    wanted, wanted_gradients = run("reference", x, weights, biases, BFLOAT16)
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_transforms_of_functions_do_not_meet_copies():
    weights, _ = parameters((8,), ())
    x = inputs().detach()

    def loss(weight):
        with torch.autocast("cpu", BFLOAT16):
            return mixed_linear(x, [weight]).float().square().sum()

    found = torch.func.grad(loss)(weights[0].detach())
    loss(weights[0]).backward()
    torch.testing.assert_close(found, weights[0].grad, rtol=2e-2, atol=0.5)


def test_it_compiles_whole():
    weights, biases = parameters()
    x = inputs()
    compiled = torch.compile(mixed_linear, fullgraph=True, backend="aot_eager")
    with KeptCopies().in_use():
        for _ in range(2):
            with torch.autocast("cpu", BFLOAT16):
                y = compiled(x, weights, biases)
                wanted = mixed_linear(x, weights, biases, impl="reference")
            torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)
            nn.init.ones_(weights[0])  # what was compiled must not have kept anything
        assert all(destination(weight) is None for weight in weights)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("impl", KEEPING)
def test_a_gradient_may_stay_narrow(impl):
    weights, _ = parameters()
    x = inputs()
    _, wide = run(impl, x, weights, None, BFLOAT16)
    for weight in weights:
        weight.grad_dtype = BFLOAT16
    with torch.autocast("cpu", BFLOAT16):
        y = mixed_linear(x, weights, impl=impl)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=FLOAT64).to(y.dtype))
    for weight, gradient in zip(weights, wide[1:], strict=True):
        assert weight.grad.dtype == BFLOAT16
        assert torch.equal(weight.grad, gradient.to(BFLOAT16))


@pytest.mark.skipif(NATIVE_REASON is not None, reason=str(NATIVE_REASON))
def test_a_wide_gradient_is_not_rounded_on_its_way():
    (weight,), _ = parameters((32,), ())
    x = inputs(dtype=BFLOAT16)
    y, (_, gradient) = run("native", x, [weight], None)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=FLOAT64).to(BFLOAT16)
    torch.testing.assert_close(gradient.double(), upstream.double().t() @ x.detach().double(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(gradient, gradient.to(BFLOAT16).float())


def test_messages():
    weights, biases = parameters()
    x = inputs()
    wrong = [
        (ValueError, "x must have shape (n, in_features); got (40,)", (x[0], weights)),
        (TypeError, "x must be float16, bfloat16, float32 or float64; got torch.int64", (x.long(), weights)),
        (ValueError, "weights must hold at least one weight; got none", (x, [])),
        (ValueError, "weights must have shape (rows, 40); got (24, 39)", (x, [weights[0][:, 1:]])),
        (TypeError, "weights must have x's dtype torch.float64, or be float32", (x.double(), weights)),
        (TypeError, "weights must have x's dtype torch.float32, or be float32", (x, [weights[0].bfloat16()])),
        (TypeError, "weights must have the dtype of the first weight", (x, [weights[0], weights[1].double()])),
        (ValueError, "weights must be on x's device cpu; got meta", (x, [weights[0].to("meta")])),
        (ValueError, "biases must hold one entry for each of 3 weights; got 2", (x, weights, biases[:2])),
        (ValueError, "biases must have shape (24,); got (16,)", (x, weights, [biases[2], None, None])),
        (TypeError, "biases must have the dtype of the first weight", (x, weights, [biases[0].double(), None, None])),
    ]
    for kind, message, arguments in wrong:
        with pytest.raises(kind) as raised:
            mixed_linear(*arguments)
        assert str(raised.value).startswith(message)
    with pytest.raises(UnsupportedError, match="this version has no triton implementation of mixed_linear"):
        mixed_linear(x, weights, impl="triton")
