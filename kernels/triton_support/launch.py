"""A kernel call as a value: the same description is launched on a device or compiled for one that is not there."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.kernels.triton_support.interpreter import correct_interpreter
from antlm_fast.kernels.triton_support.offline import compile_offline

_logger = logging.getLogger(__name__)

# a device runs the tiles of the newest of these that is not newer than itself
_CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (12, 0): "sm_120",
}
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """How much one program computes, with how many warps, and how many loads ahead it runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def smaller(self) -> Tile | None:
        """The next tile to try where this one needs more than the device has; None if there is none."""
        if self.num_stages > 1:
            return replace(self, num_stages=self.num_stages - 1)
        if self.block_n >= self.block_m and self.block_n > 16:
            return replace(self, block_n=self.block_n // 2)
        return replace(self, block_m=self.block_m // 2) if self.block_m > 16 else None


Tiles = Mapping[str, Mapping[str, Mapping[str, Tile]]]  # arch -> "kernel kind" -> head size, padded


@cache
def read_tiles(path: Path) -> Tiles:
    """The table of tiles beside an op: {arch: {"kernel kind": {padded head size: [m, n, warps, stages]}}}."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return {
        arch: {use: {size: Tile(*tile) for size, tile in sizes.items()} for use, sizes in uses.items()}
        for arch, uses in table.items()
    }


@dataclass(frozen=True)
class Launch:
    """One kernel call.

    Args:
        kernel: the jitted function.
        grid: the number of programs for a tile.
        arguments: by name, all but the tile's.
        tile: the first to try.
    """

    kernel: Any
    grid: Callable[[Tile], int]
    arguments: Mapping[str, Any]
    tile: Tile

    def run(self, device: torch.device) -> None:
        """Run on a device; a tile that needs more than the device has is replaced by smaller ones, once for all calls.

        Raises:
            triton.runtime.errors.OutOfResources: even the smallest tile needs more than the device has.
        """
        correct_interpreter()
        constants = tuple(value for name, value in self.arguments.items() if name.isupper())
        dtypes = tuple(x.dtype for x in self.arguments.values() if isinstance(x, torch.Tensor))
        key = (self.kernel, constants, dtypes, self.arguments.get("group"), self.tile, device)
        tile = _replaced.get(key, self.tile)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            while True:
                try:
                    self.launch(tile)
                    return
                except OutOfResources as error:
                    smaller = tile.smaller()
                    if smaller is None:
                        raise
                    _logger.warning("%s: %s does not fit %s (%s); using %s", self.name, tile, device, error, smaller)
                    tile = _replaced[key] = smaller

    def launch(self, tile: Tile) -> None:
        programs = self.grid(tile)
        if programs:
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
            self.kernel[(programs,)](**self.with_tile(tile), **options)

    def with_tile(self, tile: Tile) -> dict[str, Any]:
        """Every argument of the kernel. One that has no use for columns takes no BLOCK_N."""
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        return {**self.arguments, **{name: size for name, size in blocks.items() if name in self.kernel.arg_names}}

    def compile_for(self, target: GPUTarget) -> CompiledKernel:
        """The binary for a GPU that need not be there, out of Triton's cache or into it."""
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        return compile_offline(self.kernel, self.with_tile(self.tile), target, **options)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


_replaced: dict[tuple[Any, ...], Tile] = {}


def arch_of(device: torch.device) -> str:
    """The row of a table of tiles that a device takes."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter takes any
    if torch.version.hip:
        return "gfx942"
    return _nearest(torch.cuda.get_device_capability(device))


def _nearest(capability: tuple[int, int]) -> str:
    known = [key for key in _CAPABILITIES if key <= capability]
    if not known:
        raise UnsupportedError("Triton kernels need compute capability 8.0; the device has {}.{}".format(*capability))
    return _CAPABILITIES[max(known)]


def kind_of(dtype: torch.dtype) -> str:
    """What the matrix units multiply: "half" (float16, bfloat16), or for float32 "tf32" or "ieee".

    float32 follows torch's setting for matrix products on CUDA (torch.set_float32_matmul_precision, or
    torch.backends.cuda.matmul.fp32_precision), which by default is IEEE.
    """
    if dtype != torch.float32:
        return "half"
    if torch.version.hip:
        return "ieee"
    # torch's newer setting, where it has one: asking by the older name raises once the newer was used
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.get_float32_matmul_precision() != "highest" if newer is None else newer == "tf32"
    return "tf32" if tf32 else "ieee"


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that the matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def log2_scale(softmax_scale: float) -> float:
    """Scores times this are exponents of two."""
    return softmax_scale * _LOG2_E
