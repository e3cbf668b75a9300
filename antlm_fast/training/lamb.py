"""LAMB: Adam's direction for each parameter, with a step as long as the parameter itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from antlm_fast.training.checked_optimizer import CheckedOptimizer


class Lamb(CheckedOptimizer):
    """Adam whose update of each parameter is scaled to the parameter's norm.

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; u = m_hat / (sqrt(v_hat) + eps) + weight_decay * w, where
    m_hat = m / (1 - b1^t) and v_hat = v / (1 - b2^t); w <- w - lr * ratio * u with ratio = |w| / |u| (2-norms of the
    whole parameter, unclipped), which is 1 where either norm is 0.

    Args:
        params: parameters, or groups of them; a group may set any of the following for itself.
        lr: learning rate.
        betas: b1, b2.
        eps: added to the root of the second moment.
        weight_decay: inside the update, so the ratio scales it too.
        trust_ratio: False takes ratio = 1 (AdamW's step); for biases, norms and embeddings.

    Determinism: as the tensor operations of the device; no value is read back from a GPU.

    Source: arXiv 1904.00962, algorithm 2, with phi the identity.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        trust_ratio: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust_ratio": trust_ratio}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_step()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            on_gpu = [parameter for parameter in parameters if parameter.device.type != "cpu"]
            if on_gpu:  # few launches
                self._update(on_gpu, group)
            for parameter in parameters:
                if parameter.device.type == "cpu":  # one at a time: it stays in cache from the first line to the last
                    self._update([parameter], group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self._state_of(parameter) for parameter in parameters]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        steps = [int(state["step"].add_(1)) for state in states]  # held on the CPU

        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        # m_hat / (sqrt(v_hat) + eps) = m * (root / (1 - b1^t)) / (sqrt(v) + eps * root), root = sqrt(1 - b2^t)
        roots = [math.sqrt(1 - beta2**step) for step in steps]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, [group["eps"] * root for root in roots])
        updates = torch._foreach_div(first, denominators)
        torch._foreach_mul_(updates, [root / (1 - beta1**step) for root, step in zip(roots, steps, strict=True)])
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if group["trust_ratio"]:
            weight_norms = torch.stack(torch._foreach_norm(parameters))  # (parameters,)
            update_norms = torch.stack(torch._foreach_norm(updates))
            usable = (weight_norms > 0) & (update_norms > 0)
            ratios = torch.where(usable, weight_norms / update_norms, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        elif state["step"].device.type != "cpu":  # a checkpoint was loaded to where the parameter is
            state["step"] = state["step"].cpu()
        return state
