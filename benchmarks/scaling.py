"""How cost grows: with the length, the vocabulary, the tokens of a batch, the depth of the model, and threads.

The last row of each way holds the exponent of a power law fitted to its medians: 1 is linear in what the workload's
title names first.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from harness import Bench, Call, Provider, Row, with_extras
from op_workloads import (
    BUCKETS,
    Check,
    cross_entropy_inputs,
    disentangled_inputs,
    drawn_targets,
)
from peers import operations
from roofline import attention_work, cross_entropy_work, disentangled_work, step_work
from sizes import Scene
from step_runner import StepRunner, drawn_batch
from step_workloads import VARIANTS, Stage, start, title
from torch import Tensor

from antlm_fast.kernels.attention import attention
from antlm_fast.kernels.disentangled_attention import disentangled_attention
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy

HEADS, HEAD_DIM, HIDDEN = 4, 64, 256
# beyond it plain code takes longer than it tells
_EAGER_LENGTH = 1024


def scaling_suite(bench: Bench) -> Iterator[list[Row]]:
    for suite in (lengths, vocabularies, tokens_of_a_batch, depths, threads):
        rows = list(suite(bench))
        yield with_exponents(rows)


def lengths(bench: Bench) -> Iterator[Row]:
    """The same number of tokens, cut into sequences of growing length; causal, bfloat16."""
    total = bench.sizes.lengths[-1]
    for seqlen in bench.sizes.lengths:
        shape = (max(total // seqlen, 1), HEADS, seqlen, HEAD_DIM)
        inputs = disentangled_inputs(*shape, torch.bfloat16, bench.device)
        *plain, _, _, grad_out = inputs
        heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad) for x in plain]
        gathered = functools.partial(operations.DISENTANGLED["gathered into the scores"], causal=True)
        ways: dict[str, tuple[Callable[..., Tensor], list[Tensor], Any]] = {
            "attention: antlm_fast": (functools.partial(attention, causal=True), [*plain, grad_out], attention_work),
            "attention: SDPA": (
                functools.partial(operations.sdpa, causal=True),
                [*heads_first, grad_out.detach().transpose(1, 2)],
                attention_work,
            ),
            "disentangled: antlm_fast": (
                functools.partial(disentangled_attention, causal=True),
                inputs,
                _relative_work,
            ),
        }
        if seqlen <= _EAGER_LENGTH:
            ways["disentangled: gathered"] = (gathered, inputs, _relative_work)
        providers = []
        for name, (function, arguments, work_of) in ways.items():
            work = work_of(*shape, "bf16", causal=True)
            providers.append(
                Provider(
                    case=f"T = {seqlen}",
                    name=name,
                    prepare=functools.partial(_prepared, function, arguments),
                    amount=shape[0] * seqlen,
                    unit="tokens/s",
                    floor=bench.floor(work, "bf16"),
                )
            )
        named = f"length at {total} tokens, {HEADS} heads of {HEAD_DIM}, causal, bf16"
        yield from bench.measure("scaling", named, providers, rounds=bench.sizes.rounds)


def _relative_work(batch: int, heads: int, seqlen: int, head_dim: int, dtype: str, *, causal: bool) -> Any:
    return disentangled_work(batch, heads, seqlen, head_dim, 2 * BUCKETS - 1, dtype, causal=causal)


def _prepared(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """Not checked: the suites of the operations do that, at lengths where the reference in float64 is quick."""
    *arguments, grad_out = inputs
    arguments = [x for x in arguments if x.requires_grad]
    return lambda: torch.autograd.grad(function(*arguments), arguments, grad_out)


def vocabularies(bench: Bench) -> Iterator[Row]:
    """Head and loss over 512 rows, 15 % labelled, bfloat16."""
    rows = 512
    for vocab_size in bench.sizes.vocabularies:
        generator = torch.Generator().manual_seed(0)
        inputs = cross_entropy_inputs(rows, HIDDEN, vocab_size, torch.bfloat16, generator)
        targets = drawn_targets(rows, vocab_size, 0.15, generator)
        check = Check(functools.partial(linear_cross_entropy, targets=targets, impl="reference"), inputs)
        on_device = [x.detach().to(bench.device).requires_grad_(x.requires_grad) for x in inputs]
        moved = targets.to(bench.device)
        work = cross_entropy_work(int((targets != -100).sum()), HIDDEN, vocab_size, "bf16")
        ways = {
            "antlm_fast": linear_cross_entropy,
            **{name: operations.CROSS_ENTROPY[name] for name in ("logits of all rows", "logits of labelled rows")},
        }
        providers = [
            Provider(
                case=f"V = {vocab_size}",
                name=name,
                prepare=functools.partial(check.checked, functools.partial(way, targets=moved), on_device),
                amount=rows,
                unit="rows/s",
                floor=bench.floor(work, "bf16"),
            )
            for name, way in ways.items()
        ]
        named = f"vocabulary, {rows} rows of {HIDDEN}, 15 % labelled, bf16"
        yield from bench.measure("scaling", named, providers, rounds=bench.sizes.rounds)


def tokens_of_a_batch(bench: Bench) -> Iterator[Row]:
    """Steps of a model of two layers, by the number of sequences."""
    config = replace(bench.sizes.models[bench.sizes.scaling_model], num_hidden_layers=2)
    seqlen = bench.sizes.scenes[0].batch[1]
    runners = functools.cache(
        lambda source, form: StepRunner(asdict(config), source, form, "bf16", device=bench.device)
    )
    for sequences in bench.sizes.batches:
        providers = []
        for objective in ("CLM", "MLM"):
            for name, source, form in (("antlm_fast", "ours", "auto"), ("HF Llama eager", "llama", "eager")):
                prepare = functools.partial(_step, runners, source, form, objective, sequences, seqlen)
                case = f"B = {sequences}"
                providers.append(
                    _step_provider(bench, config, case, f"{objective}: {name}", objective, (sequences, seqlen), prepare)
                )
        named = f"sequences of {seqlen}, two layers of {bench.sizes.scaling_model}, bf16"
        yield from bench.measure("scaling", named, providers, rounds=min(bench.sizes.rounds, 5))


def depths(bench: Bench) -> Iterator[Row]:
    """Steps by the number of layers: the rest of the model, its head and its tables stay."""
    base = bench.sizes.models[bench.sizes.scaling_model]
    batch = (bench.sizes.scenes[0].batch[0] // 2, bench.sizes.scenes[0].batch[1])
    for depth in bench.sizes.depths:
        config = replace(base, num_hidden_layers=depth)
        runner = functools.cache(
            lambda source, form, config=config: StepRunner(asdict(config), source, form, "bf16", device=bench.device)
        )
        providers = [
            _step_provider(
                bench,
                config,
                f"L = {depth}",
                f"{objective}: antlm_fast",
                objective,
                batch,
                functools.partial(_step, runner, "ours", "auto", objective, *batch),
            )
            for objective in ("CLM", "MLM")
        ]
        named = f"layers, {bench.sizes.scaling_model}'s width, {batch[0]} x {batch[1]} tokens, bf16"
        yield from bench.measure("scaling", named, providers, rounds=3)


def _step(runners: Callable[..., StepRunner], source: str, form: str, *key: Any) -> Call:
    runner = runners(source, form)
    return lambda: runner.step(*key)


def _step_provider(
    bench: Bench, config: Any, case: str, name: str, objective: str, batch: tuple[int, int], prepare: Callable[[], Call]
) -> Provider:
    labelled = sum(drawn_batch(config.vocab_size, objective, *batch).num_labelled.values())
    work = step_work(config, *batch, labelled, "bf16", causal=objective == "CLM")
    return Provider(
        case=case,
        name=name,
        prepare=prepare,
        amount=batch[0] * batch[1],
        unit="tokens/s",
        floor=bench.floor(work, "bf16"),
    )


def threads(bench: Bench) -> Iterator[Row]:
    """An MLM step by the number of threads, each in a process of its own. No floor: limits are of all threads."""
    scene = bench.sizes.scenes[0]
    counts = sorted({1, *(2**n for n in range(1, 8) if 2**n <= (os.cpu_count() or 1)), os.cpu_count() or 1})
    scene = replace(scene, objectives=("MLM",), variants=("antlm_fast",))
    with Stage(bench, scene) as stage:
        providers = [
            Provider(
                case=f"threads = {count}",
                name="MLM: antlm_fast",
                prepare=functools.partial(_threaded, bench, scene, stage, count),
                amount=scene.batch[0] * scene.batch[1],
                unit="tokens/s",
            )
            for count in counts
        ]
        yield from bench.measure("scaling", f"threads, {title(scene)}", providers, rounds=3)


def _threaded(bench: Bench, scene: Scene, stage: Stage, count: int) -> Call:
    worker = start(bench, scene, replace(VARIANTS["antlm_fast"], threads=count))
    stage.workers[f"{count} threads"] = worker  # closed with the stage
    return functools.partial(worker.call, "step", **stage.key("MLM"))


def with_exponents(rows: Sequence[Row]) -> list[Row]:
    """The last measured row of each way, with the exponent of its cost."""
    done = list(rows)
    for name in dict.fromkeys(row.provider for row in rows):
        points = [
            (place, float(row.case.rpartition("=")[2]), row.median)
            for place, row in enumerate(rows)
            if row.provider == name and row.median
        ]
        if len(points) > 1:
            exponent = power_law([size for _, size, _ in points], [median for *_, median in points])
            done[points[-1][0]] = with_extras(done[points[-1][0]], exponent=exponent)
    return done


def power_law(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """b of seconds = a * size**b, by least squares over logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - mean_x) ** 2 for a in x)
