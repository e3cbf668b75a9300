"""Copies of weights in a narrower dtype, which mixed precision multiplies by.

Several weights that multiply the same input (queries, keys and values) are one matrix, their rows one below the other,
and so are one product. A copy is made in every call, as autocast's are, so that it is never older than its weights,
however they were written.

Whoever alone writes the weights may keep copies from call to call (`KeptCopies.in_use`), and its optimizer may write
them in the pass that writes the weights (`destination`, `mark_current`): then nothing is cast at all. A change is then
seen by what torch counts, a weight's `_version`, and by its address, shape and strides. Writing through `.data`, numpy
or a pointer, in another process, or by torch's fused optimizers is not counted; while copies are in use there must be
none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from antlm_fast.kernels.tracing import is_plain

_State = tuple[Any, ...]


class _Copy:
    """One matrix or vector, the weights whose rows it holds, and in what state they were when it was written."""

    def __init__(self, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
        self.weights = weights
        self.values, self.parts = _room_for(weights, dtype)
        self.states: list[_State | None] = [None] * len(weights)

    def is_of(self, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> bool:
        return (
            self.values.dtype == dtype
            and len(self.weights) == len(weights)
            and all(
                held is weight and part.shape == weight.shape
                for held, part, weight in zip(self.weights, self.parts, weights, strict=True)
            )
        )

    def place_of(self, weight: torch.Tensor) -> int:
        return next(place for place, held in enumerate(self.weights) if held is weight)

    def part_of(self, weight: torch.Tensor) -> torch.Tensor:
        return self.parts[self.place_of(weight)]


class KeptCopies:
    """The copies that one owner of weights keeps; they live as long as this, and so do the weights."""

    def __init__(self) -> None:
        self._copies: dict[int, list[_Copy]] = {}  # by id of a weight; of several, the one last out of date is last

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While this is open, `working_copy` makes a copy once and keeps it here, in this thread."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    def current(self, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """The kept copy, with the rows of changed weights copied again."""
        of_first = self._copies.get(id(weights[0]), ())
        found = next((copy for copy in of_first if copy.is_of(weights, dtype)), None)
        if found is None:
            found = self._made(weights, dtype)
        states = [_state_of(weight) for weight in weights]
        if found.states != states:
            with torch.inference_mode(False), torch.no_grad():
                for part, weight, state, old in zip(found.parts, weights, states, found.states, strict=True):
                    if state != old:
                        part.copy_(weight)
            found.states = list(states)
            for weight in weights:  # this is the copy that `destination` shall name
                kept = self._copies[id(weight)]
                kept.remove(found)
                kept.append(found)
        return found.values

    def last(self, weight: torch.Tensor, dtype: torch.dtype) -> _Copy | None:
        """Of several copies that fit a weight the one that was last out of date.

        Of a model that multiplies by queries, keys and values together under one objective and apart under the other,
        that is the one of the present objective.
        """
        for copy in reversed(self._copies.get(id(weight), ())):
            if copy.values.dtype == dtype and copy.part_of(weight).shape == weight.shape:
                return copy
        return None

    def _made(self, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> _Copy:
        with torch.inference_mode(False):  # who keeps it may train with it later
            copy = _Copy(weights, dtype)
        for weight in weights:
            kept = self._copies.setdefault(id(weight), [])
            # of another shape, the weight's data were exchanged: that copy can never be used again
            kept[:] = [old for old in kept if old.part_of(weight).shape == weight.shape]
            if copy not in kept:  # a weight may be there twice
                kept.append(copy)
        return copy


_in_use: ContextVar[KeptCopies | None] = ContextVar("working copies in use", default=None)


def working_copy(weights: torch.Tensor | tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """The rows of all weights, one below the other, in another dtype.

    Args:
        weights: one or several, of the same shape but for the number of rows.
        dtype: of the copy.

    Returns:
        Detached, contiguous, not to be written to. A new one in every call, but where copies are in use: then the same
        memory while the weights do not change; what has changed is copied again, in place, so that a graph which still
        needs the earlier values says so in its backward.
    """
    weights = (weights,) if isinstance(weights, torch.Tensor) else weights
    if may_keep(weights):
        kept = _in_use.get()
        if kept is not None:
            return kept.current(weights, dtype)
        with torch.no_grad():
            values, parts = _room_for(weights, dtype)
            for part, weight in zip(parts, weights, strict=True):
                part.copy_(weight)
        return values
    with torch.no_grad():
        return torch.cat([weight.to(dtype) for weight in weights]) if len(weights) > 1 else weights[0].to(dtype)


def may_keep(weights: tuple[torch.Tensor, ...]) -> bool:
    """Whether a copy of these can be kept: plain leaf tensors of a CPU, outside of compilation and of functorch."""
    if not is_plain(*weights) or torch._C._get_tracing_state() or forward_ad._current_level >= 0:
        return False
    return all(
        weight.device.type == "cpu" and weight.is_leaf and not weight.is_inference()  # counts no versions
        for weight in weights
    )


def destination(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor | None:
    """Where the copies in use have this weight: rows of one for an optimizer to write, or None."""
    copy = _last(weight, dtype)
    return None if copy is None else copy.part_of(weight)


def mark_current(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """The rows that `destination` gave hold the weight as it is now; call it after the weight's version was counted."""
    copy = _last(weight, dtype)
    if copy is not None:
        copy.states[copy.place_of(weight)] = _state_of(weight)


def _last(weight: torch.Tensor, dtype: torch.dtype) -> _Copy | None:
    kept = _in_use.get()
    return None if kept is None else kept.last(weight, dtype)


def _room_for(weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Memory for the rows of all weights, and each one's part of it."""
    rows = [weight.shape[0] for weight in weights]
    with torch.no_grad():
        values = torch.empty((sum(rows), *weights[0].shape[1:]), dtype=dtype, device="cpu")
        return values, values.split(rows)


def _state_of(weight: torch.Tensor) -> _State:
    return weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
