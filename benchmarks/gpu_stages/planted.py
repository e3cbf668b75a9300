"""Failures on purpose, to see that they stay in their stage and that no wrong number gets a speed."""

from __future__ import annotations

import os
from typing import Any

# raise, hang: after the stage's first rows; crash: at once; nan: in every result of attention
FAULTS = ("raise", "crash", "hang", "nan")


def plant(fault: str | None) -> None:
    """What takes effect when a process begins."""
    if fault == "crash":
        os.abort()
    if fault == "nan":
        from antlm_fast.kernels.attention import triton_impl

        right = triton_impl.attend

        def wrong(*args: Any, **options: Any) -> Any:
            out, lse = right(*args, **options)
            return out * float("nan"), lse

        triton_impl.attend = wrong
