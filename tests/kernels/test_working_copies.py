"""Copies of weights: never older than their weights, made anew in every call, or kept where somebody keeps them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.kernels.mixed_linear import mixed_linear
from antlm_fast.kernels.working_copies import KeptCopies, destination, mark_current, may_keep, working_copy

ROWS = (24, 8, 16)
IN_FEATURES = 40
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


def parameters(rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, IN_FEATURES, generator=generator)) for size in rows]


def inputs(columns=IN_FEATURES):
    return torch.randn(33, columns, generator=torch.Generator().manual_seed(1)).requires_grad_()


def cast(weights):
    return torch.cat([weight.detach().to(BFLOAT16) for weight in weights])


@pytest.fixture
def kept():
    copies = KeptCopies()
    with copies.in_use():
        yield copies


def same(first, weights):
    """The copy is what a fresh one would be."""
    again = working_copy(tuple(weights), BFLOAT16)
    assert torch.equal(again, cast(weights))
    return again.data_ptr() == first.data_ptr()


def merge_low_rank(weight):
    """As a merge of LoRA does that goes row by row."""
    for row in (3, 5):
        weight.data[row] += 0.5


def step_by_fused_sgd(weight):
    """torch's fused optimizers write without counting."""
    weight.grad = torch.zeros_like(weight)
    weight.grad[2, 1] = 1.0
    torch.optim.SGD([weight], lr=0.5, fused=True).step()


UNCOUNTED = {
    "a row": lambda weight: weight.data[5].zero_(),
    "an element": lambda weight: weight.data[2, 1].add_(1.0),
    "clamped": lambda weight: weight.data.clamp_(-2.0, 2.0),
    "pruned": lambda weight: weight.data.mul_(torch.arange(weight.numel()).view(weight.shape) % 7 != 3),
    "doubled": lambda weight: weight.data.mul_(2),
    "low rank, by rows": merge_low_rank,
    "numpy": lambda weight: weight.detach().numpy().__setitem__((2, 1), 0.0),
    "a fused optimizer": step_by_fused_sgd,
}
LAYOUTS = {"contiguous": lambda values: values, "transposed": lambda values: values.t().contiguous().t()}


def results(weight):
    """Everything that multiplies by rounded copies of a weight (48, 101), and what each must be."""
    x, targets, fresh = inputs(101), torch.arange(33), weight.detach().bfloat16().contiguous()
    with torch.autocast("cpu", BFLOAT16):
        yield mixed_linear(x, [weight]), mixed_linear(x, [fresh], impl="reference")
        yield mixed_linear(x, [weight, weight]), mixed_linear(x, [fresh, fresh], impl="reference")
        loss = linear_cross_entropy(x, weight, targets)
    yield loss, linear_cross_entropy(x.bfloat16(), fresh, targets).to(loss.dtype)


