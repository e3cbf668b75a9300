"""The mixed-precision linear layer: its numbers, and when the kept copies of its weights are used and made anew."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from antlm_fast.kernels import working_copies
from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.mixed_linear import mixed_linear
from antlm_fast.kernels.native.weight_gradient import no_tiles_reason
from antlm_fast.kernels.working_copies import destination, mark_current, may_keep, working_copy
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


def cast(weights):
    return torch.cat([weight.detach().to(BFLOAT16) for weight in weights])


def same(kept, weights):
    """The copy is what a fresh one would be."""
    again = working_copy(tuple(weights), BFLOAT16)
    assert torch.equal(again, cast(weights))
    return again.data_ptr() == kept.data_ptr()


def test_a_copy_is_made_once():
    weights, _ = parameters()
    kept = working_copy(tuple(weights), BFLOAT16)
    assert (kept.dtype, kept.shape, kept.is_contiguous()) == (BFLOAT16, (sum(ROWS), IN_FEATURES), True)
    assert not kept.requires_grad
    before = kept._version
    assert same(kept, weights)
    with torch.autocast("cpu", BFLOAT16):
        mixed_linear(inputs(), weights).sum().backward()
    assert kept._version == before  # nothing was written again
    # another order, a part of them, another dtype: other copies
    others = [
        working_copy(tuple(weights[::-1]), BFLOAT16),
        working_copy(weights[0], BFLOAT16),
        working_copy(tuple(weights), FLOAT16),
    ]
    assert len({kept.data_ptr(), *(other.data_ptr() for other in others)}) == 4
    assert same(kept, weights)


def step_by_sgd(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def step_by_fused_adamw(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.AdamW(module.parameters(), lr=0.5, fused=True).step()


def step_that_moves_one_element(module):
    """torch's fused optimizers count no version, and a sample of the bytes would not see this."""
    module.weight.grad = torch.zeros_like(module.weight)
    module.weight.grad[2, 5] = 1.0
    torch.optim.SGD(module.parameters(), lr=0.5, fused=True).step()


def write_and_tell(module):
    module.weight.data[2, 5] += 1.0
    torch.autograd.graph.increment_version(module.weight)


