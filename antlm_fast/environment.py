"""Where a run takes place: device, precision, and the versions that its numbers depend on."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any, Literal

import torch

from antlm_fast.types import InputError

VERSIONED = ("antlm_fast", "torch", "numpy", "tokenizers", "safetensors")


def resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device must be 'auto', 'cpu' or 'cuda'; got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device must be one that torch can use; got {device!r}, and torch sees no CUDA device")
    return device


def resolve_precision(precision: str, device: str) -> Literal["float32", "bfloat16"]:
    """ "auto" is bfloat16 where the hardware multiplies matrices in it, else float32."""
    if precision != "auto":
        return "bfloat16" if precision == "bfloat16" else "float32"
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    read_capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.13 has it
    capabilities = read_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def versions() -> dict[str, str]:
    """What a result depends on: packages, Python, machine, threads."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for package in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["torch"] = torch.__version__
    return found
