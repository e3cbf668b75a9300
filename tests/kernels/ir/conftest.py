"""Kernels as the compiler leaves them, run on the CPU: the final TTGIR of a GPU that is not there, executed by ttsem.

TRITON_INTERPRET=1 runs the source. This runs what Triton's passes made of it for one architecture: pipelined loops,
asynchronous copies, shared and tensor memory, wgmma or tcgen05. Reads and writes outside a tensor fail at the kernel's
own line, and so do programs of one launch that touch the same element. Below TTGIR (LLVM, ptxas) nothing is run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from antlm_fast.kernels.triton_support.interpreter import interpreting


@pytest.fixture
def executing_ttgir() -> Callable[[str], AbstractContextManager[list[str]]]:
    """`with executing_ttgir("sm_90") as modules:` runs every launch of the block as that architecture's TTGIR.

    The block's tensors lie on the CPU and say they lie on a CUDA device, so ops dispatch as they do there; `modules`
    collects the TTGIR of each launch. A launch raises ttsem.sanitize.KernelFault for an access outside a tensor's
    storage, a race between programs or an undefined result, ttsem.sanitize.Unjudged for an operation ttsem lacks.
    """
    pytest.importorskip("triton")
    pytest.importorskip("ttsem", reason="needs ttsem (pip install --no-deps --ignore-requires-python ttsem==0.1.0)")
    if interpreting():
        pytest.skip("kernels are not compiled under TRITON_INTERPRET=1")
    return _executing_ttgir


@contextmanager
def _executing_ttgir(arch: str) -> Iterator[list[str]]:
    from ttsem import harness, sanitize

    from antlm_fast.kernels.triton_support.offline import standing_in, target

    gpu = target(arch)
    modules: list[str] = []

    def final_ttgir(record: Any, *_: Any) -> str:
        _set_apart(record)
        with _generic_form():
            modules.append(harness._stage_text(record, "ttgir", gpu))
        return modules[-1]

    # ttsem leaves its pretended device behind in torch.cuda
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(vars(torch.cuda)), standing_in(gpu):
        patch.setattr(harness, "ir_for_launch", final_ttgir)  # ttsem's own session stops at TTIR
        with sanitize.session(gpu.arch) as session:
            yield modules
    assert session.races_unchecked == 0, "a launch makes too many accesses to be searched for races: use fewer rows"


def _set_apart(record: Any) -> None:
    """Give each tensor of a launch addresses far from all others', so no overrun of one can land in another."""
    homes = {base: (i << 40) + base % 4096 for i, base in enumerate(sorted(set(record.bases.values())), start=1)}
    record.ptrs = {name: homes[record.bases[name]] + ptr - record.bases[name] for name, ptr in record.ptrs.items()}
    record.bases = {name: homes[base] for name, base in record.bases.items()}


@contextmanager
def _generic_form() -> Iterator[None]:
    """Let MLIR print the generic form, which is what ttsem reads; the switch is the whole process's, so put it back."""
    from triton._C import libtriton
    from ttsem import mlir

    mlir.enable_generic_printing()  # registers the flags; sets them only the first time
    library = ctypes.CDLL(libtriton.__file__)

    def switch(value: bytes) -> None:
        library._ZN4llvm2cl25ResetAllOptionOccurrencesEv()  # a flag may come once
        flags = [b"", b"--mlir-print-op-generic=" + value, b"--mlir-print-local-scope=" + value]
        library.LLVMParseCommandLineOptions(len(flags), (ctypes.c_char_p * len(flags))(*flags), b"")

    switch(b"true")
    try:
        yield
    finally:
        switch(b"false")
