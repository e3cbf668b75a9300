"""Kernels compiled ahead of their first launch, on all cores at once, where later processes find them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context
from typing import Any


def compiled_on_all_cores(compile_one: Callable[..., None], jobs: Sequence[tuple[Any, ...]], seconds: float) -> int:
    """How many of the jobs were done within the time; what was not, or failed, is compiled where it is launched.

    No process of the pool touches the GPU.
    """
    pool = ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn"))
    done, _ = wait([pool.submit(compile_one, *job) for job in jobs], timeout=max(seconds, 1.0))
    pool.shutdown(wait=False, cancel_futures=True)
    return sum(each.exception() is None for each in done)


def compile_with_launcher(launch: Any, arch: str) -> None:
    """The kernel, and what Triton launches it with: a little C program, which it compiles and keeps too."""
    from antlm_fast.kernels.triton_support.offline import target

    compiled = launch.compile_for(target(arch))
    with suppress(Exception):  # Triton's own affair, and other in each version: the first launch makes it otherwise
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
