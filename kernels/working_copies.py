"""Copies of weights in a narrower dtype, which mixed precision multiplies by: made once, used until a weight changes.

autocast casts every weight in every step. Here a copy is kept beside the weights it was made of and used again while
none of them has changed; an optimizer may write it in the pass that writes the weights (`destination`, `mark_current`),
and then nothing is cast at all. Several weights that multiply the same input (queries, keys and values) share one
matrix, their rows one below the other, and so are one product.

A change is seen by what torch counts, a tensor's `_version`, and by its address, shape, strides and dtype:
`load_state_dict`, `copy_` and every in-place operation count. torch's fused optimizers change weights without counting
(2.13, on a CPU), so a step of any torch.optim.Optimizer makes the copies of its parameters out of date, unless it has
the attribute `writes_working_copies`. Writing through `.data`, `.numpy()` or a pointer is not counted either: where it
changes all of a weight it is seen by a sample of its bytes, but where it may change a part, tell it by
`torch.autograd.graph.increment_version(weight)`.

A copy lives as long as the weights: it holds them by weak references, and is no part of them, so that neither deepcopy
nor pickle nor a state dict sees it.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from antlm_fast.kernels.tracing import is_plain

_State = tuple[Any, ...]
_SAMPLE_BYTES = 16


class _Copy:
    """One matrix or vector, the weights whose rows it holds, and in what state they were when it was written."""

    def __init__(self, weights: tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
        self.weights = tuple(weakref.ref(weight) for weight in weights)
        self.values = values
        self.parts = values.split([weight.shape[0] for weight in weights])
        self.states: list[_State | None] = [None] * len(weights)

    def is_of(self, weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> bool:
        return (
            self.values.dtype == dtype
            and len(self.weights) == len(weights)
            and all(
                held() is weight and part.shape == weight.shape
                for held, part, weight in zip(self.weights, self.parts, weights, strict=True)
            )
        )


# by id of a weight, which is its own until the weak reference's callback has removed it here
_copies: dict[int, list[_Copy]] = {}
_watches: dict[int, weakref.ref[torch.Tensor]] = {}


def working_copy(weights: torch.Tensor | tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """The rows of all weights, one below the other, in another dtype.

    Args:
        weights: one or several, of the same shape but for the number of rows.
        dtype: of the copy.

    Returns:
        Detached, contiguous. The same memory in every call where `may_keep(weights)` holds, and not to be written to;
        a weight that has changed is copied again, in place, so that a graph which still needs the earlier values says
        so in its backward.
    """
    weights = (weights,) if isinstance(weights, torch.Tensor) else weights
    if not may_keep(weights):
        with torch.no_grad():
            return torch.cat([weight.to(dtype) for weight in weights]) if len(weights) > 1 else weights[0].to(dtype)
    found = _find(weights, dtype)
    states = [_state_of(weight) for weight in weights]
    if found is None:
        found = _make(weights, dtype)
    if found.states != states:
        with torch.inference_mode(False), torch.no_grad():
            for part, weight, state, old in zip(found.parts, weights, states, found.states, strict=True):
                if state != old:
                    part.copy_(weight)
        found.states = list(states)
        for weight in weights:  # this is the copy that `destination` shall name
            kept = _copies[id(weight)]
            kept.remove(found)
            kept.append(found)
    return found.values


def may_keep(weights: tuple[torch.Tensor, ...]) -> bool:
    """Whether a copy of these can be kept: plain leaf tensors of a CPU, outside of compilation and of functorch."""
    if not is_plain(*weights) or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return False
    return all(
        weight.device.type == "cpu" and weight.is_leaf and not weight.is_inference()  # counts no versions
        for weight in weights
    )


def destination(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor | None:
    """Where a kept copy has this weight: rows of it for an optimizer to write, or None.

    Of several copies it is the one that was last out of date: of a model that multiplies by queries, keys and values
    together under one objective and apart under the other, those of the present one.
    """
    for copy in reversed(_copies.get(id(weight), ())):
        if copy.values.dtype == dtype:
            part = copy.parts[_place_of(weight, copy)]
            if part.shape == weight.shape:
                return part
    return None


def mark_current(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """The rows that `destination` gave hold the weight as it is now; call it after the weight's version was counted."""
    for copy in reversed(_copies.get(id(weight), ())):
        if copy.values.dtype == dtype:
            copy.states[_place_of(weight, copy)] = _state_of(weight)
            return


def _find(weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> _Copy | None:
    for copy in _copies.get(id(weights[0]), ()):
        if copy.is_of(weights, dtype):
            return copy
    return None


def _make(weights: tuple[torch.Tensor, ...], dtype: torch.dtype) -> _Copy:
    _watch_optimizers()
    rows = sum(weight.shape[0] for weight in weights)
    with torch.inference_mode(False), torch.no_grad():
        copy = _Copy(weights, torch.empty((rows, *weights[0].shape[1:]), dtype=dtype, device="cpu"))
    for weight in weights:
        key = id(weight)
        if key not in _watches:
            _watches[key] = weakref.ref(weight, lambda _, key=key: _forget(key))  # type: ignore[misc]
        kept = _copies.setdefault(key, [])
        # of another shape, the weight's data were exchanged: that copy can never be used again
        kept[:] = [old for old in kept if old.parts[_place_of(weight, old)].shape == weight.shape]
        if copy not in kept:  # a weight may be there twice
            kept.append(copy)
    return copy


def _place_of(weight: torch.Tensor, copy: _Copy) -> int:
    return next(place for place, held in enumerate(copy.weights) if held() is weight)


def _forget(key: int) -> None:
    """A weight is gone: its copies are of no use to the others either."""
    _watches.pop(key, None)
    gone = _copies.pop(key, [])
    for kept in _copies.values():
        kept[:] = [copy for copy in kept if copy not in gone]


@cache
def _watch_optimizers() -> None:
    """Once, with the first copy."""
    register_optimizer_step_post_hook(_outdate)


def _outdate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if getattr(optimizer, "writes_working_copies", False):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for copy in _copies.get(id(weight), ()):
                copy.states = [
                    None if held() is weight else state for held, state in zip(copy.weights, copy.states, strict=True)
                ]


# not to be traced: torch.compiler.disable without its import of dynamo, which takes two seconds
_outdate._torchdynamo_disable = True  # type: ignore[attr-defined]


def _state_of(weight: torch.Tensor) -> _State:
    address = weight.data_ptr()
    state = weight._version, address, weight.shape, weight.stride(), weight.dtype
    size = weight.numel() * weight.element_size()
    if size < _SAMPLE_BYTES or not weight.is_contiguous():
        return state
    last = size - _SAMPLE_BYTES
    return *state, *(ctypes.string_at(address + place, _SAMPLE_BYTES) for place in (0, last // 2, last))
