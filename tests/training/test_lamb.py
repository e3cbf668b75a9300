"""LAMB against steps worked by hand and in float64, and which parameters it treats as matrices."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from antlm_fast.models import LtgBert, LtgBertConfig
from antlm_fast.training.lamb import Lamb
from antlm_fast.training.optimizer import OptimizerConfig, build_optimizer


def parameter(values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def stepped(weight, gradients, **settings):
    optimizer = Lamb([weight], **({"lr": 0.1} | settings))
    for gradient in gradients:
        weight.grad = torch.as_tensor(gradient, dtype=weight.dtype)
        optimizer.step()
    return weight.detach()


def test_the_first_step_is_as_long_as_the_weight_says():
    # u = sign of the gradient = (1, -1); |w| = 5, |u| = sqrt(2)
    found = stepped(parameter([[3.0, 4.0]]), [[[7.0, -0.01]]], eps=1e-300)
    move = 0.1 * 5 / math.sqrt(2)
    np.testing.assert_allclose(found, [[3 - move, 4 + move]], rtol=1e-14)


def test_without_trust_the_step_is_adams():
    found = stepped(parameter([3.0, 4.0]), [[7.0, -0.01]], eps=1e-300, trust_ratio=False)
    np.testing.assert_allclose(found, [2.9, 4.1], rtol=1e-14)


@pytest.mark.parametrize(
    ("weight", "gradient", "expected"),
    [
        ([0.0, 0.0], [1.0, -2.0], [-0.1, 0.1]),  # no length of its own yet: Adam's step
        ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]),  # no direction: no step
    ],
)
def test_a_norm_of_zero_takes_the_ratio_one(weight, gradient, expected):
    found = stepped(parameter(weight), [gradient], eps=1e-30)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def worked(weight, gradients, *, lr, beta1, beta2, eps, weight_decay):
    """Algorithm 2 of arXiv 1904.00962, line by line."""
    w, m, v = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * w
        w = w - lr * np.linalg.norm(w) / np.linalg.norm(update) * update
    return w


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_many_steps_are_those_of_the_algorithm(dtype, rtol, weight_decay, eps):
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=(7, 5)), rng.normal(size=(30, 7, 5)) * 10 ** rng.normal(size=(30, 1, 1))
    settings = {"lr": 0.02, "eps": eps, "weight_decay": weight_decay}
    found = stepped(nn.Parameter(torch.tensor(weight, dtype=dtype)), gradients, betas=(0.9, 0.98), **settings)
    expected = worked(weight, gradients, beta1=0.9, beta2=0.98, **settings)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
    assert not np.allclose(expected, worked(weight, gradients, beta1=0.9, beta2=0.98, **(settings | {"eps": 0.1})))


def test_parameters_do_not_see_each_other_and_none_needs_a_gradient():
    alone = stepped(parameter([[3.0, 4.0]]), [[[1.0, 2.0]]])
    weights = [parameter([[3.0, 4.0]]), parameter([[300.0, 1.0]]), parameter([[5.0]])]
    optimizer = Lamb(weights, lr=0.1)
    weights[0].grad, weights[1].grad = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[9.0, 2.0]]).double()
    optimizer.step()
    assert torch.equal(weights[0], alone)
    assert weights[2].item() == 5.0
    assert weights[2] not in optimizer.state


def test_what_is_a_matrix():
    """Biases, norms and tables are neither decayed nor given a trust ratio; the tied head is the table."""
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LtgBert(LtgBertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def groups(**settings):
        decayed, others = build_optimizer(model, OptimizerConfig(weight_decay=0.1, **settings)).param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        assert (decayed.get("trust_ratio", True), others.get("trust_ratio", False)) == (True, False)
        return [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, others)]

    tables = {name for name in names.values() if name.endswith("table.weight")}
    assert len(tables) == 2
    for kind in ("adamw", "lamb"):
        decayed, others = groups(kind=kind, decay_embeddings=False)
        assert decayed | others == set(names.values())
        assert not decayed & others
        assert tables <= others
        assert all(dict(model.named_parameters())[name].ndim == 2 for name in decayed)
        assert {name for name in others - tables if dict(model.named_parameters())[name].ndim > 1} == set()
        assert groups(kind=kind, decay_embeddings=True)[0] == decayed | tables
    assert id(model.head_weight) in {id(model.get_parameter(name)) for name in tables}
