"""A differentiable operation out of plain functions, once for eager code and once for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from antlm_fast.kernels.tracing import first_order, is_plain


def differentiable(
    name: str,
    forward: Callable[..., Any],
    *,
    public: str,
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """A call of `forward` with a gradient: one opaque node of a traced graph, or an autograd.Function in eager code.

    Both are the same functions; eager code goes around the dispatcher, which costs more than a small kernel, unless
    somebody listens there.

    Args:
        name: of the custom op, without the namespace.
        public: the op that users call, for messages.
        forward: annotated as torch.library.custom_op wants it; reads and writes memory through pointers.
        fake: what it gives on tensors without memory.
        save, backward: setup_context(ctx, inputs, output) and backward(ctx, *gradients), as of autograd.Function.
    """
    op = torch.library.custom_op(f"antlm_fast::{name}", forward, mutates_args=())
    op.register_fake(fake)
    backward = first_order(public)(backward)
    op.register_autograd(backward, setup_context=save)

    def forward_and_save(ctx: Any, *arguments: Any) -> Any:
        # a setup_context of its own would cost 0.1 ms a call: torch binds the arguments by name for it
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    members = {
        "forward": staticmethod(forward_and_save),
        "backward": staticmethod(backward),
    }
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        return function.apply(*arguments) if is_plain(*arguments) else op(*arguments)

    return call


def opaque(
    name: str, compute: Callable[..., list[torch.Tensor]], fake: Callable[..., list[torch.Tensor]]
) -> Callable[..., list[torch.Tensor]]:
    """A call of `compute` for a backward: the function itself on plain memory, else one opaque node of a traced graph.

    Args:
        name: of the custom op, without the namespace.
        compute: annotated as torch.library.custom_op wants it.
        fake: what it gives on tensors without memory.
    """
    op = torch.library.custom_op(f"antlm_fast::{name}", compute, mutates_args=())
    op.register_fake(fake)

    def call(*arguments: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = (compute if is_plain(*arguments) else op)(*arguments)
        return found

    return call
