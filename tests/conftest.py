"""What every test obeys: those marked gpu need a CUDA device."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from antlm_fast.cores import choose_waiting

choose_waiting()  # before torch is there

import pytest  # noqa: E402
import torch  # noqa: E402

# kernel tests ask torch for deterministic algorithms, for which older CUDA builds want this
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def default_dtype() -> Callable[[torch.dtype], AbstractContextManager[None]]:
    """with default_dtype(torch.float64): torch's default dtype is another."""
    return _default_dtype


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
