"""An error budget that comes from the data: no kernel may be much worse than plain code in the same dtype."""

from __future__ import annotations

import torch


def assert_within_budget(
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    slack: float = 2.0,
    *,
    scale: float = 0.0,
) -> None:
    """Fail unless `actual` is about as near to the exact result as plain code in its dtype is.

    max|actual - exact| <= slack * (max|eager - exact| + eps(actual's dtype) * max(max|exact|, scale))

    There is no tolerance to pick: the difference between plain code and float64 says what the dtype can do on these
    very inputs. (Of float64 itself it says nothing: compare directly.) Infinities, such as the -inf of a log-sum-exp
    over nothing, must stand where the exact result has them.

    Args:
        name: what is compared; begins the message.
        actual: the result under test.
        exact: the reference, computed in float64.
        eager: the reference, computed in the dtype of the inputs of `actual`.
        slack: 2 for results, 3 for gradients, which pass through more roundings.
        scale: the size of the terms that cancel in the result, where the exact result is 0.

    Raises:
        AssertionError: the shapes differ, `actual` has a NaN or a stray infinity, or the error is past the budget.
    """
    error, budget = error_and_budget(name, actual, exact, eager, slack, scale=scale)
    if error > budget:
        raise AssertionError(f"{name}: error {error:.2e} exceeds budget {budget:.2e}")


def error_and_budget(
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    slack: float = 2.0,
    *,
    scale: float = 0.0,
) -> tuple[float, float]:
    """What `assert_within_budget` compares: the largest error, and how large it may be. Arguments as there.

    Returns:
        (error, budget); (0, 0) where no exact result is finite.

    Raises:
        AssertionError: the shapes differ, `actual` has a NaN or a stray infinity.
    """
    if not actual.shape == exact.shape == eager.shape:
        raise AssertionError(
            f"{name}: shapes differ: {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(eager.shape)}"
        )
    finite = torch.isfinite(exact)
    if not torch.equal(actual[~finite].double(), exact[~finite].double()):
        raise AssertionError(f"{name}: differs where the exact result is not finite")
    if not torch.isfinite(actual[finite]).all():
        raise AssertionError(f"{name}: non-finite where the exact result is finite")
    if not finite.any():
        return 0.0, 0.0
    wanted = exact[finite].double()
    rounding = torch.finfo(actual.dtype).eps * max(wanted.abs().max().item(), scale)
    budget = slack * ((eager[finite].double() - wanted).abs().max().item() + rounding)
    return (actual[finite].double() - wanted).abs().max().item(), budget
