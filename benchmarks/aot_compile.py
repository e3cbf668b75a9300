"""The shipped kernels compiled for GPUs that are not there, and what each binary costs.

`row_of` and `comparison_of` take and return plain values, so that processes can share the work.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from peers import plain_flash_attention
from sass import resources
from variants import constexpr_visibility

from antlm_fast.kernels.attention.triton_launches import offline_launches
from antlm_fast.kernels.linear_cross_entropy.triton_launches import offline_launches as loss_launches
from antlm_fast.kernels.triton_support.launch import Launch, Tile, padded_head_dim
from antlm_fast.kernels.triton_support.offline import TARGETS, compile_offline, target

ARCHS = tuple(TARGETS)
KINDS = ("half", "tf32", "ieee")
ATTENTION_KERNELS = ("forward", "delta", "dq", "dkdv")
LOSS_KERNELS = ("loss_forward", "loss_d_logits")
KERNELS = (*ATTENTION_KERNELS, *LOSS_KERNELS)
HEAD_DIMS = (16, 32, 64, 80, 128, 256)
LOSS_HIDDEN_SIZE = 768  # one size stands for all that are multiples of 16: it is no constant of the kernels
LOSS_VOCAB_SIZE = 32768
SIZES = (*HEAD_DIMS, LOSS_HIDDEN_SIZE)
COMPARED_HEAD_DIMS = (64, 128)
RELATIVE_HEAD_DIMS = {"half": (32, 64, 128), "tf32": (64,), "ieee": (64,)}  # disentangled attention's rows
_BUCKET_SIZE = 32
_HEADS = 8
_GROUPED_KV_HEADS = 2  # dK/dV is another binary where a key head serves several query heads


@dataclass(frozen=True)
class Config:
    """One shipped kernel: what a launch's binary depends on. The loss's kernels have a hidden size for a head size."""

    arch: str
    kind: str
    head_dim: int
    kernel: str
    # "dropout", "float16", "gqa", "relative" (both terms), "relative dropout"; of the loss "options" (bias, softcap,
    # smoothing); or none
    option: str = ""

    @property
    def name(self) -> str:
        return f"{self.arch} {self.kind} {self.head_dim} {self.kernel} {self.option}".rstrip()


def configurations(
    archs: tuple[str, ...] = ARCHS,
    kinds: tuple[str, ...] = KINDS,
    head_dims: tuple[int, ...] = SIZES,
    kernels: tuple[str, ...] = KERNELS,
) -> Iterator[Config]:
    """Every shipped configuration, or those of some architectures, kinds of numbers, head sizes and kernels."""
    for arch in archs:
        for kind in kinds:
            if kind == "tf32" and arch == "gfx942":
                continue  # launch.kind_of never answers it there
            if LOSS_HIDDEN_SIZE in head_dims:
                for kernel in (name for name in LOSS_KERNELS if name in kernels):
                    yield Config(arch, kind, LOSS_HIDDEN_SIZE, kernel)
                    yield Config(arch, kind, LOSS_HIDDEN_SIZE, kernel, "options")
            for head_dim in (size for size in head_dims if size != LOSS_HIDDEN_SIZE):
                padded = padded_head_dim(head_dim) != head_dim
                if padded and kind != "half":
                    continue
                for kernel in (name for name in ATTENTION_KERNELS if name in kernels):
                    if kernel == "delta" and kind == "tf32":
                        continue  # it multiplies no matrices: the binary of ieee
                    yield Config(arch, kind, head_dim, kernel)
                    if kind == "half" and head_dim in COMPARED_HEAD_DIMS:
                        yield Config(arch, kind, head_dim, kernel, "float16")
                        if kernel != "delta":
                            yield Config(arch, kind, head_dim, kernel, "dropout")
                        if kernel == "dkdv":
                            yield Config(arch, kind, head_dim, kernel, "gqa")
                    if kernel != "delta" and head_dim in RELATIVE_HEAD_DIMS[kind]:
                        yield Config(arch, kind, head_dim, kernel, "relative")
                        if kind == "half" and head_dim == 64:
                            yield Config(arch, kind, head_dim, kernel, "relative dropout")


def launch_of(config: Config) -> Launch:
    """The launch of a configuration, with the table's tile."""
    half = torch.float16 if config.option == "float16" else torch.bfloat16
    if config.kernel in LOSS_KERNELS:
        everything = config.option == "options"
        launches = loss_launches(
            config.arch,
            half if config.kind == "half" else torch.float32,
            config.head_dim,
            LOSS_VOCAB_SIZE,
            kind=config.kind,
            biased=everything,
            softcap=everything,
            smoothed=everything,
        )
        return launches[LOSS_KERNELS.index(config.kernel)]
    launches = offline_launches(
        config.arch,
        half if config.kind == "half" else torch.float32,
        config.head_dim,
        _HEADS,
        _GROUPED_KV_HEADS if config.option == "gqa" else _HEADS,
        dropout="dropout" in config.option,
        kind=config.kind,
        bucket_size=_BUCKET_SIZE if "relative" in config.option else None,
    )
    return next(launch for launch in launches if launch.name == f"{config.kernel}_kernel")


