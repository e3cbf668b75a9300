"""Memory that is used again from call to call: never while anything still holds it, and never given away."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.kernels.native.workspace import POOL, Pool

REASON = unavailable_reason("cpu", torch.float32)
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def _large(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """So many logits that their memory is the pool's."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((80, 8), (5000, 8))]
    return leaves, torch.randint(5000, (80,), generator=generator)


def _loss_of(leaves: list[torch.Tensor], targets: torch.Tensor, **options: Any) -> torch.Tensor:
    return linear_cross_entropy(*leaves, targets, impl="native", **options)


@pytest.fixture
def empty_pool() -> Iterator[Pool]:
    gc.collect()
    POOL.clear()
    yield POOL
    POOL.clear()


@needs_library
def test_losses_that_wait_for_their_backward_share_no_memory(empty_pool: Pool) -> None:
    wanted = []
    for seed in range(3):
        leaves, targets = _large(seed)
        wanted.append(torch.autograd.grad(_loss_of(leaves, targets), leaves))
    waiting = []
    for seed in range(3):
        leaves, targets = _large(seed)
        waiting.append((_loss_of(leaves, targets), leaves))
    for place in (1, 0, 2):
        loss, leaves = waiting[place]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        _loss_of(*_large(9))
        again = torch.autograd.grad(loss, leaves)
        for a, b, c in zip(first, again, wanted[place], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@needs_library
def test_a_hook_that_keeps_views_of_what_was_saved_keeps_its_memory(empty_pool: Pool) -> None:
    """What is packed is another tensor on the same storage; the saved one itself is gone."""
    leaves, targets = _large(0)
    wanted = torch.autograd.grad(_loss_of(leaves, targets), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach()[...], lambda x: x):
        loss = _loss_of(leaves, targets)
    for seed in range(3):
        _loss_of(*_large(seed + 1)).backward()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), wanted, strict=True))


@needs_library
@pytest.mark.parametrize("options", [{}, {"workspace_mib": 2}, {"reduction": "none", "workspace_mib": 2}], ids=str)
def test_memory_is_used_again_and_never_given_away(empty_pool: Pool, options: dict[str, Any]) -> None:
    leaves, targets = _large(0)
    leaves[0] = torch.cat([leaves[0].detach()] * 2).requires_grad_()  # 3 MiB of logits
    targets, free = torch.cat([targets] * 2), []
    for _ in range(3):
        gradients = torch.autograd.grad(_loss_of(leaves, targets, **options).sum(), leaves)
        spans = [(buffer.ctypes.data, buffer.ctypes.data + len(buffer)) for buffer in empty_pool._free]
        assert spans
        for gradient in gradients:
            assert not any(start <= gradient.data_ptr() < end for start, end in spans)
        free.append(sorted(spans))
    assert free[0] == free[1] == free[2]


def test_the_pool_lends_what_fits_and_grows() -> None:
    pool = Pool()
    first = pool.take((2**20,), dtype=torch.float32)
    address = first.data_ptr()
    assert address % 64 == 0
    assert first.isnan().all()  # deterministic algorithms ask for it
    second = pool.take((3, 2**20), dtype=torch.bfloat16)
    assert second.shape == (3, 2**20)
    assert second.is_contiguous()
    view = first[5:7]
    del first
    other = pool.take((2**20,), dtype=torch.float32).data_ptr()
    assert other != address
    del view
    taken = pool.take((2**19,), dtype=torch.float32)
    assert taken.data_ptr() in (address, other)
    del taken, second
    assert len(pool._free) == 3
    grown = pool.take((2**23,), dtype=torch.float32)
    assert len(pool._free) == 2
    del grown
    pool.clear()
    assert not pool._free
    assert pool.take((5, 0), dtype=torch.float32).shape == (5, 0)
