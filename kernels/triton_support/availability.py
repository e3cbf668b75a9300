"""Whether Triton kernels can run here. Imports neither triton nor a driver."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def unavailable_reason(device_type: str) -> str | None:
    """A sentence if no Triton kernel can run on a device of this type, else None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install '.[gpu]' in antlm_fast's checkout)"
    if device_type == "cuda":
        return _too_old()
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton kernels run on CUDA devices (on the CPU, slowly, where TRITON_INTERPRET=1 was set at the start)"


# torch.compile calls it and does not look inside, where torch before 2.13 cannot follow find_spec: what
# torch.compiler.assume_constant_result does, without its import of dynamo, which takes two seconds
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _too_old() -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability() >= (8, 0):
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"Triton kernels need compute capability 8.0; the device has {major}.{minor}"
