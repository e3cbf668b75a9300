"""What figures depend on: hardware, versions, threads, load; nothing that names the machine or its folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "antlm_fast",
    "transformers",
    "triton",
    "numpy",
    "tokenizers",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "xformers",
    "flashdeberta",
    "disentangled-flash",
)
_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "LD_PRELOAD", "MALLOC_MMAP_MAX_")
# two results that differ in one of these were not taken on the same machine in the same way
SAME_MACHINE = ("device", "system", "cpu", "capability", "cores", "threads", "gpu")


def environment(device: str = "cpu") -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        **(_gpu() if device == "cuda" else {"gpu": None}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package.replace("-", "_"): _version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "compiler": next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "settings": {name: Path(os.environ[name]).name for name in _SETTINGS if name in os.environ},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """As nvidia-smi names it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def shared(surroundings: Mapping[str, Any]) -> bool:
    """Whether the cores had too much to do already, for as many threads as are ours, when the run began."""
    load = surroundings["load_average"]
    return load is not None and load[0] + surroundings["threads"] > surroundings["cores"] + 0.5


def available_gib() -> float | None:
    """Memory that new work can have, or None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """As the system shows it; inside a virtual machine that need not be the name on the chip."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
