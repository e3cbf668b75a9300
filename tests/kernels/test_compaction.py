"""Labelled rows packed together before the head, and what the loss's pass tells of each row."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from antlm_fast.kernels.linear_cross_entropy import compact_labelled, labelled, linear_cross_entropy
from antlm_fast.kernels.native.library import unavailable_reason

IGNORED = -100
TARGETS = torch.tensor([IGNORED, 3, IGNORED, 0, 2])
REASON = unavailable_reason("cpu", torch.float32)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))


@pytest.fixture(params=["host", "device"])
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on the CPU, and as where nothing may be read from the device."""
    if request.param == "device":
        monkeypatch.setattr(labelled, "_host_may_read", lambda x: False)
    return request.param == "device"


def test_exactly_the_labelled_rows(on_device: bool) -> None:
    rows = compact_labelled(TARGETS)
    assert rows.rows is not None
    assert rows.rows.tolist() == [1, 3, 4]
    assert rows.targets.tolist() == [3, 0, 2]
    assert rows.count == 3
    assert rows.gather(torch.arange(10.0).view(5, 2)).tolist() == [[2.0, 3.0], [6.0, 7.0], [8.0, 9.0]]
    other = compact_labelled(torch.tensor([7, 0, 7]), ignore_index=0)
    assert other.targets.tolist() == [7, 7]


def test_room_that_is_left_over_holds_no_label(on_device: bool) -> None:
    rows = compact_labelled(TARGETS, capacity=5)
    assert rows.rows is not None
    assert rows.rows.tolist() == [1, 3, 4, 0, 0]
    assert rows.targets.tolist() == [3, 0, 2, IGNORED, IGNORED]
    assert int(rows.count) == 3
    assert rows.counts is not None
    assert rows.counts.tolist() == [True, True, True, False, False]


def test_nothing_to_compact(on_device: bool) -> None:
    for capacity in (None, 4):
        rows = compact_labelled(torch.empty(0, dtype=torch.int64), capacity=capacity)
        assert rows.targets.numel() == 0
        assert rows.gather(torch.empty(0, 3)).shape == (0, 3)
    rows = compact_labelled(torch.full((3,), IGNORED), capacity=2)
    assert rows.targets.tolist() == [IGNORED, IGNORED]
    assert int(rows.count) == 0


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("capacity", [None, 5, 9])
def test_a_transform_before_the_loss_sees_only_labelled_rows(on_device: bool, impl: str, capacity: int | None) -> None:
    """Loss and gradients are those of all rows, with and without room to spare."""
    torch.manual_seed(0)
    hidden, transform, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (4, 4), (6, 4)))
    results = []
    for compacted in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, transform, weight)]
        rows, targets = leaves[0], TARGETS
        if compacted:
            packed = compact_labelled(TARGETS, capacity=capacity)
            rows, targets = packed.gather(rows), packed.targets
            assert rows.shape[0] == (3 if capacity is None else capacity)
        loss = linear_cross_entropy(torch.tanh(rows @ leaves[1]), leaves[2], targets, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_more_labels_than_room_is_an_error_never_a_shorter_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^capacity must be at least the 3 labelled rows; got 2$"):
        compact_labelled(TARGETS, capacity=2)
    monkeypatch.setattr(labelled, "_host_may_read", lambda x: False)
    rows = compact_labelled(TARGETS, capacity=2)  # nothing is read from the device, so the loss tells
    assert rows.overflow is not None
    assert bool(rows.overflow)
    loss = linear_cross_entropy(rows.gather(torch.ones(5, 4)), torch.ones(6, 4), rows.targets)
    assert torch.isnan(loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": TARGETS.int()}, TypeError, "targets must be int64; got torch.int32"),
        ({"targets": TARGETS[None]}, ValueError, "targets must have shape (rows,); got (1, 5)"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, or None; got 0"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        compact_labelled(**{"targets": TARGETS, **change})


@pytest.mark.parametrize("impl", ["reference", "torch", NATIVE])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_metrics_are_those_of_all_logits(on_device: bool, impl: str, reduction: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    targets = torch.randint(9, (40,)).where(torch.rand(40) < 0.7, IGNORED)
    loss, metrics = linear_cross_entropy(hidden, weight, targets, reduction=reduction, return_metrics=True, impl=impl)
    assert loss.requires_grad
    logits = (hidden @ weight.t()).detach()
    counts = targets != IGNORED
    assert torch.equal(metrics.labelled, counts)
    assert torch.equal(metrics.correct, (logits.argmax(1) == targets) & counts)
    assert 0 < int(metrics.correct.sum()) < int(counts.sum())
    torch.testing.assert_close(metrics.lse, logits.logsumexp(1).where(counts, 0.0))
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(metrics.losses, losses)
    assert not any(x.requires_grad for x in (metrics.losses, metrics.lse, metrics.correct))
    plain = linear_cross_entropy(hidden, weight, targets, reduction=reduction, impl=impl)
    assert torch.equal(plain, loss)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torch.autograd.grad(loss.sum(), (hidden, weight)),
            torch.autograd.grad(plain.sum(), (hidden, weight)),
            strict=True,
        )
    )


@pytest.mark.parametrize("impl", ["reference", "torch", NATIVE])
def test_sums_by_group_of_a_mixed_batch(on_device: bool, impl: str) -> None:
    """Two objectives in one pass: the sums are those of a pass for each; a third group is empty."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 6), torch.randn(9, 6)
    targets = torch.randint(9, (30,)).where(torch.rand(30) < 0.7, IGNORED)
    groups = (torch.arange(30) % 3 == 0).long().where(targets != IGNORED, 77)
    loss, metrics = linear_cross_entropy(hidden, weight, targets, reduction="sum", return_metrics=True, impl=impl)
    sums = metrics.by_group(groups, 3)
    for group in (0, 1):
        alone = targets.where(groups == group, IGNORED)
        wanted, apart = linear_cross_entropy(hidden, weight, alone, reduction="sum", return_metrics=True, impl=impl)
        torch.testing.assert_close(sums.loss[group], wanted)
        assert int(sums.correct[group]) == int(apart.correct.sum())
        assert int(sums.count[group]) == int((alone != IGNORED).sum())
    assert (float(sums.loss[2]), int(sums.correct[2]), int(sums.count[2])) == (0.0, 0, 0)
    torch.testing.assert_close(sums.loss.sum(), loss)
    with pytest.raises(ValueError, match=re.escape("groups must have shape (30,); got (29,)")):
        metrics.by_group(groups[1:], 3)


@pytest.mark.parametrize("impl", ["reference", "torch", NATIVE])
def test_ties_count_as_right(impl: str) -> None:
    targets = torch.tensor([0, 3])
    _, metrics = linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), targets, return_metrics=True, impl=impl)
    assert metrics.correct.tolist() == [True, True]


def test_targets_out_of_range_are_found_on_a_device_where_checks_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(labelled, "_host_may_read", lambda x: False)
    targets = torch.tensor([0, IGNORED, 5])
    message = re.escape("targets must be in [0, 5) or ignore_index -100; got 5")
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), targets)
