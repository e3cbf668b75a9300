"""The verifier is verified: each kind of wrong result must fail, and a right one must not."""

from __future__ import annotations

import pytest
import torch

from antlm_fast.testing.budget import assert_within_budget

EXACT = torch.tensor([1.0, -4.0, 0.5], dtype=torch.float64)
# eager is off by 0.01; float32's rounding adds nothing visible, so the budget is 0.02
EAGER = (EXACT + torch.tensor([0.0, 0.01, 0.0])).float()


def _off_by(error: float) -> torch.Tensor:
    return (EXACT + torch.tensor([error, 0.0, 0.0])).float()


def test_budget_is_twice_what_eager_code_is_off() -> None:
    assert_within_budget("x", _off_by(0.0199), EXACT, EAGER)
    with pytest.raises(AssertionError, match=r"^x: error 2.01e-02 exceeds budget 2.00e-02$"):
        assert_within_budget("x", _off_by(0.0201), EXACT, EAGER)
    assert_within_budget("x", _off_by(0.0299), EXACT, EAGER, slack=3.0)


def test_scale_stands_in_where_the_exact_result_is_zero() -> None:
    zero, eps = torch.zeros(2, dtype=torch.float64), torch.finfo(torch.float32).eps
    actual = torch.full((2,), eps)
    assert_within_budget("x", actual, zero, zero.float(), scale=1.0)
    with pytest.raises(AssertionError, match=r"exceeds budget 0\.00e"):
        assert_within_budget("x", actual, zero, zero.float())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_fails(wrong: float) -> None:
    actual = EAGER.clone()
    actual[1] = wrong
    with pytest.raises(AssertionError, match="x: non-finite where the exact result is finite"):
        assert_within_budget("x", actual, EXACT, EAGER)


def test_infinities_must_stand_where_they_belong() -> None:
    exact = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert_within_budget("x", exact.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="x: differs where the exact result is not finite"):
        assert_within_budget("x", torch.tensor([1.0, torch.inf]), exact, exact.float())


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"^x: shapes differ: \(2,\), \(3,\), \(3,\)$"):
        assert_within_budget("x", EAGER[:2], EXACT, EAGER)
