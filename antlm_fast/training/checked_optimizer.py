"""What an optimizer's step relies on, checked before it moves anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from antlm_fast.types import InputError

# options of torch's optimizers that ours have not, with the values that ask for nothing; fused and foreach ask for no
# other numbers
_NEUTRAL = {
    "amsgrad": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}


class CheckedOptimizer(torch.optim.Optimizer):
    """Refuses options that it would ignore, and gradients and moments that do not fit their parameter."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check_options(param_group, len(self.param_groups))
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict's last act
        for place, group in enumerate(state.get("param_groups", ())):
            self._check_options(group, place)
        super().__setstate__(state)

    def check_step(self, *, takes_bfloat16: bool = False) -> None:
        """Whether a step can be taken with the groups, gradients and moments as they are.

        Args:
            takes_bfloat16: whether a gradient may be in bfloat16, whatever its parameter is in.

        Raises:
            InputError: an option asks for what there is not; a gradient or a moment does not fit its parameter.
        """
        for place, group in enumerate(self.param_groups):
            self._check_options(group, place)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _check_gradient(parameter, parameter.grad, takes_bfloat16)
                    if parameter in self.state:
                        _check_moments(parameter, self.state[parameter])

    def _check_options(self, group: dict[str, Any], place: int) -> None:
        for option, wanted in _NEUTRAL.items():
            if group.get(option, wanted) != wanted:
                raise InputError(
                    f"param_groups[{place}][{option!r}] must be {wanted}, as {type(self).__name__} has nothing else; "
                    f"got {group[option]!r}"
                )


def _check_gradient(parameter: Tensor, gradient: Tensor, takes_bfloat16: bool) -> None:
    if gradient.layout != torch.strided:
        raise InputError(f"grad must be dense; got {gradient.layout} of a parameter of shape {tuple(parameter.shape)}")
    if gradient.shape != parameter.shape:
        raise InputError(
            f"grad must have its parameter's shape {tuple(parameter.shape)}; got {tuple(gradient.shape)}: "
            "a weight that was exchanged needs a new backward"
        )
    narrow = takes_bfloat16 and gradient.dtype == torch.bfloat16
    if gradient.device != parameter.device or not (narrow or gradient.dtype == parameter.dtype):
        raise InputError(f"grad must be {_described(parameter)}, as its parameter; got {_described(gradient)}")


def _check_moments(parameter: Tensor, state: dict[str, Any]) -> None:
    if not state:
        return
    step = state.get("step")
    if not isinstance(step, Tensor) or step.numel() != 1:
        raise InputError(f"state['step'] must be a tensor of one number; got {_described(step)}")
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state.get(name)
        if not isinstance(moment, Tensor) or (moment.shape, moment.dtype, moment.device, moment.layout) != (
            parameter.shape,
            parameter.dtype,
            parameter.device,
            parameter.layout,
        ):
            raise InputError(
                f"state[{name!r}] must be {_described(parameter)}, as its parameter; got {_described(moment)}: "
                "a weight that was exchanged needs a new optimizer, or its state removed (optimizer.state.pop(weight))"
            )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    layout = "" if value.layout == torch.strided else f" {value.layout}"
    return f"{value.dtype} {tuple(value.shape)} on {value.device}{layout}"
