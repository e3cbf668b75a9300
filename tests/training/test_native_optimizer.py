"""The optimizers that step by the C++ kernels: torch's numbers, state and habits, and the copies they write."""

import copy

import pytest
import torch
from torch import nn

from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.mixed_linear import mixed_linear
from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.kernels.working_copies import KeptCopies, destination, working_copy
from antlm_fast.testing.budget import assert_within_budget
from antlm_fast.training.native_optimizer import NativeAdamW, NativeLamb
from antlm_fast.training.optimizer import OptimizerConfig, begin_step, build_optimizer, clipped_step

REASON = unavailable_reason("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

KINDS = {"adamw": NativeAdamW, "lamb": NativeLamb}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(30, 24), nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 30, bias=False))


def give_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.grad = gradient.to(parameter.dtype)


def config(kind, **settings):
    return OptimizerConfig(**({"kind": kind, "lr": 1e-2, "beta2": 0.98, "eps": 1e-6} | settings))


def steps(model, optimizer, count=8, first=0, max_norm=3.0):
    """The norms; every second gradient is within the bound."""
    norms = []
    for step in range(first, first + count):
        give_gradients(model, step, scale=1.0 if step % 2 else 1e-3)
        norms.append(clipped_step(model, optimizer, max_norm))
    return torch.stack(norms)


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_are_torchs(kind):
    model = network()
    models = {name: copy.deepcopy(model) for name in ("native", "torch", "exact")}
    models["exact"].double()
    optimizers = {name: build_optimizer(models[name], config(kind), impl="torch") for name in ("torch", "exact")}
    optimizers["native"] = build_optimizer(models["native"], config(kind))
    assert isinstance(optimizers["native"], KINDS[kind])
    norms = {name: steps(models[name], optimizers[name]) for name in models}
    assert_within_budget("norms", norms["native"], norms["exact"], norms["torch"])
    for parameters in zip(*(models[name].parameters() for name in ("native", "exact", "torch")), strict=True):
        assert_within_budget("weight", *(parameter.detach() for parameter in parameters), slack=3.0)
        for moment in ("exp_avg", "exp_avg_sq"):
            states = zip(("native", "exact", "torch"), parameters, strict=True)
            assert_within_budget(moment, *(optimizers[name].state[each][moment] for name, each in states), slack=3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-2}, {"weight_decay": 0.5}])
def test_every_setting_counts(kind, change):
    found = []
    for settings in ({}, change):
        model = network()
        steps(model, build_optimizer(model, config(kind, **settings)), 2)
        found.append(model[2].weight.detach())
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_goes_to_torchs_optimizer_and_back(kind):
    model = network()
    optimizer = build_optimizer(model, config(kind))
    steps(model, optimizer, 4)
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    plain = build_optimizer(twin, config(kind), impl="torch")
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = build_optimizer(other, config(kind))
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    for each, its_optimizer in ((model, optimizer), (twin, plain), (other, again)):
        steps(each, its_optimizer, 3, first=4)
    for mine, torchs, returned in zip(*(each.parameters() for each in (model, twin, other)), strict=True):
        assert torch.equal(mine, returned)
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)


def test_a_state_may_be_forgotten():
    """Training with reset_on_switch clears it between two steps."""
    model = network()
    optimizer = build_optimizer(model, config("adamw"))
    steps(model, optimizer, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.state.clear()
    steps(model, optimizer, 1)
    fresh = network()
    fresh.load_state_dict(before)
    steps(fresh, build_optimizer(fresh, config("adamw")), 1)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_writes_the_kept_copies(kind):
    model = network()
    optimizer = build_optimizer(model, config(kind))
    layers = model[2], model[3]
    with KeptCopies().in_use():
        kept = [working_copy(layer.weight, torch.bfloat16) for layer in layers]
        steps(model, optimizer, 1)
        versions = [each._version for each in kept]
        for layer, each in zip(layers, kept, strict=True):
            assert torch.equal(each, layer.weight.detach().bfloat16())
            assert working_copy(layer.weight, torch.bfloat16).data_ptr() == each.data_ptr()
        assert [each._version for each in kept] == versions  # nothing was cast again
        with torch.no_grad():
            layers[0].weight.zero_()
        assert not working_copy(layers[0].weight, torch.bfloat16).any()


def test_a_graph_of_former_weights_refuses_its_backward():
    model = network()
    optimizer = build_optimizer(model, config("adamw"))
    x = torch.randn(5, 24, requires_grad=True)
    with KeptCopies().in_use():
        with torch.autocast("cpu", torch.bfloat16):
            y = mixed_linear(x, [model[2].weight])
        steps(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_weights_count_their_versions():
    """As every in-place operation does, unlike torch's fused optimizers."""
    model = network()
    optimizer = build_optimizer(model, config("adamw"))
    before = [parameter._version for parameter in model.parameters()]
    steps(model, optimizer, 1)
    assert all(p._version > version for p, version in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_are_narrow_where_nothing_is_added_to_them(num_micro_batches, precision):
    model = network()
    optimizer = build_optimizer(model, config("adamw"))
    for _ in range(2):
        begin_step(model, optimizer, num_micro_batches=num_micro_batches, precision=precision)
        for _ in range(num_micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                model(torch.arange(10)).square().sum().backward()
        narrow = num_micro_batches == 1 and precision == "bfloat16"
        assert model[2].weight.grad.dtype == (torch.bfloat16 if narrow else torch.float32)
        assert {model[place].weight.grad.dtype for place in (0, 1)} == {torch.float32}
        clipped_step(model, optimizer, None)


def test_stock_optimizers_see_gradients_as_they_know_them():
    model = network()
    optimizer = build_optimizer(model, config("adamw"), impl="torch")
    begin_step(model, optimizer, num_micro_batches=1, precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(10)).square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_moved_is_stepped_by_torch(kind):
    models = [network(), network()]
    optimizers = [
        build_optimizer(model, config(kind), impl=impl) for model, impl in zip(models, ("auto", "torch"), strict=True)
    ]
    calls = []
    optimizers[0].register_step_post_hook(lambda *_: calls.append(1))
    for model, optimizer in zip(models, optimizers, strict=True):
        model.double()
        steps(model, optimizer, 3)
    assert len(calls) == 3
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_closures_hooks_and_schedulers():
    model = network()
    optimizer = build_optimizer(model, config("adamw"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(10)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    scheduler.step()  # warns where no step was seen
    clipped_step(model, optimizer, 1.0)
    assert calls == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.5e-2


def test_parameters_without_a_gradient_stay():
    model = network()
    optimizer = build_optimizer(model, config("adamw"))
    give_gradients(model, 0)
    model[2].weight.grad = None
    before = model[2].weight.detach().clone()
    clipped_step(model, optimizer, 1.0)
    assert torch.equal(model[2].weight, before)
    assert model[2].weight not in optimizer.state
    optimizer.zero_grad()
    assert clipped_step(model, optimizer, 1.0) == 0.0


def test_which_implementation():
    model = network()
    assert type(build_optimizer(model, config("adamw"), impl="torch")) is torch.optim.AdamW
    assert type(build_optimizer(model, config("adamw"), impl="native")) is NativeAdamW
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'native', 'torch'; got 'triton'"):
        build_optimizer(model, config("adamw"), impl="triton")
    model.double()
    assert type(build_optimizer(model, config("adamw"))) is torch.optim.AdamW
    with pytest.raises(UnsupportedError, match="steps contiguous float32 parameters, not torch.float64"):
        build_optimizer(model, config("adamw"), impl="native")
    assert destination(model[2].weight) is None
