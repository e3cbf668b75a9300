"""The shared library of C++ kernels: found, checked and called through pointers.

Nothing of torch's ABI is used: a kernel is given addresses, sizes and the number of threads. The library is loaded when
it is first asked for, after torch, whose OpenMP runtime it uses.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from antlm_fast.kernels.native.build import FOLDER, LIBRARY, sources_hash

# the best first
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "portable")
_DTYPES = (torch.float32, torch.bfloat16)
_HOW = "python -m antlm_fast.kernels.native.build builds them"


class Library:
    """A loaded library.

    Args:
        path: of the file.
        instruction_set: one of INSTRUCTION_SETS that this machine has; None is the best. "amx" is AVX-512 with tiles.

    Raises:
        OSError: the file cannot be loaded, or is not made of the sources beside it.
    """

    def __init__(self, path: Path, instruction_set: str | None = None) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.antlm_sources.restype = ctypes.c_char_p
        made_of = self._library.antlm_sources().decode()
        if made_of != sources_hash():
            raise OSError(f"{path.name} was built from other sources; {_HOW}")
        self.available = tuple(name for name in INSTRUCTION_SETS if self._has(name))
        self.instruction_set = instruction_set or self.available[0]
        if self.instruction_set not in self.available:
            raise OSError(f"instruction_set must be one of {', '.join(self.available)}; got {self.instruction_set}")
        self._library.antlm_use_amx(self.instruction_set == "amx")
        self._suffix = "avx512" if self.instruction_set == "amx" else self.instruction_set
        self._functions: dict[str, Any] = {}

    @property
    def description(self) -> str:
        """For `antlm-fast doctor`."""
        return f"use {self.instruction_set}; this machine has {', '.join(self.available)}"

    def call(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        """Run a kernel: tensors are passed as addresses (None: null), whole numbers as int64, others as double.

        Every call of a kernel has the same kinds of arguments in the same places.
        """
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._function(name, arguments)
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        function(*values, torch.get_num_threads())

    def _function(self, name: str, arguments: tuple[torch.Tensor | float | None, ...]) -> Any:
        function = getattr(self._library, f"antlm_{name}_{self._suffix}")
        function.argtypes = [*(_kind(each) for each in arguments), ctypes.c_int64]
        function.restype = None
        return function

    def _has(self, name: str) -> bool:
        if name == "portable":
            return True
        suffix = "avx512" if name == "amx" else name
        compiled = hasattr(self._library, f"antlm_attention_forward_{suffix}")
        offered = getattr(self._library, f"antlm_has_{suffix}")()
        return bool(compiled and offered and (name != "amx" or self._library.antlm_has_amx()))


def _kind(value: torch.Tensor | float | None) -> type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double]:
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(value, int) else ctypes.c_double


@cache
def _loaded() -> Library | str:
    """The library, or why there is none."""
    path = FOLDER / LIBRARY
    if not path.exists():
        return f"the C++ kernels are not built ({_HOW})"
    try:
        return Library(path)
    except OSError as error:
        return f"the C++ kernels cannot be used: {error}"


def library() -> Library:
    """The library; to be asked for after `unavailable_reason` gave None."""
    found = _loaded()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _problem() -> str | None:
    found = _loaded()
    return found if isinstance(found, str) else None


# torch.compile calls it and does not look inside: torch.compiler.assume_constant_result without its import of dynamo,
# which takes two seconds
_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot serve tensors of a device and dtype, or None."""
    if device_type != "cpu":
        return f"the C++ kernels run on the CPU, not on {device_type}"
    if dtype not in _DTYPES:
        return f"the C++ kernels compute float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return _problem()
