"""Large memory that is used again from call to call: fresh pages are mapped and cleared by the system every time.

A buffer comes back when the last tensor that shares its storage is gone, whoever holds it: a view, a graph that is
kept, a hook. So nothing is lent twice.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

# what is smaller comes from torch, whose allocator does not map pages for it
_LEAST_BYTES = 2**20
_ALIGNMENT = 64


class Pool:
    """Buffers that are lent as tensors: at most as many as were lent at a time, each as large as was asked for."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # a collection of garbage may give back in the middle of `take`

    def take(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of a CPU, contiguous; NaN where torch fills what is uninitialised."""
        count = int(np.prod(shape, dtype=np.int64))
        size = count * dtype.itemsize
        if size < _LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        buffer = self._fitting(size)
        start = -buffer.ctypes.data % _ALIGNMENT
        lent = buffer[start : start + size]
        weakref.finalize(lent, self._give_back, buffer).atexit = False
        tensor = torch.from_numpy(lent).view(dtype).view(shape)
        filled: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        if filled and torch.are_deterministic_algorithms_enabled():
            tensor.fill_(torch.nan)
        return tensor

    def clear(self) -> None:
        """Give the system what is not lent."""
        with self._lock:
            self._free.clear()

    def _fitting(self, size: int) -> np.ndarray:
        with self._lock:
            self._free.sort(key=len)
            for place, buffer in enumerate(self._free):
                if len(buffer) >= size + _ALIGNMENT:
                    return self._free.pop(place)
            if self._free:  # the larger one replaces the largest
                self._free.pop()
        return np.empty(size + _ALIGNMENT, dtype=np.uint8)

    def _give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)


POOL = Pool()
