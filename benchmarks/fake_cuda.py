"""Tensors of a GPU that is not there: what a call would return on one, its shape and dtype, without computing it.

Forward only: autograd on such tensors ends a process whose torch was built without CUDA. Brackets and a few methods
ask that torch for its CUDA support as well, so they are spelled out in operations here. What reads a value back from
the device cannot be followed, and its row says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from harness import Told
from peers import eager_ltg_bert
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """In here, device="cuda" works, as compute capability 9.0; everything that is made here stays here."""
    with (
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        mock.patch.multiple(
            torch.Tensor,
            __getitem__=_get,
            __setitem__=_set,
            __invert__=lambda x: torch.ops.aten.bitwise_not(x),
            contiguous=lambda x, **_: torch.ops.aten.clone(x, memory_format=torch.contiguous_format),
            copy_=lambda x, value, *_, **__: torch.ops.aten.copy_(x, value),
            nonzero=lambda x: torch.ops.aten.nonzero(x),
        ),
        FakeTensorMode(),
        torch.no_grad(),
    ):
        eager_ltg_bert.bucket_rows.cache_clear()
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Told(f"reads a value back from the device ({error}), which a fake one does not have") from None
        finally:
            eager_ltg_bert.bucket_rows.cache_clear()


def faces(function: Callable[..., Any], inputs: Sequence[Tensor], *, targets: Tensor | None = None) -> str:
    """Shapes and dtypes of the function's results on fake CUDA tensors like these inputs."""
    with fake_cuda():
        keywords = {} if targets is None else {"targets": torch.empty(targets.shape, dtype=torch.int64, device="cuda")}
        out = function(*(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs), **keywords)
        outs = out if isinstance(out, tuple) else (out,)
        for x in outs:
            if x.device.type != "cuda":
                raise AssertionError(f"the result must be on cuda; got {x.device}")
        return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in outs)


def _parts(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """x after its slices, numbers and new axes; and what index tensors there are, by axis."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is Ellipsis for item in items):
        place = next(number for number, item in enumerate(items) if item is Ellipsis)
        axes = sum(item is not None for item in items) - 1
        items[place : place + 1] = [slice(None)] * (x.dim() - axes)
    tensors: list[Tensor | None] = []
    axis = 0
    for item in items:
        if item is None:
            x = x.unsqueeze(axis)
        elif isinstance(item, slice):
            if item != slice(None):
                x = torch.ops.aten.slice.Tensor(x, axis, item.start, item.stop, item.step or 1)
        elif isinstance(item, Tensor):
            tensors += [None] * (axis - len(tensors)) + [item]
        else:
            x = x.select(axis, int(item))
            continue
        axis += 1
    return x, tensors


def _get(x: Tensor, index: Any) -> Tensor:
    x, tensors = _parts(x, index)
    return torch.ops.aten.index.Tensor(x, tensors) if tensors else x


def _set(x: Tensor, index: Any, value: Any) -> None:
    x, tensors = _parts(x, index)
    value = value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)
    if tensors:
        x.index_put_(tensors, value)
    else:
        x.copy_(value)
