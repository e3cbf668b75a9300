"""Who else takes part in a call: torch's modes, transforms and tensor subclasses. Kernels that take addresses ask here.

A kernel reads and writes memory through pointers, and what torch records of a call does not see that. So a call is
computed where its tensors are plain memory, is one opaque op where a mode or a subclass takes part (make_fx,
FakeTensorMode, DTensor), and is refused where the result would silently be wrong (vmap, forward-mode derivatives,
torch.jit.trace, second derivatives).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from antlm_fast.kernels.dispatch import UnsupportedError

_PLAIN = (torch.Tensor, torch.nn.Parameter)

P = ParamSpec("P")
R = TypeVar("R")


def is_plain(*arguments: Any) -> bool:
    """Whether the tensors among the arguments are memory that a pointer may read, and nobody records the call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    for x in arguments:
        if type(x) in _PLAIN:
            if x.is_neg() or x._is_zerotensor():
                return False
        elif isinstance(x, torch.Tensor):
            return False
    return True


def transform(*arguments: Any) -> str | None:
    """What torch does with a call of these arguments that no kernel follows, for messages; None if nothing."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    if torch._C._are_functorch_transforms_active():
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            return "torch.func (vmap, grad, jvp and what is made of them)"
        return None
    no_level = forward_ad._current_level < 0
    if no_level or all(forward_ad.unpack_dual(x).tangent is None for x in tensors):
        return None
    return "forward-mode derivatives"


def check_call(op: str, impl: str, **arguments: Any) -> None:
    """The first line of an op that has kernels of its own in every implementation but the reference.

    Args:
        op: the op's public name, for messages.
        impl: as the caller named it.
        arguments: the op's by name, of which some may be tensors.

    Raises:
        TypeError: a tensor is sparse, or of another layout without strides.
        UnsupportedError: a `transform` is active, and impl is not "reference", which is made of torch's operations.
    """
    check_dense(**arguments)
    active = None if impl == "reference" else transform(*arguments.values())
    if active is not None:
        raise UnsupportedError(f"{op}(impl={impl!r}): the kernels do not follow {active}; impl='reference' does")


def check_dense(**arguments: Any) -> None:
    """TypeError for a tensor without strides, by its name."""
    for name, x in arguments.items():
        if type(x) in _PLAIN and x.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {x.layout}")


def check_no_transform(op: str) -> None:
    """Before an autograd.Function of ours is used: torch lets it into no transform, captured tensors included."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UnsupportedError(f"{op}: this implementation runs within no torch.func transform; impl='reference' does")


def _is_batched(x: torch.Tensor) -> bool:
    """By torch.autograd.grad(is_grads_batched=True)."""
    batched: bool = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x)
    return batched


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a backward(ctx, *gradients) of autograd that cannot be differentiated: create_graph=True is refused.

    torch's once_differentiable is not enough: it lets a second derivative pass, as 0, where the upstream gradient needs
    none, or where the engine sees no way from its error to the inputs that are asked for.

    Args:
        op: the public name, for the message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def once(ctx: Any, *gradients: Any) -> Any:
            # the engine enables gradients in a backward with create_graph alone
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise UnsupportedError(
                    f"{op}: this implementation has no second derivative, so create_graph must be False; "
                    f"impl='reference' has one"
                )
            if any(x is not None and _is_batched(x) for x in gradients):
                raise UnsupportedError(f"{op}: the kernels follow no batched gradients; impl='reference' does")
            return backward(ctx, *gradients)

        return once

    return decorate


def kept(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """lru_cache for a function that makes tensors: what it makes while a mode is active, fake ones say, is not kept.

    Args:
        maxsize: of the cache.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        cached = lru_cache(maxsize=maxsize)(make)

        @wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (cached if is_plain() else make)(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate
