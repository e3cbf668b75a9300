"""Peak memory of head and loss, of disentangled attention, and of whole steps; each in a new process.

On a CPU the first two are what the work holds beyond its inputs and their gradients, by loss_memory.py and
attention_memory.py, which also make the larger tables of docs/kernels.md. Steps: the whole process, weights included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import attention_memory
import loss_memory
from harness import Bench, Row, told
from resident_memory import cannot_measure, in_fresh_process
from step_workloads import memory_of_steps


def memory_suite(bench: Bench) -> Iterator[list[Row]]:
    rows = []
    for number, vocabulary, share in bench.sizes.memory_loss:
        for provider in loss_memory.MEASURED:
            row = Row(
                suite="memory",
                workload="head and loss, bf16, beyond inputs and gradients",
                case=f"{number},{vocabulary},{share:.0%}",
                provider=provider,
                quantity="MiB",
            )
            rows.append(_measured(bench, row, loss_memory.measure, provider, number, vocabulary, share))
    yield rows
    rows = []
    for length in bench.sizes.memory_lengths:
        for provider in attention_memory.PROVIDERS:
            row = Row(
                suite="memory",
                workload="disentangled attention, one sequence, full, bf16, beyond inputs and gradients",
                case=f"T = {length}",
                provider=provider,
                quantity="MiB",
            )
            rows.append(_measured(bench, row, attention_memory.measure, provider, length, False))
    yield rows
    yield from memory_of_steps(bench)


def _measured(bench: Bench, row: Row, work: Callable[..., float], *arguments: Any) -> Row:
    if bench.dry:
        return replace(row, reason="would be measured in a new process")
    if bench.left() < 0:
        return replace(row, reason="the suite's time was used up")
    if bench.device != "cpu":
        return replace(row, reason="counts what a process holds on a CPU; the steps' rows count the device's memory")
    if reason := cannot_measure():
        return replace(row, reason=reason)
    try:
        return replace(row, samples=(max(in_fresh_process(work, *arguments), 0.0),))
    except Exception as error:  # what it cannot do here is what its row says
        return replace(row, reason=told(error))
