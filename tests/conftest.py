"""What every test obeys: those marked gpu need a CUDA device."""

import os

from antlm_fast.cores import choose_waiting

choose_waiting()  # before torch is there

import pytest  # noqa: E402
import torch  # noqa: E402

# kernel tests ask torch for deterministic algorithms, for which older CUDA builds want this
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