@pytest.mark.parametrize("write", UNCOUNTED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_written_uncounted_is_multiplied_as_it_is(layout, write):
    values = torch.randn(48, 101, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(LAYOUTS[layout](values))
    before = [found.detach() for found, _ in results(weight)]
    UNCOUNTED[write](weight)
    for (found, wanted), former in zip(results(weight), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert not torch.equal(found, former)


def test_a_weight_of_a_few_bytes_is_multiplied_as_it_is():
    weight = nn.Parameter(torch.ones(1, 3))
    for factor in (1.0, 2.0):
        with torch.autocast("cpu", BFLOAT16):
            assert mixed_linear(torch.ones(1, 3), [weight]).item() == 3.0 * factor
        weight.data.mul_(2)


def test_a_weight_written_by_another_process_is_multiplied_as_it_is(tmp_path):
    """Two mappings of one file are what two processes have of a shared weight."""
    np.ones((4, 8), dtype=np.float32).tofile(tmp_path / "weight")
    weight = nn.Parameter(torch.from_file(str(tmp_path / "weight"), shared=True, size=32).view(4, 8))
    others = np.memmap(tmp_path / "weight", dtype=np.float32, mode="r+", shape=(4, 8))
    for written in (1.0, 3.0):
        others[2, 5] = written
        with torch.autocast("cpu", BFLOAT16):
            assert mixed_linear(torch.ones(1, 8), [weight]).tolist() == [[8.0, 8.0, 7.0 + written, 8.0]]


def test_a_bias_written_uncounted_is_added_as_it_is():
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(2))
    for written in (0.0, 5.0):
        bias.data[1] = written
        with torch.autocast("cpu", BFLOAT16):
            assert mixed_linear(torch.ones(1, 3), [weight], [bias]).tolist() == [[3.0, 3.0 + written]]


def test_a_graph_keeps_the_weights_it_was_made_of():
    """Nobody keeps copies here, so what the backward needs is its own."""
    (weight,) = parameters((8,))
    x = inputs()
    with torch.autocast("cpu", BFLOAT16):
        y = mixed_linear(x, [weight])
        (wanted,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        weight.data.zero_()
        assert not mixed_linear(x, [weight]).any()
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], wanted)


def test_a_kept_copy_is_made_once(kept):
    weights = parameters()
    first = working_copy(tuple(weights), BFLOAT16)
    assert (first.dtype, first.shape, first.is_contiguous()) == (BFLOAT16, (sum(ROWS), IN_FEATURES), True)
    assert not first.requires_grad
    before = first._version
    assert same(first, weights)
    with torch.autocast("cpu", BFLOAT16):
        mixed_linear(inputs(), weights).sum().backward()
    assert first._version == before  # nothing was written again
    # another order, a part of them, another dtype: other copies
    others = [
        working_copy(tuple(weights[::-1]), BFLOAT16),
        working_copy(weights[0], BFLOAT16),
        working_copy(tuple(weights), FLOAT16),
    ]
    assert len({first.data_ptr(), *(other.data_ptr() for other in others)}) == 4
    assert same(first, weights)


def step_by_sgd(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD(module.parameters(), lr=0.5).step()


COUNTED = {
    "in place": lambda module: nn.init.ones_(module.weight),
    "a part": lambda module: module.weight.detach()[3].fill_(7.0),
    "state dict": lambda module: module.load_state_dict({"weight": torch.ones_like(module.weight)}),
    "assigned state dict": lambda module: module.load_state_dict({"weight": torch.ones(8, IN_FEATURES)}, assign=True),
    "stock optimizer": step_by_sgd,
    "other data": lambda module: setattr(module.weight, "data", torch.ones(8, IN_FEATURES)),
    "transposed data": lambda module: setattr(module.weight, "data", module.weight.data.t().contiguous().t() + 1.0),
    "more rows": lambda module: setattr(module.weight, "data", torch.ones(11, IN_FEATURES)),
}


@pytest.mark.parametrize("change", COUNTED)
def test_a_kept_copy_follows_what_is_counted(change, kept):
    module, (other,) = nn.Linear(IN_FEATURES, 8, bias=False), parameters((16,))
    x = inputs()
    for weights in ((module.weight,), (module.weight, other)):
        with torch.autocast("cpu", BFLOAT16):
            mixed_linear(x, weights)
    before = cast([module.weight])
    COUNTED[change](module)
    assert not torch.equal(cast([module.weight]), before)
    for weights in ((module.weight,), (module.weight, other)):
        with torch.autocast("cpu", BFLOAT16):
            assert torch.equal(mixed_linear(x, weights), mixed_linear(x, weights, impl="reference"))
        assert torch.equal(working_copy(weights, BFLOAT16), cast(weights))


def test_only_the_changed_rows_are_copied(kept):
    weights = parameters()
    first = working_copy(tuple(weights), BFLOAT16)
    first.fill_(5.0)
    nn.init.zeros_(weights[1])
    again = working_copy(tuple(weights), BFLOAT16)
    assert again.data_ptr() == first.data_ptr()
    assert [part.unique().tolist() for part in again.split(ROWS)] == [[5.0], [0.0], [5.0]]


def test_an_optimizer_may_write_the_copy(kept):
    weights = parameters()
    assert destination(weights[1]) is None
    first = working_copy(tuple(weights), BFLOAT16)
    part = destination(weights[1])
    assert part.data_ptr() == first[ROWS[0]].data_ptr()
    assert part.shape == weights[1].shape
    assert destination(weights[1], FLOAT16) is None
    weights[1].data.fill_(2.0)
    part.fill_(2.0)
    torch.autograd.graph.increment_version([weights[1]])
    mark_current(weights[1])
    before = first._version
    assert same(first, weights)
    assert first._version == before
    mark_current(nn.Parameter(torch.ones(2, 2)))  # has none: nothing to mark


def test_a_weight_of_another_shape_has_no_rows_to_be_written(kept):
    (weight,) = parameters((8,))
    working_copy(weight, BFLOAT16)
    weight.data = torch.ones(9, IN_FEATURES)
    assert destination(weight) is None
    mark_current(weight)
    assert torch.equal(working_copy(weight, BFLOAT16), cast([weight]))


def test_a_weight_may_be_there_twice(kept):
    (weight,) = parameters((8,))
    working_copy((weight, weight), BFLOAT16)
    nn.init.ones_(weight)
    assert torch.equal(working_copy((weight, weight), BFLOAT16), cast((weight, weight)))


def test_of_several_copies_the_one_in_use_is_written(kept):
    weights = parameters()
    joint, alone = tuple(weights), (weights[0],)
    for used in (joint, alone, joint, alone):
        nn.init.normal_(weights[0])
        first = working_copy(used, BFLOAT16)
        assert destination(weights[0]).data_ptr() == first.data_ptr()


def test_a_graph_does_not_take_later_weights_for_its_own(kept):
    weights = parameters()
    with torch.autocast("cpu", BFLOAT16):
        y = mixed_linear(inputs(), weights)
        nn.init.zeros_(weights[0])
        mixed_linear(inputs(), weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_model_does_not_carry_its_copies(kept):
    model = nn.Linear(IN_FEATURES, 8)
    plain = pickle.dumps(model), set(vars(model.weight)), set(model.state_dict())
    first = working_copy(model.weight, BFLOAT16)
    assert (pickle.dumps(model), set(vars(model.weight)), set(model.state_dict())) == plain
    for twin in (copy.deepcopy(model), pickle.loads(plain[0])):
        assert destination(twin.weight) is None
        nn.init.zeros_(twin.weight)
        assert not working_copy(twin.weight, BFLOAT16).any()
    assert same(first, [model.weight])


def test_a_copy_kept_in_inference_mode_serves_training(kept):
    weights = parameters()
    with torch.inference_mode(), torch.autocast("cpu", BFLOAT16):
        mixed_linear(inputs().detach(), weights)
    nn.init.ones_(weights[0])
    with torch.inference_mode():
        first = working_copy(tuple(weights), BFLOAT16)
    with torch.autocast("cpu", BFLOAT16):
        mixed_linear(inputs(), weights).sum().backward()
    assert same(first, weights)


def test_copies_are_kept_no_longer_than_they_are_in_use():
    (weight,) = parameters((8,))
    copies = KeptCopies()
    with copies.in_use():
        first = working_copy(weight, BFLOAT16)
        with KeptCopies().in_use():
            assert destination(weight) is None
        assert same(first, [weight])
    assert destination(weight) is None
    assert not same(first, [weight])
    with pytest.raises(KeyError, match="on its way out"), copies.in_use():
        raise KeyError("on its way out")
    assert destination(weight) is None


def test_what_counts_no_versions_is_not_kept(kept):
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
