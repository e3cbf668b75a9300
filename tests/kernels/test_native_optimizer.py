"""The optimizer's C++ kernels against the formulas in float64, on every instruction set and for any size."""

import math

import pytest
import torch

from antlm_fast.kernels.native.build import FOLDER, LIBRARY
from antlm_fast.kernels.native.library import INSTRUCTION_SETS, Library, library, unavailable_reason
from antlm_fast.kernels.native.optimizer_step import (
    AdamWNumbers,
    LambNumbers,
    Update,
    adamw,
    lamb,
    squared_norm,
)
from antlm_fast.testing.budget import assert_within_budget

REASON = unavailable_reason("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# around a vector, the stretch of a float sum and a block
SIZES = (0, 1, 15, 16, 17, 100, 4095, 4096, 4160, 65535, 65536, 65537, 200_003)
FACTOR = 0.37
STEPS = 3


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request):
    if request.param not in library().available:
        pytest.skip(f"this machine has no {request.param}")
    yield Library(FOLDER / LIBRARY, request.param)
    Library(FOLDER / LIBRARY)  # whether tiles are used is the whole process's: as the last Library says


def drawn(size, seed):
    """A weight, a gradient and moments as they are in the middle of a run; all of different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient, first, second = (torch.randn(size, generator=generator) for _ in range(4))
    magnitudes = torch.randn(size, generator=generator).exp()
    return weight, gradient * magnitudes, 0.1 * first * magnitudes, (0.3 * second * magnitudes).square()


def updates(*, gradient_dtype=torch.float32, copies=True, offset=0):
    """One tensor of each size; with an offset nothing is aligned."""
    made = []
    for number, size in enumerate(SIZES):
        weight, gradient, first, second = (
            torch.cat([values.new_zeros(offset), values])[offset:] for values in drawn(size, number)
        )
        copy = torch.full((size + offset,), math.nan, dtype=torch.bfloat16)[offset:] if copies else None
        made.append(Update(weight, gradient.to(gradient_dtype), first, second, copy))
    return made


def adamw_numbers(number, **changes):
    """Each tensor has its own, so that a row taken from another is seen."""
    lr, decay, beta1, beta2, eps, step = 1e-2 * (number + 1), 0.1 * number, 0.9, 0.98, 1e-3, 4 + number
    values = {
        "kept": 1 - lr * decay,
        "step": lr / (1 - beta1**step),
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "root": math.sqrt(1 - beta2**step),
    }
    return AdamWNumbers(**(values | changes))


def plain_adamw(update, numbers, factor, dtype):
    """(weight, first moment, second moment) after a step, in plain torch."""
    gradient = update.gradient.to(dtype) * factor
    first = update.first_moment.to(dtype) + (1 - numbers.beta1) * (gradient - update.first_moment.to(dtype))
    second = numbers.beta2 * update.second_moment.to(dtype) + (1 - numbers.beta2) * gradient * gradient
    change = numbers.step * first / (second.sqrt() / numbers.root + numbers.eps)
    return numbers.kept * update.weight.to(dtype) - change, first, second


def lamb_numbers(number, **changes):
    beta1, beta2, step = 0.9, 0.98, 4 + number
    root = math.sqrt(1 - beta2**step)
    values = {
        "lr": 1e-2 * (number + 1),
        "weight_decay": 0.1 * number,
        "beta1": beta1,
        "beta2": beta2,
        "eps": 1e-3 * root,
        "scale": root / (1 - beta1**step),
        "trust": float(number % 3 > 0),
    }
    return LambNumbers(**(values | changes))


def plain_lamb(update, numbers, factor, dtype):
    gradient, weight = update.gradient.to(dtype) * factor, update.weight.to(dtype)
    first = update.first_moment.to(dtype) + (1 - numbers.beta1) * (gradient - update.first_moment.to(dtype))
    second = numbers.beta2 * update.second_moment.to(dtype) + (1 - numbers.beta2) * gradient * gradient
    direction = numbers.scale * first / (second.sqrt() + numbers.eps) + numbers.weight_decay * weight
    norms = weight.norm(), direction.norm()
    ratio = norms[0] / norms[1] if numbers.trust and norms[0] and norms[1] else 1.0
    return weight - numbers.lr * ratio * direction, first, second


ALGORITHMS = {"adamw": (adamw, adamw_numbers, plain_adamw), "lamb": (lamb, lamb_numbers, plain_lamb)}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_several_steps_are_those_of_the_formula(kernels, name, gradient_dtype, offset):
    step, numbers_of, plain = ALGORITHMS[name]
    found = updates(gradient_dtype=gradient_dtype, offset=offset)
    numbers = [numbers_of(number) for number in range(len(found))]
    exact = [plain_state(each, torch.float64) for each in found]
    eager = [plain_state(each, torch.float32) for each in found]
    for _ in range(STEPS):
        step(found, numbers, FACTOR, kernels=kernels)
        for states, dtype in ((exact, torch.float64), (eager, torch.float32)):
            states[:] = [
                Update(weight, each.gradient, first, second, None)
                for each, row in zip(states, numbers, strict=True)
                for weight, first, second in [plain(each, row, FACTOR, dtype)]
            ]
    for place, each in enumerate(found):
        for part in ("weight", "first_moment", "second_moment"):
            values = [getattr(state, part) for state in (each, exact[place], eager[place])]
            assert_within_budget(f"{part} of {SIZES[place]}", *values)
        assert torch.equal(each.copy, each.weight.bfloat16())


def plain_state(update, dtype):
    moved = (x.to(dtype) for x in (update.weight, update.gradient, update.first_moment, update.second_moment))
    return Update(*moved, None)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_number_counts(kernels, name):
    step, numbers_of, _ = ALGORITHMS[name]

    def weights(factor=FACTOR, **changes):
        found = updates()[-1:]
        step(found, [numbers_of(4, **changes)], factor, kernels=kernels)
        return found[0].weight

    first = weights()
    assert not torch.equal(first, weights(factor=1.0))
    for field in numbers_of(1).__dataclass_fields__:
        assert not torch.equal(first, weights(**{field: 0.5 if field != "trust" else 0.0})), field


@pytest.mark.parametrize("name", ALGORITHMS)
def test_where_there_is_no_copy_nothing_is_written(kernels, name):
    step, numbers_of, _ = ALGORITHMS[name]
    with_copies, without = updates(), updates(copies=False)
    for found in (with_copies, without):
        step(found, [numbers_of(number) for number in range(len(found))], FACTOR, kernels=kernels)
    for a, b in zip(with_copies, without, strict=True):
        assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_number_of_threads_changes_no_bit(kernels, name):
    step, numbers_of, _ = ALGORITHMS[name]
    threads = torch.get_num_threads()
    results, norms = [], []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = updates(gradient_dtype=torch.bfloat16)
            norms.append(squared_norm([each.gradient for each in found], kernels=kernels))
            step(found, [numbers_of(number) for number in range(len(found))], FACTOR, kernels=kernels)
            results.append(torch.cat([torch.cat([each.weight, each.second_moment]) for each in found]))
    finally:
        torch.set_num_threads(threads)
    assert norms[0] == norms[1] == norms[2]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_that_of_all_elements(kernels, gradient_dtype):
    gradients = [each.gradient for each in updates(gradient_dtype=gradient_dtype, offset=1)]
    for chosen in (gradients, gradients[:1], []):
        wanted = sum(float(each.double().square().sum()) for each in chosen)
        assert squared_norm(chosen, kernels=kernels) == pytest.approx(wanted, rel=1e-6)
    # one element more in any of them is seen
    whole = squared_norm(gradients, kernels=kernels)
    for each in gradients[1:]:
        each[-1] += 64.0
        assert squared_norm(gradients, kernels=kernels) > whole
        each[-1] -= 64.0


def test_what_is_not_finite_stays_so(kernels):
    """A run that diverged must be seen by its norm and its weights."""
    for value in (math.nan, math.inf):
        found = updates()
        for each in found[1:]:
            each.gradient[-1] = value
        assert not math.isfinite(squared_norm([each.gradient for each in found], kernels=kernels))
        adamw(found, [adamw_numbers(number) for number in range(len(found))], FACTOR, kernels=kernels)
        assert all(each.weight[-1].isnan() and each.copy[-1].isnan() for each in found[1:])
        assert all(each.weight[:-1].isfinite().all() for each in found[1:])


def test_lamb_takes_the_ratio_one_where_a_norm_is_zero(kernels):
    zeros, ones = torch.zeros(40), torch.ones(40)
    still = Update(ones.clone(), zeros, zeros.clone(), zeros.clone(), None)
    young = Update(zeros.clone(), ones, zeros.clone(), zeros.clone(), None)
    numbers = lamb_numbers(1, weight_decay=0.0)
    lamb([still, young], [numbers, numbers], 1.0, kernels=kernels)
    assert torch.equal(still.weight, ones)
    wanted = plain_lamb(Update(zeros, ones, zeros, zeros, None), numbers, 1.0, torch.float64)[0]
    torch.testing.assert_close(young.weight.double(), wanted, rtol=1e-6, atol=0)
    assert (young.weight != 0).all()


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 2).t().expand(2, 2)[:, :1].expand(2, 2)])
def test_moments_of_another_size_are_not_written_past_their_end(wrong):
    weight = torch.zeros(2, 2)
    for tensors in ((wrong, weight, weight), (weight, wrong, weight), (weight, weight, wrong)):
        with pytest.raises(ValueError, match="an update's tensors must be contiguous and of one size; got shapes"):
            adamw([Update(weight, *tensors, None)], [AdamWNumbers(1.0, 0.1, 0.9, 0.99, 1e-8, 1.0)], 1.0)
