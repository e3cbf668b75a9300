"""Kernels with a line changed: constexpr visibility to compare with, and planted faults to be caught."""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from antlm_fast.kernels.attention import triton_dkdv, triton_dq, triton_forward, triton_relative, triton_visibility

_ATTENTION = (triton_visibility, triton_relative, triton_forward, triton_dq, triton_dkdv)
_number = itertools.count()


def variant(*changes: tuple[str, str, str], modules: Sequence[ModuleType] = _ATTENTION) -> dict[str, ModuleType]:
    """The modules of the kernels, by file name without .py, built from changed copies of their sources.

    Args:
        changes: (file name without .py, text there, text in its place), every place of the text.
        modules: one op's, each after those it imports; default: attention's.

    Raises:
        ValueError: a text is not there, so nothing would be changed.
    """
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)  # as long as the process: Triton reads a kernel's source when it compiles
    package = f"antlm_fast_variant_{next(_number)}"
    op = modules[0].__name__.rpartition(".")[0]
    sources = {
        module.__name__.rpartition(".")[2]: Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules
    }
    for name, old, new in changes:
        if old not in sources[name]:
            raise ValueError(f"{name}.py must hold the text to change; got {old!r}")
        sources[name] = sources[name].replace(old, new)
    built = {}
    for name, source in sources.items():
        path = Path(folder.name) / f"{name}.py"
        path.write_text(source.replace(f"{op}.triton_", f"{package}.triton_"), encoding="utf-8")
        built[name] = _load(f"{package}.{name}", path)
    return built


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the next copies import this one by name
    spec.loader.exec_module(module)
    return module


_READ = "prefix_len = tl.load(prefix_len_ptr + seq * stride_prefix, mask=seq < num_seqs, other=0)"


def constexpr_visibility(causal: bool) -> dict[str, ModuleType]:
    """The kernels as they would be for one objective alone: the flag known to the compiler."""
    value = "0" if causal else "2**31 - 1"
    known = f"prefix_len: tl.constexpr = {value}"
    return variant(*[(name, _READ, known) for name in ("triton_forward", "triton_dq", "triton_dkdv")])
