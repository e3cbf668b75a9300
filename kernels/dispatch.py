"""Which implementation serves a call: one ordered table per op, one sentence for every refusal.

An op's table maps a name to (unsupported_reason, forward); its order is the preference of `impl="auto"`. The sentence
that `unsupported_reason` returns is the error of an explicit request, the skip text of a test and the row that
`antlm-fast doctor` prints, so it is written once. There is no environment variable and no probing at import time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch

IMPLS = ("auto", "reference", "native", "triton", "torch")

_logger = logging.getLogger(__name__)

CallT = TypeVar("CallT", bound=Hashable)


class UnsupportedError(RuntimeError):
    """The implementation that was asked for by name cannot serve this call; the message says why."""


@dataclass(frozen=True)
class Implementation(Generic[CallT]):
    """One way to compute an op.

    Args:
        unsupported_reason: cheap and pure; a sentence if this implementation cannot serve the call, else None.
        forward: computes the op; every implementation of an op takes the same arguments.
    """

    unsupported_reason: Callable[[CallT], str | None]
    forward: Callable[..., Any]


@dataclass(frozen=True)
class ImplementationRow:
    """What `antlm-fast doctor` prints of one implementation: its name, why it cannot serve, whether auto takes it."""

    impl: str
    reason: str | None
    chosen: bool


Table = Mapping[str, Implementation[CallT]]


def choose(op: str, table: Table[CallT], impl: str, call: CallT) -> Implementation[CallT]:
    """The implementation that serves a call.

    Args:
        op: the op's public name, for messages.
        table: the op's implementations, in the order "auto" prefers them.
        impl: one of IMPLS. "auto" takes the first that serves and logs it once for each kind of call (level INFO); any
            other name is taken or refused, never replaced.
        call: what the choice may depend on: device type, dtype, head size and the like, never a tensor's values.

    Raises:
        ValueError: `impl` is not one of IMPLS.
        UnsupportedError: the named implementation does not exist in this version or cannot serve the call.
    """
    if impl == "auto":
        for name, entry in table.items():
            if entry.unsupported_reason(call) is None:
                if not torch.compiler.is_compiling():  # a log entry would break the graph
                    _log_choice(op, name, call)
                return entry
        reasons = "; ".join(f"{row.impl}: {row.reason}" for row in survey(op, table, call))
        raise UnsupportedError(f"{op}(impl='auto'): no implementation serves this call ({reasons})")
    reason = _reason(op, table, impl, call)
    if reason is not None:
        raise UnsupportedError(f"{op}(impl={impl!r}): {reason}")
    return table[impl]


def survey(op: str, table: Table[CallT], call: CallT) -> list[ImplementationRow]:
    """Every implementation known by name, those of the table first, in its order: can it serve, does auto take it."""
    names = [*table, *(name for name in IMPLS if name != "auto" and name not in table)]
    reasons = {name: _reason(op, table, name, call) for name in names}
    first = next((name for name in table if reasons[name] is None), None)
    return [ImplementationRow(name, reason, name == first) for name, reason in reasons.items()]


def _reason(op: str, table: Table[CallT], impl: str, call: CallT) -> str | None:
    if impl in table:
        return table[impl].unsupported_reason(call)
    if impl in IMPLS:
        return f"this version has no {impl} implementation of {op}"
    raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}; got {impl!r}")


@cache
def _log_choice(op: str, name: str, call: Hashable) -> None:
    # the cache is what makes it once: a repeated call does not come here
    _logger.info("%s: impl='auto' takes %r for %s", op, name, call)
