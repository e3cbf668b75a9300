"""How the report writes numbers; a value that is not there is a dash."""

from __future__ import annotations

import math

MISSING = "–"


def count(value: float | None) -> str:
    """1234 -> 1,234; 58_340_000 -> 58.3 M."""
    if value is None:
        return MISSING
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.1f} {unit}"
    return f"{value:,.0f}"


def loss(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def perplexity(value: float | None) -> str:
    """Perplexity of a loss in nats."""
    if value is None or math.isnan(value):
        return MISSING
    if value > 20.0:
        return "above 10⁸"
    return f"{math.exp(value):,.1f}"


def percent(share: float | None) -> str:
    """0.812 -> 81.2 %."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def rate(value: float | None, digits: int = 3) -> str:
    """A learning rate, short: 0.0003 -> 3e-4."""
    if value is None:
        return MISSING
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
