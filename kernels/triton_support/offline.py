"""Compile a Triton kernel for a GPU that is not there.

The binary goes into Triton's cache under the key that a launch with the same arguments and options computes on such a
GPU: the target, the specialised signature, the options, the source, the Triton build and its environment variables. So
kernels can be compiled on a machine without a GPU that shares the cache folder, and judged by their binaries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS: dict[str, GPUTarget] = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def target(arch: str) -> GPUTarget:
    """The target of an architecture's name: "sm_90", "90" or "gfx942".

    Raises:
        ValueError: no kernel of the package is compiled for that architecture.
    """
    found = TARGETS.get(arch) or TARGETS.get(f"sm_{arch}")
    if found is None:
        raise ValueError(f"arch must be one of {', '.join(TARGETS)}; got {arch}")
    return found


class _AbsentGpu:
    """What Triton asks its active driver while it compiles; it can launch nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def standing_in(target: GPUTarget) -> Iterator[None]:
    """Make the target the machine's GPU as Triton sees it; the previous driver comes back whatever happens."""
    # asking for driver.active would create the real driver, which raises where there is no GPU
    previous = driver._active
    driver.set_active(_AbsentGpu(target))
    try:
        yield
    finally:
        driver._active = previous


def compile_offline(
    kernel: JITFunction,
    arguments: dict[str, Any],
    target: GPUTarget,
    *,
    num_warps: int,
    num_stages: int,
) -> CompiledKernel:
    """Compile one specialisation of a kernel for a target, or read it from Triton's cache.

    A later launch finds the entry if it passes `enable_fp_fusion=True`, these options and arguments of the same types,
    divisibility by 16 and alignment. Not thread-safe: Triton's active driver is one per process.

    Args:
        kernel: what `@triton.jit` returned.
        arguments: by parameter name, as a launch would pass them: tensors, None, ints, floats, bools, values of
            constexprs. A tensor on the `meta` device counts as 16-byte aligned, a view of one as its offset says.
        target: one of `TARGETS`.
        num_warps: warps per program.
        num_stages: pipeline stages of its loops.

    Returns:
        The compiled kernel, with its stages in `.asm` and its shared memory in `.metadata.shared`.

    Raises:
        TypeError: the kernel is not a compiled one, such as under TRITON_INTERPRET=1.
    """
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"kernel must be a compiled function of triton.jit; got {type(kernel).__name__}")
    # Triton keys these by device index alone and keeps the target of the first use: a binary of an absent GPU left
    # in them would be launched on the real device 0, and would be returned for every later target
    kept = kernel.device_caches
    kernel.device_caches = defaultdict(kernel.create_binder)
    try:
        with standing_in(target):
            compiled = kernel.warmup(
                **arguments, grid=(1,), num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
            )
    finally:
        kernel.device_caches = kept
    return compiled
