"""Kernel tests run on poisoned memory, and know the ways an attention call can go."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from antlm_fast.kernels.attention import torch_impl
from antlm_fast.kernels.disentangled_attention import torch_impl as relative_torch_impl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# an implementation's ways that small CPU tensors do not take, forced; "triton small" has small tiles, so that short
# sequences cross many of their edges
PLAIN = ("reference", "native", "torch", "torch, all fused", "torch, device plan")
RELATIVE = ("reference", "native", "torch", "torch, all recomputed", "torch, device plan")
TRITON = ("triton", "triton small")
SMALL_TILES = {"delta": (128, 16), "forward": (32, 32), "dq": (32, 32), "dkdv": (32, 32)}
LARGE_TILES = {"delta": (128, 16), "forward": (128, 128), "dq": (128, 128), "dkdv": (128, 128)}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so what a kernel forgets to write is always seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(
    params=TRITON if INTERPRETED else [*PLAIN, *(pytest.param(way, marks=pytest.mark.gpu) for way in TRITON)]
)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An implementation of attention, each of its ways.

    Triton's run where TRITON_INTERPRET=1 is set, as `make test` does for a process of their own, and on a GPU.
    """
    way: str = request.param
    if way == "torch, all fused":
        monkeypatch.setattr(torch_impl, "_MATERIALISED_KIB", 0)
    if way == "torch, device plan":
        monkeypatch.setattr(torch_impl, "_host_may_read", lambda x: False)
    if way == "triton small":
        set_tiles(monkeypatch, SMALL_TILES)
    with torch.device("cuda" if way in TRITON and not INTERPRETED else "cpu"):
        yield way.split(",")[0].split()[0]


def set_tiles(monkeypatch: pytest.MonkeyPatch, tiles: dict[str, tuple[int, int]]) -> None:
    """Give the Triton kernels tiles of other sizes, by the kernel's name."""
    from antlm_fast.kernels.attention import triton_launches
    from antlm_fast.kernels.triton_support.launch import Tile

    monkeypatch.setattr(triton_launches, "tile_for", lambda use, arch, head_dim: Tile(*tiles[use.split()[0]], 4, 1))


@pytest.fixture(
    params=("triton small",)
    if INTERPRETED
    else [*RELATIVE, *(pytest.param(way, marks=pytest.mark.gpu) for way in TRITON)]
)
def relative_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An implementation of disentangled attention, each of its ways."""
    yield from _relative_way(request.param, monkeypatch)


@pytest.fixture(
    params=("triton large",)
    if INTERPRETED
    else [*RELATIVE, *(pytest.param(way, marks=pytest.mark.gpu) for way in TRITON)]
)
def long_relative_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same for long sequences: the interpreter's time goes with the number of tiles."""
    yield from _relative_way(request.param, monkeypatch)


def _relative_way(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if way == "torch, all recomputed":
        monkeypatch.setattr(relative_torch_impl, "_MATERIALISED_KIB", 0)
    if way == "torch, device plan":
        monkeypatch.setattr(relative_torch_impl, "_host_may_read", lambda x: False)
    if way == "triton small":
        set_tiles(monkeypatch, SMALL_TILES)
    if way == "triton large":
        set_tiles(monkeypatch, LARGE_TILES)
    with torch.device("cuda" if way in TRITON and not INTERPRETED else "cpu"):
        yield way.split(",")[0].split()[0]
