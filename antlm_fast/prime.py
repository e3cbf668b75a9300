"""Compile a model's Triton kernels ahead of its first step, for a GPU that need not be there.

The binaries go into Triton's cache, under the keys that the model's own launches look up. Importing this needs triton.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from antlm_fast.kernels.attention.triton_launches import TILES, offline_launches
from antlm_fast.kernels.triton_support.availability import unavailable_reason
from antlm_fast.kernels.triton_support.interpreter import interpreting
from antlm_fast.kernels.triton_support.launch import Launch, arch_of, kind_of, read_tiles
from antlm_fast.kernels.triton_support.offline import TARGETS, target
from antlm_fast.training.config import TrainConfig
from antlm_fast.types import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """What attention's kernels depend on; sequences, lengths, batches and flags are not among it.

    Args:
        dropout: whether training drops attention probabilities; evaluation drops none.
        bucket_size: of disentangled attention, B of its relative tables; None is plain attention.
    """

    head_dim: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    dropout: bool = False
    bucket_size: int | None = None


@dataclass(frozen=True)
class PrimedKernel:
    """One kernel that now lies in Triton's cache; `compiled` is False if it was there before."""

    arch: str
    name: str
    seconds: float
    compiled: bool


def sizes_of(config: TrainConfig, precision: str | None = None) -> AttentionSizes:
    """What a run's training and evaluation call attention with on a GPU.

    Args:
        config: its model and, where precision is None, its precision; "auto" is bfloat16, as on every GPU that the
            kernels run on.
        precision: one of DTYPES.
    """
    wanted = precision or ("bfloat16" if config.precision == "auto" else config.precision)
    model = config.model  # its queries and keys leave a projection (and the rotary embedding) in autocast's dtype
    sizes: dict[str, Any] = {"head_dim": model.head_dim, "heads": model.num_attention_heads, "dtype": DTYPES[wanted]}
    if model.architecture == "baby_llama":
        return AttentionSizes(**sizes, kv_heads=model.kv_heads)
    return AttentionSizes(
        **sizes,
        kv_heads=model.num_attention_heads,
        dropout=model.attention_dropout > 0,
        bucket_size=model.position_bucket_size,
    )


def prime(sizes: AttentionSizes, arch: str | None = None) -> Iterator[PrimedKernel]:
    """Compile forward, delta, dQ and dK/dV for a GPU, or find them in Triton's cache; yields each when it is there.

    With dropout also the forward without it, which evaluation runs.

    float32 is compiled as torch.get_float32_matmul_precision() says now, in IEEE arithmetic or tf32.

    Args:
        sizes: what attention is called with.
        arch: "sm_90", "90", "gfx942"; None is the GPU that is there.

    Raises:
        InputError: no kernel is compiled for that arch or head_dim, there is no GPU that could be meant, or
            TRITON_INTERPRET=1 is set, or Triton's cache would be in a home folder and there is none.
    """
    if interpreting():
        raise InputError("TRITON_INTERPRET must not be set: interpreted kernels are never compiled; got 1")
    if cache_folder().parts[0] == "~":  # Triton would make a folder of this name
        raise InputError("TRITON_CACHE_DIR must be set where the user has no home folder; got none")
    row, gpu = _gpu_that_is_there() if arch is None else _gpu_of(arch)
    largest = max(map(int, read_tiles(TILES)[row]["delta"]))
    if not 1 <= sizes.head_dim <= largest:
        raise InputError(f"head_dim must be from 1 to {largest} for the Triton kernels; got {sizes.head_dim}")
    if sizes.kv_heads < 1 or sizes.heads < 1 or sizes.heads % sizes.kv_heads:
        raise InputError(f"heads must be a multiple of kv_heads {sizes.kv_heads}, at least 1; got {sizes.heads}")
    kind = kind_of(sizes.dtype)
    if kind == "tf32" and gpu.backend == "hip":
        kind = "ieee"
    return _compile(sizes, row, gpu, kind)


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    return Path(triton.knobs.cache.dir)


def _compile(sizes: AttentionSizes, row: str, gpu: GPUTarget, kind: str) -> Iterator[PrimedKernel]:
    launches: list[Launch] = []
    for dropout in (True, False) if sizes.dropout else (False,):
        wanted = offline_launches(
            row,
            sizes.dtype,
            sizes.head_dim,
            sizes.heads,
            sizes.kv_heads,
            dropout=dropout,
            kind=kind,
            bucket_size=sizes.bucket_size,
        )
        launches += wanted[:1] if launches else wanted
    name = f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch)
    for launch in launches:
        # the file that Triton writes last, and looks for first
        entries = f"*/__grp__{launch.name}.json"
        before, begun = set(cache_folder().glob(entries)), time.monotonic()
        launch.compile_for(gpu)
        seconds = time.monotonic() - begun
        yield PrimedKernel(name, launch.name, seconds, compiled=not before.issuperset(cache_folder().glob(entries)))


def _gpu_of(arch: str) -> tuple[str, GPUTarget]:
    """The row of the table of tiles, and Triton's target."""
    try:
        gpu = target(arch)
    except ValueError as error:
        raise InputError(str(error)) from None
    return next(name for name, known in TARGETS.items() if known == gpu), gpu


def _gpu_that_is_there() -> tuple[str, GPUTarget]:
    if not torch.cuda.is_available():
        raise InputError(f"arch must be given where there is no GPU, such as --arch 90 (among {', '.join(TARGETS)})")
    reason = unavailable_reason("cuda")
    if reason is not None:
        raise InputError(f"arch must be given: {reason}")
    return arch_of(torch.device("cuda", torch.cuda.current_device())), driver.active.get_current_target()
