"""Weights, gradients, moments and options that do not fit are refused before a step, and by name."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.training.lamb import Lamb
from antlm_fast.training.native_optimizer import NativeAdamW, NativeLamb, unsupported_reason
from antlm_fast.training.optimizer import OptimizerConfig, begin_step, build_optimizer
from antlm_fast.types import InputError

REASON = unavailable_reason("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

KINDS = (NativeAdamW, NativeLamb, Lamb)
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
PLACE = "torch.float32 (3, 4) on cpu"


def after_a_step(kind):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = kind([weight], **SETTINGS)
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    return weight, optimizer


def step(optimizer, how):
    if how == "clipped" and hasattr(optimizer, "clipped_step"):
        optimizer.clipped_step(1.0)
    else:
        optimizer.step()


def assert_refused(weight, optimizer, message, how="plain"):
    """And nothing has moved."""
    before = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(InputError) as raised:
        step(optimizer, how)
    assert str(raised.value).startswith(message)
    assert torch.equal(weight, before[0])
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, before[1][0][name])


@pytest.mark.parametrize("how", ["plain", "clipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_grew_does_not_write_past_its_moments(kind, how):
    weight, optimizer = after_a_step(kind)
    weight.data = torch.ones(300, 4)
    message = (
        "grad must have its parameter's shape (300, 4); got (3, 4): a weight that was exchanged needs a new backward"
    )
    assert_refused(weight, optimizer, message, how)
    weight.grad = torch.ones(300, 4)
    message = (
        f"state['exp_avg'] must be torch.float32 (300, 4) on cpu, as its parameter; got {PLACE}: a weight that was"
    )
    assert_refused(weight, optimizer, message, how)
    optimizer.state.pop(weight)
    step(optimizer, how)
    assert optimizer.state[weight]["exp_avg"].shape == (300, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_that_do_not_fit_are_refused(kind):
    weight, optimizer = after_a_step(kind)
    for name in ("exp_avg", "exp_avg_sq"):
        for wrong, described in (
            (torch.zeros(12), "torch.float32 (12,) on cpu"),
            (torch.zeros(2, 4), "torch.float32 (2, 4) on cpu"),
            (torch.zeros(3, 4, dtype=torch.float64), "torch.float64 (3, 4) on cpu"),
            (torch.zeros(3, 4, device="meta"), "torch.float32 (3, 4) on meta"),
            (torch.zeros(3, 4).to_sparse(), "torch.float32 (3, 4) on cpu torch.sparse_coo"),
            (None, "None"),
        ):
            state = optimizer.state[weight]
            right, state[name] = state[name], wrong
            with pytest.raises(InputError) as raised:
                optimizer.step()
            state[name] = right
            message = f"state['{name}'] must be {PLACE}, as its parameter; got {described}: "
            assert str(raised.value).startswith(message)
    optimizer.state[weight]["step"] = 1
    with pytest.raises(InputError, match=r"state\['step'\] must be a tensor of one number; got 1"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_of_another_shape_is_refused(kind):
    weight, optimizer = after_a_step(kind)
    other = nn.Parameter(torch.randn(6, 4))
    theirs = kind([other], **SETTINGS)
    other.grad = torch.randn(6, 4)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert_refused(
        weight, optimizer, f"state['exp_avg'] must be {PLACE}, as its parameter; got torch.float32 (6, 4) on cpu: "
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_do_not_fit_are_refused(kind):
    weight, optimizer = after_a_step(kind)
    weight.grad = torch.randn(3, 4).to_sparse()
    assert_refused(weight, optimizer, "grad must be dense; got torch.sparse_coo of a parameter of shape (3, 4)")
    weight.grad = torch.randn(3, 4)
    weight.data = weight.data.double()
    message = f"grad must be torch.float64 (3, 4) on cpu, as its parameter; got {PLACE}"
    assert_refused(weight, optimizer, message)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_another_dtype_are_refused(kind):
    weight, optimizer = after_a_step(kind)
    weight.grad = None
    weight.grad_dtype = torch.float16
    weight.grad = torch.randn(3, 4).half()
    assert_refused(weight, optimizer, f"grad must be {PLACE}, as its parameter; got torch.float16 (3, 4) on cpu")


@pytest.mark.parametrize("exchanged", ["weight", "moment", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_change_a_step(kind, exchanged):
    """Of torch's fused AdamW, which steps what the C++ kernels do not, they would (2.13, on a CPU)."""
    results = []
    for transposed in (False, True):
        weight, optimizer = after_a_step(kind)
        weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        state = optimizer.state[weight]
        if transposed and exchanged == "weight":
            weight.data = weight.data.t().contiguous().t()
        elif transposed and exchanged == "moment":
            state["exp_avg"] = state["exp_avg"].t().contiguous().t()
        elif transposed:
            weight.grad = weight.grad.t().contiguous().t()
        optimizer.step()
        results.append((weight.detach(), state["exp_avg"], state["exp_avg_sq"]))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_strides_do_not_change_a_step_of_torchs():
    weights = []
    for transposed in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        if transposed:
            model.weight.data = model.weight.data.t().contiguous().t()
        optimizer = build_optimizer(model, OptimizerConfig(lr=0.1), impl="torch")
        for parameter in model.parameters():
            parameter.grad = torch.arange(parameter.numel()).view(parameter.shape) - 1.5
        optimizer.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_transposed_weight_trains_under_autocast(kind):
    """Its optimizer's step is torch's, which wants gradients in the weights' dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    model[1].weight.data = model[1].weight.data.t().contiguous().t()
    for _ in range(2):
        begin_step(model, optimizer, num_micro_batches=1, precision="bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.ones(5, 4)).float().square().sum()
        loss.backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


OPTIONS = {"amsgrad": True, "maximize": True, "capturable": True, "differentiable": True}


@pytest.mark.parametrize("option", [*OPTIONS, "decoupled_weight_decay"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_option_that_would_be_ignored_is_refused_by_name(kind, option):
    wrong = OPTIONS.get(option, False)
    message = f"param_groups[1]['{option}'] must be {not wrong}, as {kind.__name__} has nothing else; got {wrong}"
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        kind([first], **SETTINGS, **{option: wrong})
    with pytest.raises(InputError) as raised:
        kind([{"params": [first]}, {"params": [second], option: wrong}], **SETTINGS)
    assert str(raised.value) == message
    optimizer = kind([{"params": [first]}, {"params": [second]}], **SETTINGS)
    with pytest.raises(InputError) as raised:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], option: wrong})
    assert str(raised.value) == message.replace("[1]", "[2]")
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["param_groups"][1][option] = wrong
    with pytest.raises(InputError) as raised:
        optimizer.load_state_dict(loaded)
    assert str(raised.value) == message
    optimizer.param_groups[1][option] = wrong
    with pytest.raises(InputError) as raised:
        optimizer.step()
    assert str(raised.value) == message


def test_the_states_of_torchs_optimizers_are_loaded_unless_they_ask_for_more():
    weight = nn.Parameter(torch.ones(2))
    optimizer = NativeAdamW([weight], **SETTINGS)
    for options in ({}, {"fused": True}, {"fused": False}, {"foreach": True}):
        optimizer.load_state_dict(torch.optim.AdamW([weight], **options).state_dict())
    with pytest.raises(InputError, match=r"param_groups\[0\]\['amsgrad'\] must be False"):
        optimizer.load_state_dict(torch.optim.AdamW([weight], amsgrad=True).state_dict())


def test_a_tensor_without_memory_of_its_own_is_not_taken_by_its_address():
    with FakeTensorMode():
        fake = nn.Parameter(torch.ones(2))
    assert unsupported_reason([fake]) == "the C++ optimizer steps plain tensors, not FakeTensor"
    assert unsupported_reason([nn.Parameter(torch.ones(2))]) is None


@pytest.mark.parametrize("how", ["plain", "clipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_a_view_that_negates_is_a_step_uphill(kind, how):
    """autograd gives one by itself: the gradient of a complex number's conjugate."""
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    for weight in weights:
        number = torch.complex(torch.zeros(1), weight).conj() * torch.tensor(1 + 2j)
        number.real.sum().backward()
    assert weights[0].grad.is_neg()
    weights[1].grad = weights[1].grad.resolve_neg()
    for weight in weights:
        step(kind([weight], **SETTINGS), how)
    assert torch.equal(weights[0], weights[1])
    assert weights[0].item() < 1.0
