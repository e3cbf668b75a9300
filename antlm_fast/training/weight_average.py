"""An exponential moving average of the weights, kept beside them and lent to the model to be looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """a <- decay * a + (1 - decay) * w after every step, in float32, beginning with the first weights.

    Args:
        model: whose parameters are averaged; tied ones once.
        decay: at least 0 and below 1.

    Attributes:
        tensors: the averages by parameter name, on the parameters' device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone().float() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of a step that is done."""
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - self._decay)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """While this is open, the model's parameters hold the averages; then their own values again."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