CHANGES = {
    "in place": lambda module: nn.init.ones_(module.weight),
    "a part": lambda module: module.weight.detach()[3].fill_(7.0),
    "state dict": lambda module: module.load_state_dict({"weight": torch.ones_like(module.weight)}),
    "assigned state dict": lambda module: module.load_state_dict({"weight": torch.ones(8, IN_FEATURES)}, assign=True),
    "stock optimizer": step_by_sgd,
    "fused optimizer": step_by_fused_adamw,
    "fused optimizer, one element": step_that_moves_one_element,
    "other data": lambda module: setattr(module.weight, "data", torch.ones(8, IN_FEATURES)),
    "transposed data": lambda module: setattr(module.weight, "data", module.weight.data.t().contiguous().t() + 1.0),
    "more rows": lambda module: setattr(module.weight, "data", torch.ones(11, IN_FEATURES)),
    "through .data": lambda module: module.weight.data.mul_(0.5),
    "through numpy": lambda module: module.weight.detach().numpy().fill(0.5),
    "through .data, and told": write_and_tell,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_copied_again(change):
    module, other = nn.Linear(IN_FEATURES, 8, bias=False), parameters((16,), ())[0][0]
    x = inputs()
    for weights in ((module.weight,), (module.weight, other)):
        with torch.autocast("cpu", BFLOAT16):
            mixed_linear(x, weights)
    before = cast([module.weight])
    CHANGES[change](module)
    assert not torch.equal(cast([module.weight]), before)
    for weights in ((module.weight,), (module.weight, other)):
        with torch.autocast("cpu", BFLOAT16):
            assert torch.equal(mixed_linear(x, weights), mixed_linear(x, weights, impl="reference"))
        assert torch.equal(working_copy(weights, BFLOAT16), cast(weights))


def test_only_the_changed_rows_are_copied():
    weights, _ = parameters()
    kept = working_copy(tuple(weights), BFLOAT16)
    kept.fill_(5.0)
    nn.init.zeros_(weights[1])
    again = working_copy(tuple(weights), BFLOAT16)
    assert again.data_ptr() == kept.data_ptr()
    assert [part.unique().tolist() for part in again.split(ROWS)] == [[5.0], [0.0], [5.0]]


def test_an_optimizer_may_write_the_copy():
    weights, _ = parameters()
    assert destination(weights[1]) is None
    kept = working_copy(tuple(weights), BFLOAT16)
    part = destination(weights[1])
    assert part.data_ptr() == kept[ROWS[0]].data_ptr()
    assert part.shape == weights[1].shape
    assert destination(weights[1], FLOAT16) is None
    weights[1].data.fill_(2.0)
    part.fill_(2.0)
    torch.autograd.graph.increment_version([weights[1]])
    mark_current(weights[1])
    before = kept._version
    assert same(kept, weights)
    assert kept._version == before
    mark_current(nn.Parameter(torch.ones(2, 2)))  # has none: nothing to mark


def test_a_weight_may_be_there_twice():
    module = nn.Linear(IN_FEATURES, 8, bias=False)
    twice = (module.weight, module.weight)
    working_copy(twice, BFLOAT16)
    step_that_moves_one_element(module)
    assert torch.equal(working_copy(twice, BFLOAT16), cast(twice))


def test_of_several_copies_the_one_in_use_is_written():
    weights, _ = parameters()
    joint, alone = tuple(weights), (weights[0],)
    for used in (joint, alone, joint, alone):
        nn.init.normal_(weights[0])
        kept = working_copy(used, BFLOAT16)
        assert destination(weights[0]).data_ptr() == kept.data_ptr()


def test_a_graph_does_not_take_later_weights_for_its_own():
    weights, _ = parameters()
    with torch.autocast("cpu", BFLOAT16):
        y = mixed_linear(inputs(), weights)
        nn.init.zeros_(weights[0])
        mixed_linear(inputs(), weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_go_with_their_weights():
    gc.collect()
    before = len(working_copies._copies), len(working_copies._watches)
    weights, biases = parameters()
    with torch.autocast("cpu", BFLOAT16):
        mixed_linear(inputs(), weights, [biases[0], None, None]).sum().backward()
        mixed_linear(inputs(), weights[:2]).sum().backward()
    assert len(working_copies._copies) == before[0] + 3
    survivor = weights[0]
    del weights, biases
    gc.collect()
    assert len(working_copies._copies) == before[0] + 1
    assert working_copies._copies[id(survivor)] == []
    del survivor
    gc.collect()
    assert (len(working_copies._copies), len(working_copies._watches)) == before


def test_a_model_does_not_carry_its_copies():
    model = nn.Linear(IN_FEATURES, 8)
    plain = pickle.dumps(model), set(vars(model.weight)), set(model.state_dict())
    kept = working_copy(model.weight, BFLOAT16)
    assert (pickle.dumps(model), set(vars(model.weight)), set(model.state_dict())) == plain
    for twin in (copy.deepcopy(model), pickle.loads(plain[0])):
        assert destination(twin.weight) is None
        nn.init.zeros_(twin.weight)
        assert not working_copy(twin.weight, BFLOAT16).any()
    assert same(kept, [model.weight])


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


def test_what_counts_no_versions_is_not_kept():
    with torch.inference_mode():
        weight = torch.ones(4, IN_FEATURES)
    other = nn.Parameter(torch.ones(4, IN_FEATURES))
    assert not may_keep((weight,))
    assert may_keep((other,))
    assert not may_keep((other * 2,))  # made anew in every step
    assert not may_keep((other.to("meta"),))
    with torch.inference_mode():
        first = working_copy(weight, BFLOAT16)
        weight.fill_(2.0)
        assert torch.equal(working_copy(weight, BFLOAT16), first * 2)


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
