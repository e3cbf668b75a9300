"""AdamW and LAMB on the CPU, a step of all parameters in one call of the C++ kernels.

Their state is torch's AdamW's and Lamb's, name by name, so a checkpoint goes from either to the other. Where a run
keeps bfloat16 copies of the weights (kernels/working_copies.py), the pass that writes a weight writes its copy too.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.kernels.native.optimizer_step import (
    GRADIENT_DTYPES,
    AdamWNumbers,
    LambNumbers,
    Update,
    adamw,
    lamb,
    squared_norm,
)
from antlm_fast.kernels.tracing import is_plain
from antlm_fast.kernels.working_copies import destination, mark_current
from antlm_fast.training.checked_optimizer import CheckedOptimizer
from antlm_fast.training.lamb import Lamb


def unsupported_reason(parameters: Iterable[Tensor]) -> str | None:
    """Why the C++ kernels cannot step these parameters with the gradients they have, or None."""
    for parameter in parameters:
        reason = unavailable_reason(parameter.device.type, torch.float32)
        if reason is not None:
            return reason
        if parameter.dtype != torch.float32 or not parameter.is_contiguous():
            return f"the C++ optimizer steps contiguous float32 parameters, not {parameter.dtype}"
        gradient = parameter.grad
        if not is_plain(parameter, gradient):
            return f"the C++ optimizer steps plain tensors, not {type(parameter).__name__}"
        if gradient is not None and (gradient.dtype not in GRADIENT_DTYPES or gradient.layout != torch.strided):
            return f"the C++ optimizer takes dense float32 or bfloat16 gradients, not {gradient.dtype}"
    return None


def _resolve_negatives(parameters: Iterable[Tensor]) -> None:
    """A gradient that autograd formed by a conjugate may be a view that negates: its numbers are not at its address."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_neg():
            parameter.grad = parameter.grad.resolve_neg()


_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class _OnePass(CheckedOptimizer):
    """What both share: the state, the clipping and the working copies.

    A model that was moved to another dtype or device before its first step is stepped by torch's.
    """

    _factor = 1.0

    def clipped_step(self, max_norm: float) -> Tensor:
        """A step with the gradients scaled so that their 2-norm all together is at most `max_norm`.

        The gradients themselves may stay as they are.

        Returns:
            The norm before clipping, float32 ().
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        _resolve_negatives(parameters)
        if unsupported_reason(parameters) is not None:
            self.check_step()
            clipped = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            self.step()
            return clipped
        gradients = [parameter.grad.contiguous() for parameter in parameters if parameter.grad is not None]
        norm = math.sqrt(squared_norm(gradients))
        self._factor = min(max_norm / (norm + _CLIP_EPS), 1.0)  # in this order: NaN stays NaN
        try:
            self.step()
        finally:
            self._factor = 1.0
        return torch.tensor(norm, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        pairs = [(parameter, group) for parameter, group in pairs if parameter.grad is not None]
        _resolve_negatives(parameter for parameter, _ in pairs)
        served = unsupported_reason(parameter for parameter, _ in pairs) is None
        self.check_step(takes_bfloat16=served)
        if not served:
            self._plain_step()
            torch.autograd.graph.increment_version([parameter for parameter, _ in pairs])  # fused steps do not
            return loss
        updates, numbers = [], []
        for parameter, group in pairs:
            state = self._state_of(parameter)
            state["step"] += 1
            copy = destination(parameter)
            gradient = parameter.grad.contiguous()
            updates.append(Update(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], copy))
            numbers.append(self._numbers(group, state["step"].item()))
        self._take(updates, numbers)
        copies = [each.copy for each in updates if each.copy is not None]
        torch.autograd.graph.increment_version([each.weight for each in updates] + copies)
        for each in updates:
            mark_current(each.weight)
        return loss

    @abstractmethod
    def _plain_step(self) -> None:
        """torch's own, without its hooks: this one's have been called."""

    @abstractmethod
    def _numbers(self, group: dict[str, Any], step: float) -> Any:
        """What the C++ kernels are told of a group's settings at a step."""

    @abstractmethod
    def _take(self, updates: list[Update], numbers: list[Any]) -> None:
        """The step itself."""

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for name in ("exp_avg", "exp_avg_sq"):  # of a weight that had other strides, or loaded so
            state[name] = state[name].contiguous()
        return state


class NativeAdamW(_OnePass, torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) for float32 parameters on the CPU.

    w <- (1 - lr * weight_decay) w - lr * m_hat / (sqrt(v_hat) + eps), m_hat = m / (1 - b1^t), v_hat = v / (1 - b2^t).

    Args:
        params: parameters, or groups of them; a group may set any of the following for itself.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.

    Determinism: the number of threads does not matter.

    Source: arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.01
    ) -> None:
        torch.optim.AdamW.__init__(self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def _numbers(self, group: dict[str, Any], step: float) -> AdamWNumbers:
        (beta1, beta2), lr = group["betas"], group["lr"]
        return AdamWNumbers(
            kept=1 - lr * group["weight_decay"],
            step=lr / (1 - beta1**step),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            root=math.sqrt(1 - beta2**step),
        )

    def _take(self, updates: list[Update], numbers: list[AdamWNumbers]) -> None:
        adamw(updates, numbers, self._factor)

    def _plain_step(self) -> None:
        fused = [group["fused"] for group in self.param_groups]
        for group in self.param_groups:
            group["fused"] = False  # on a CPU the fused one takes every tensor for contiguous (torch 2.13)
        try:
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            for group, value in zip(self.param_groups, fused, strict=True):
                group["fused"] = value


class NativeLamb(_OnePass, Lamb):
    """Lamb for float32 parameters on the CPU; the norms are added in float64."""

    def _numbers(self, group: dict[str, Any], step: float) -> LambNumbers:
        beta1, beta2 = group["betas"]
        root = math.sqrt(1 - beta2**step)
        return LambNumbers(
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"] * root,
            scale=root / (1 - beta1**step),
            trust=float(group["trust_ratio"]),
        )

    def _take(self, updates: list[Update], numbers: list[LambNumbers]) -> None:
        lamb(updates, numbers, self._factor)

    def _plain_step(self) -> None:
        inspect.unwrap(Lamb.step)(self)
