"""Kernel tests run on poisoned memory, and know the ways an attention call can go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from antlm_fast.kernels.attention import torch_impl


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so what a kernel forgets to write is always seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "torch", "torch, all fused", "torch, device plan"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation of attention. The plain-torch one has ways that small CPU tensors do not take: force each."""
    way: str = request.param
    if way == "torch, all fused":
        monkeypatch.setattr(torch_impl, "_MATERIALISED_KIB", 0)
    if way == "torch, device plan":
        monkeypatch.setattr(torch_impl, "_host_may_read", lambda x: False)
    return way.split(",")[0]
