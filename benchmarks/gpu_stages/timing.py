"""A call's three figures (forward, backward, both), timed only once its numbers are right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from harness import Bench, Call, Provider, device_timed
from roofline import Work
from torch import Tensor

from antlm_fast.testing.budget import assert_within_budget

Function = Callable[..., Tensor]
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A function with everything it needs, ready to be run over and over.

    Args:
        forward, backward, both: return nothing, or their own seconds. On a GPU they replay captured graphs, so that no
            host time is in the figures; backward is that of the last forward.
        results: the result and the gradients of all arguments, as the last calls left them.
    """

    forward: Call
    backward: Call
    both: Call
    results: Callable[[], tuple[Tensor, ...]]


def passes(function: Function, arguments: Sequence[Tensor], gradient: Tensor, device: str) -> Passes:
    """
    Args:
        function: of the arguments; its result's gradient is `gradient`.
        device: on "cuda" the passes are captured.

    Raises:
        RuntimeError: it cannot be captured, for example because it waits for the device.
    """
    if device == "cuda":
        return _captured(function, arguments, gradient)
    held: list[Tensor] = []
    gradients: list[Tensor] = []

    def forward() -> None:
        held[:] = [function(*arguments)]

    def backward() -> None:
        gradients[:] = torch.autograd.grad(held[0], arguments, gradient, retain_graph=True)

    def both() -> None:
        forward()
        backward()

    both()
    return Passes(forward=forward, backward=backward, both=both, results=lambda: (held[0].detach(), *gradients))


def _captured(function: Function, arguments: Sequence[Tensor], gradient: Tensor) -> Passes:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled, planned or allocated once is so before the capture
        for _ in range(2):
            torch.autograd.grad(function(*arguments), arguments, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(first):
            out = function(*arguments)
        with torch.cuda.graph(second, pool=first.pool()):
            gradients = torch.autograd.grad(out, arguments, gradient, retain_graph=True)
    except Exception:
        torch.cuda.set_stream(before)  # torch 2.11 leaves the capture's own current where a capture fails
        raise

    def both() -> None:
        first.replay()
        second.replay()

    both()
    torch.cuda.synchronize()
    return Passes(
        forward=device_timed(first.replay),
        backward=device_timed(second.replay),
        both=device_timed(both),
        results=lambda: (out.detach(), *gradients),
    )


def eager_passes(function: Function, arguments: Sequence[Tensor], gradient: Tensor) -> Passes:
    """On a GPU, of a function that cannot be captured: host time is in the figures."""
    plain = passes(function, arguments, gradient, "cpu")
    return Passes(
        forward=device_timed(plain.forward),
        backward=device_timed(plain.backward),
        both=device_timed(plain.both),
        results=plain.results,
    )


class Once:
    """A function that is called once; later calls give its result again, or its error."""

    def __init__(self, function: Callable[[], Passes]) -> None:
        self._function = function
        self._result: Passes | Exception | None = None

    def __call__(self) -> Passes:
        if self._result is None:
            try:
                self._result = self._function()
            except Exception as error:  # the row of every pass says the same
                self._result = error
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def providers(
    bench: Bench,
    case: str,
    name: str,
    prepare: Callable[[], Passes],
    flops: float,
    check: Callable[[tuple[Tensor, ...]], None],
    *,
    backward_over_forward: float,
) -> Iterator[Provider]:
    """The three passes of one way, checked before the first of them is timed.

    Args:
        flops: of the forward.
        check: raises where the results are wrong.
        backward_over_forward: how much more the backward multiplies.
    """

    def checked() -> Passes:
        made = prepare()
        check(made.results())
        return made

    once = Once(checked)
    shares = {"forward": 1.0, "backward": backward_over_forward, "both": 1.0 + backward_over_forward}
    for which in PASSES:
        work = flops * shares[which]
        yield Provider(
            case=f"{case}, {which}",
            name=name,
            prepare=functools.partial(_pass_of, once, which),
            amount=work / 1e12,
            unit="TFLOP/s",
            floor=bench.floor(Work(flops=work), "bf16"),
        )


def _pass_of(once: Once, which: str) -> Call:
    call: Call = getattr(once(), which)
    return call


def assert_right(
    found: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Within what plain code of the same dtype is off by: twice that for the result, which comes first, else thrice."""
    for place, (name, *tensors) in enumerate(zip(names, found, exact, eager, strict=True)):
        assert_within_budget(name, *tensors, slack=3.0 if place else 2.0)


def results_of(function: Function, arguments: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of all arguments."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out)))
