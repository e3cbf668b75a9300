"""Our own operations and steps under pytest-benchmark, to watch one machine over time. Not part of `make test`:

    python -m pytest benchmarks/test_regression.py --benchmark-autosave              keep this run (.benchmarks/)
    python -m pytest benchmarks/test_regression.py --benchmark-compare --benchmark-compare-fail=median:10%

Peers and limits are run.py's business; here nothing is compared but with earlier runs of the same case.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("pytest_benchmark")

from op_workloads import Check, cross_entropy_inputs, disentangled_inputs, drawn_targets
from sizes import SIZES
from step_runner import StepRunner

from antlm_fast.kernels.attention import attention
from antlm_fast.kernels.disentangled_attention import disentangled_attention
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy

QUICK = SIZES["quick"]
ROUNDS = {"rounds": 15, "warmup_rounds": 2}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", QUICK.attention, ids=str)
def test_attention(benchmark: Any, shape: tuple[int, int, int, int], causal: bool) -> None:
    batch, heads, seqlen, head_dim = shape
    inputs = [torch.randn(batch, seqlen, heads, head_dim).bfloat16().requires_grad_(n < 3) for n in range(4)]
    check = Check(functools.partial(attention, causal=causal, impl="reference"), inputs)
    benchmark.pedantic(check.checked(functools.partial(attention, causal=causal), inputs), **ROUNDS)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", QUICK.disentangled, ids=str)
def test_disentangled_attention(benchmark: Any, shape: tuple[int, int, int, int], causal: bool) -> None:
    inputs = disentangled_inputs(*shape, torch.bfloat16, "cpu")
    check = Check(functools.partial(disentangled_attention, causal=causal, impl="reference"), inputs)
    benchmark.pedantic(check.checked(functools.partial(disentangled_attention, causal=causal), inputs), **ROUNDS)


@pytest.mark.parametrize("share", [1.0, 0.15], ids=["all", "15%"])
def test_linear_cross_entropy(benchmark: Any, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, hidden_size, vocab_size = QUICK.cross_entropy
    inputs = cross_entropy_inputs(rows, hidden_size, vocab_size, torch.bfloat16, generator)
    targets = drawn_targets(rows, vocab_size, share, generator)
    check = Check(functools.partial(linear_cross_entropy, targets=targets, impl="reference"), inputs)
    benchmark.pedantic(check.checked(functools.partial(linear_cross_entropy, targets=targets), inputs), **ROUNDS)


@pytest.mark.parametrize("objective", ["CLM", "MLM"])
@pytest.mark.parametrize("model", QUICK.models)
def test_training_step(benchmark: Any, model: str, objective: str) -> None:
    runner = StepRunner(asdict(QUICK.models[model]), "ours", "auto", "bf16")
    benchmark.pedantic(functools.partial(runner.step, objective, 8, 128), **ROUNDS)
