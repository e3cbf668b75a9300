"""Whether a run may keep bfloat16 copies of its weights from step to step (kernels/working_copies.py).

A kept copy does not see what is written through `.data`, numpy or shared memory. So a run keeps copies only where
nothing takes part in it that could write so: no hook, no class and no replaced method of the user's. Elsewhere, in the
user's own loops too, every product casts its weights anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module

import torch
from torch import nn

from antlm_fast.kernels.working_copies import KeptCopies
from antlm_fast.training.native_optimizer import NativeAdamW, NativeLamb

_OUR_PACKAGES = ("torch", "antlm_fast")
_GLOBAL_HOOKS = [
    hooks
    for module in ("torch.nn.modules.module", "torch.optim.optimizer")
    for name, hooks in vars(import_module(module)).items()
    if name.startswith("_global") and isinstance(hooks, Mapping)
]


@contextlib.contextmanager
def copies_kept(model: nn.Module, optimizer: torch.optim.Optimizer, *others: object) -> Iterator[None]:
    """While this is open, the copies of the model's weights are kept, if this package's code alone writes the weights.

    Args:
        model, optimizer: of the run; torch's own optimizers write weights uncounted, so with them nothing is kept.
        others: what else takes part in the run.
    """
    ours = isinstance(optimizer, NativeAdamW | NativeLamb) and not any(_GLOBAL_HOOKS)
    ours = ours and not any(_is_changed(part) for part in (optimizer, *others, *model.modules()))
    ours = ours and _is_memory_apart([*model.parameters(), *model.buffers()], optimizer)
    with KeptCopies().in_use() if ours and not any(map(_is_watched, model.parameters())) else contextlib.nullcontext():
        yield


def _is_memory_apart(tensors: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Whether no two tensors share memory, each of which would count only what is written through itself, and whether
    the optimizer's are among them."""
    distinct = {id(tensor): tensor for tensor in tensors}
    places = [tensor.untyped_storage().data_ptr() for tensor in distinct.values() if tensor.numel()]
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return len(set(places)) == len(places) and all(id(parameter) in distinct for parameter in stepped)


def _is_changed(part: object) -> bool:
    """Whether code of the user's runs where this object's does."""
    kind, own = type(part), getattr(part, "__dict__", {})
    return (
        kind.__module__.partition(".")[0] not in _OUR_PACKAGES
        or any(hooks for name, hooks in own.items() if name.endswith("_hooks"))
        or any(callable(getattr(kind, name, None)) for name in own)
    )


def _is_watched(parameter: nn.Parameter) -> bool:
    """Whether code of the user's runs where its gradient is formed, or its memory is not torch's and this process's."""
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(hooks) or parameter.is_shared() or not parameter.untyped_storage().resizable()