def resources_of(launch: Launch, arch: str) -> dict[str, Any]:
    """What a launch's binary needs on an architecture: its tile, and `sass.resources` with the main loops alone.

    A main loop multiplies matrices: it has MMAs or, in IEEE fp32, FFMAs. Zeros other than a loop's mma are left out of
    the loops. Raises what the compiler raises.
    """
    return {"tile": list(astuple(launch.tile)), **_judged(launch.compile_for(target(arch)))}


def _judged(compiled: Any) -> dict[str, Any]:
    found = resources(compiled)
    work = "mma" if any(loop["mma"] for loop in found["loops"]) else "ffma"
    loops = [loop for loop in found["loops"] if loop[work]]
    return {**found, "loops": [{name: n for name, n in loop.items() if n or name == "mma"} for loop in loops]}


def row_of(config: Config) -> dict[str, Any]:
    """The table's row of a configuration: its resources, or tile and error where it does not compile."""
    launch = launch_of(config)
    return {"tile": list(astuple(launch.tile))} | _or_error(lambda: resources_of(launch, config.arch))


def shared_of(config: Config) -> dict[str, Any]:
    """A configuration's shared memory, or its error: what any Triton tells, without a look at the binary."""
    launch = launch_of(config)
    return _or_error(lambda: {"shared_bytes": launch.compile_for(target(config.arch)).metadata.shared})


def _or_error(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work returns, or {"error": one line}: a kernel that does not compile must not cost the others' rows."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)  # MLIR writes its reasons there, beside thousands of lines of its module
        try:
            return work()
        except Exception as error:  # compilers raise what they like
            said.seek(0)
            return {"error": one_line(error, said.read())}
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def one_line(error: BaseException, stderr: str = "") -> str:
    """What is wrong, by an error's message and the compiler's first complaint, without names of folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|exceed|fail|must|require|cannot|unsupported", line, re.I)]
    said = (telling or lines or ["no message"])[-1]
    complaint = re.search(r"\berror: (.*)", stderr)
    said += f": {complaint.group(1)}" if complaint else ""
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+)+/', '', said)[:160]}"


def comparison_cases(
    archs: tuple[str, ...] = ARCHS,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    kernels: tuple[str, ...] = KERNELS,
) -> list[Config]:
    """Where visibility as data is compared with visibility as a constant: NVIDIA, bfloat16, head sizes 64 and 128."""
    chosen = tuple(head_dim for head_dim in head_dims if head_dim in COMPARED_HEAD_DIMS)
    nvidia = tuple(arch for arch in archs if arch.startswith("sm_"))
    found = configurations(
        nvidia, ("half",), chosen, tuple(name for name in kernels if name in ("forward", "dq", "dkdv"))
    )
    return [config for config in found if not config.option]


def comparison_of(config: Config) -> dict[str, Any]:
    """The same kernel with the flag as data ("ours") and as a constant, and the plain yardstick, all with our tile.

    Returns:
        The tile, and per kernel the instructions of its unmasked and masked loop (None where it has no such loop),
        registers and spill_bytes; or None where the yardstick does not take the tile. Tile and error where one
        of the kernels does not compile.
    """
    launch = launch_of(config)
    return {"tile": list(astuple(launch.tile))} | _or_error(lambda: _compared(config, launch))


def _compared(config: Config, launch: Launch) -> dict[str, Any]:
    row: dict[str, Any] = {"ours": _costs(launch.kernel, launch, config)}
    for name, causal in (("causal", True), ("full", False)):
        module = _constexpr(causal)[f"triton_{config.kernel}"]
        row[f"constexpr {name}"] = _costs(getattr(module, launch.name), launch, config)
    plain = getattr(plain_flash_attention, f"plain_{config.kernel}")
    for name, causal, keep_loop in (("causal", True, False), ("causal loop", True, True), ("full", False, False)):
        arguments = _plain_arguments(plain, config.head_dim, launch.tile)
        arguments |= {"CAUSAL": causal, "KEEP_LOOP": keep_loop}
        takes = not causal or _divides(config.kernel, launch.tile)
        row[f"plain {name}"] = _costs(plain, launch, config, arguments) if takes else None
    return row


@cache
def _constexpr(causal: bool) -> dict[str, ModuleType]:
    return constexpr_visibility(causal)


def _divides(kernel: str, tile: Tile) -> bool:
    """Whether the yardstick's causal form takes the tile."""
    return (tile.block_n % tile.block_m if kernel == "dkdv" else tile.block_m % tile.block_n) == 0


def _plain_arguments(kernel: Any, head_dim: int, tile: Tile) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stride_token": _HEADS * head_dim,
        "stride_head": head_dim,
        "seqlen": 4096,
        "num_heads": _HEADS,
        "softmax_scale": head_dim**-0.5,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            dtype = torch.float32 if name in ("lse_ptr", "delta_ptr") else torch.bfloat16
            values[name] = torch.empty(4096, device="meta", dtype=dtype)
    return values


def _costs(kernel: Any, launch: Launch, config: Config, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    tile = launch.tile
    compiled = compile_offline(
        kernel,
        launch.with_tile(tile) if arguments is None else arguments,
        target(config.arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    found = _judged(compiled)
    counts = [loop["instructions"] for loop in found["loops"]]
    if config.kernel == "dkdv":
        counts.reverse()  # its masked rows come first
    unmasked, masked = [*counts, None, None][:2]
    return {
        "unmasked": unmasked,
        "masked": masked,
        "registers": found["registers"],
        "spill_bytes": found["spill_store_bytes"] + found["spill_load_bytes"],
    }
