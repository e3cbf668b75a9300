"""The moving average of the weights: its numbers, and that it is lent and taken back."""

import pytest
import torch
from torch import nn

from antlm_fast.training.weight_average import WeightAverage


def test_it_follows_the_weights():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    average = WeightAverage(model, 0.75)
    for value in (5.0, 9.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    # 0.75 (0.75 * 1 + 0.25 * 5) + 0.25 * 9, and from -2
    assert average.tensors["weight"].tolist() == [[3.75, 2.0625]]
    with average.in_model():
        assert model.weight.tolist() == [[3.75, 2.0625]]
    assert model.weight.tolist() == [[9.0, 9.0]]


def test_the_weights_come_back_after_an_error_too():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    average = WeightAverage(model, 0.5)
    average.tensors["weight"].zero_()
    with pytest.raises(RuntimeError, match="lost"), average.in_model():
        raise RuntimeError("lost")
    assert torch.equal(model.weight, before)


def test_it_is_float32_for_narrower_weights():
    model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    average.update()
    assert average.tensors["weight"].dtype == torch.float32
    torch.testing.assert_close(average.tensors["weight"], torch.full((1, 2), 1.001))  # bfloat16 would stay at 1
