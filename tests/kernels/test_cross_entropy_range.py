"""The plain-torch loss where numbers or memory could run out: loss scales, autocast, chunks, infinite logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from antlm_fast.kernels.linear_cross_entropy import labelled, linear_cross_entropy, torch_impl

REDUCTIONS = ("none", "sum", "mean")
IGNORED = -100


@pytest.mark.parametrize("upstream", [65536.0, 1e-5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("workspace_mib", [1, 64])
def test_float16_survives_a_loss_scale(reduction: str, upstream: float, workspace_mib: int) -> None:
    """float32 leaves under float16 autocast, one chunk and several (20,000 words: 26 rows a MiB)."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 8), torch.randn(20000, 8), torch.randint(20000, (64,))
    results = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "torch")):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.float16, enabled=impl == "torch"):
            loss = linear_cross_entropy(*leaves, targets, reduction=reduction, impl=impl, workspace_mib=workspace_mib)
        results.append(torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream)))
    for wanted, actual in zip(*results, strict=True):
        assert (actual - wanted).abs().max() < 5e-3 * wanted.abs().max()


@pytest.mark.parametrize("workspace_mib", [1, 64])
def test_autocast_around_the_backward_changes_nothing(workspace_mib: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(64, 8).requires_grad_(), torch.randn(20000, 8).requires_grad_()]
    loss = linear_cross_entropy(*leaves, torch.randint(20000, (64,)), impl="torch", workspace_mib=workspace_mib)
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_chunk_of_logits_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    living: list[weakref.ref[torch.Tensor]] = []
    most = [0]
    real = torch_impl._Run._pass

    def counted(run: Any, *args: Any, **options: Any) -> torch.Tensor:
        logits = real(run, *args, **options)
        living.append(weakref.ref(logits))
        most[0] = max(most[0], sum(one() is not None for one in living))
        return logits

    monkeypatch.setattr(torch_impl._Run, "_pass", counted)
    leaves = [torch.randn(64, 8).requires_grad_(), torch.randn(20000, 8).requires_grad_()]
    targets = torch.randint(20000, (64,))
    loss = linear_cross_entropy(*leaves, targets, reduction=reduction, impl="torch", workspace_mib=1)
    torch.autograd.grad(loss.sum(), leaves)
    assert len(living) >= 5
    assert most[0] == 1


def test_an_overflowing_row_without_a_label_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked on a device, not gathered: its logits are infinite, its hidden is not."""
    monkeypatch.setattr(labelled, "_host_may_read", lambda x: False)
    hidden = torch.randn(3, 4)
    hidden[1] = 1e38
    hidden.requires_grad_()
    weight = torch.randn(5, 4).mul(100).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, IGNORED, 2]), impl="torch")
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x).all() for x in gradients)
    assert not gradients[0][1].any()
