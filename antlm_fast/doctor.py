"""What this machine has, and which implementation serves which op on it, with the reason for each that does not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata

import torch

from antlm_fast.cores import WAIT_SETTINGS, busy_cores, my_cores
from antlm_fast.environment import resolve_device, resolve_precision
from antlm_fast.kernels.attention import OPS as ATTENTION_OPS
from antlm_fast.kernels.attention import AttentionCall
from antlm_fast.kernels.disentangled_attention import OPS as DISENTANGLED_ATTENTION_OPS
from antlm_fast.kernels.dispatch import ImplementationRow, survey
from antlm_fast.kernels.fused_layers import OPS as FUSED_LAYER_OPS
from antlm_fast.kernels.fused_layers import FusedLayerCall
from antlm_fast.kernels.linear_cross_entropy import OPS as CROSS_ENTROPY_OPS
from antlm_fast.kernels.linear_cross_entropy import LinearCrossEntropyCall
from antlm_fast.kernels.mixed_linear import OPS as MIXED_LINEAR_OPS
from antlm_fast.kernels.mixed_linear import MixedLinearCall
from antlm_fast.kernels.native import library as native

DTYPE = torch.bfloat16  # what the rows below are asked for

# package -> what it is for
OPTIONAL = {
    "numpy": "batches",
    "safetensors": "weights on disk",
    "tokenizers": "train, eval (extra: train)",
    "tqdm": "progress bars (extra: train)",
    "matplotlib": "report and plots (extra: train)",
    "datasets": "--data hf:NAME",
    "tensorboard": "logging.tensorboard=true",
    "transformers": "loading exported models, tests (extra: hf)",
    "triton": "fused attention and loss on GPUs (extra: gpu)",
}


def report_lines() -> Iterator[str]:
    """The lines of `antlm-fast doctor`."""
    device = resolve_device("auto")
    yield f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch        {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield f"cores        {_cores()}"
    yield f"device       {device}: {_device_name(device)}; precision auto means {resolve_precision('auto', device)}"
    yield f"compiler     {shutil.which('c++') or 'none'} (for the C++ kernels at install, and Triton's launcher)"
    yield f"C++ kernels  {native.unavailable_reason('cpu', DTYPE) or native.library().description}"
    for package, purpose in OPTIONAL.items():
        yield f"{package:13}{_version(package):16}{purpose}"
    for op, rows in _operations(device):
        yield ""
        yield f"{op} on {device}, {DTYPE}, BabyLlama-58M sizes"
        for row in rows:
            served = "serves, and auto takes it" if row.chosen else "serves"
            yield f"  {row.impl:11}{served if row.reason is None else row.reason}"


def _cores() -> str:
    busy = busy_cores()
    others = "the system does not tell what others do" if busy is None else f"others keep {busy:.1f} of them busy"
    settings = ", ".join(f"{name}={os.environ[name]}" for name in WAIT_SETTINGS if name in os.environ)
    return f"{len(my_cores())} for this process, {others}; threads wait by {settings or 'spinning, then sleeping'}"


def _operations(device: str) -> Iterator[tuple[str, list[ImplementationRow]]]:
    attention = AttentionCall(device_type=device, dtype=DTYPE, head_dim=64, heads=8, kv_heads=8)
    for op, table in (ATTENTION_OPS | DISENTANGLED_ATTENTION_OPS).items():
        yield op, survey(op, table, attention)
    for op, layer_table in FUSED_LAYER_OPS.items():
        yield op, survey(op, layer_table, FusedLayerCall(device, (DTYPE, torch.float32)))
    for op, linear_table in MIXED_LINEAR_OPS.items():
        yield op, survey(op, linear_table, MixedLinearCall(device, DTYPE))
    cross_entropy = LinearCrossEntropyCall(device_type=device, dtype=DTYPE, hidden_size=512, vocab_size=16001)
    for op, loss_table in CROSS_ENTROPY_OPS.items():
        yield op, survey(op, loss_table, cross_entropy)


def _device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
