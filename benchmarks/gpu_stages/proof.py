"""Stage b, the smallest proof: every kernel once, forward and backward, against the reference in float64.

A case is packed sequences of awkward lengths, causal, full and with a prefix side by side, and rows past the last one.
Memory that a kernel should write is NaN before. A figure is the largest error over what the budget allows
(antlm_fast.testing): beyond 1 is wrong. The cases run in a process of their own; after a crash, a hang or an error the
next ones get a new one, since a fault on a GPU ends everything in its process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import TIME_USED_UP, Row, told
from torch import Tensor
from workers import Worker

from antlm_fast.kernels.attention import attention_varlen
from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.testing.budget import error_and_budget
from gpu_stages.ahead import compile_with_launcher, compiled_on_all_cores
from gpu_stages.plan import GPU_SIZES, GpuBench
from gpu_stages.planted import plant
from gpu_stages.timing import results_of

BUCKETS = 32
_SLACK_ROWS = 3
_CASE_SECONDS = 60.0  # at most; compilation is most of it


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of one call. Its kernels: those that write the outputs named in KERNELS."""

    op: str  # "attention", "disentangled", "loss"
    head_dim: int = 64
    group: int = 1
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    options: bool = False  # of the loss: bias, softcap, smoothing, z-loss


CASES = {
    "attention, head size 64": Case(op="attention"),
    "attention, head size 128": Case(op="attention", head_dim=128),
    "disentangled attention, head size 64": Case(op="disentangled"),
    "loss": Case(op="loss"),
    "attention, grouped heads": Case(op="attention", group=2),
    "attention, dropout": Case(op="attention", dropout_p=0.2),
    "disentangled attention, dropout": Case(op="disentangled", dropout_p=0.2),
    "loss, bias, softcap, smoothing, z-loss": Case(op="loss", options=True),
    "attention, head size 40": Case(op="attention", head_dim=40),
    "attention, float16": Case(op="attention", dtype=torch.float16),
    "attention, float32": Case(op="attention", head_dim=32, dtype=torch.float32),
    "disentangled attention, float32": Case(op="disentangled", dtype=torch.float32),
    "loss, float32": Case(op="loss", dtype=torch.float32),
}
# which outputs a kernel writes; delta's are read by dq and dkdv
KERNELS = {
    "attention": {"forward": ("out",), "delta and dq": ("d_q",), "delta and dkdv": ("d_k", "d_v")},
    "disentangled": {
        "forward": ("out",),
        "delta and dq": ("d_q", "d_k_rel"),
        "delta and dkdv": ("d_k", "d_v", "d_q_rel"),
    },
    "loss": {"forward": ("loss",), "d_logits": ("d_hidden", "d_weight", "d_bias")},
}
_NAMES = {
    "attention": ("out", "d_q", "d_k", "d_v"),
    "disentangled": ("out", "d_q", "d_k", "d_v", "d_q_rel", "d_k_rel"),
    "loss": ("loss", "d_hidden", "d_weight", "d_bias"),
}


def run(bench: GpuBench) -> Iterator[list[Row]]:
    if bench.device == "cuda":
        yield [compiled_ahead(bench)]
    worker: Worker | None = None
    try:
        for name, case in CASES.items():
            kernels = KERNELS[case.op]
            blank = {kernel: _row(name, kernel) for kernel in kernels}
            if bench.left() < 0:
                yield [replace(row, reason=TIME_USED_UP) for row in blank.values()]
                continue
            try:
                worker = worker or Worker("gpu_stages.proof:Prover", {"device": bench.device, "planted": bench.planted})
                shares = worker.call("prove", timeout=min(_CASE_SECONDS, max(bench.left(), 1.0)), name=name)
            except Exception as error:  # a fault on a GPU stays in its process
                if worker is not None:
                    worker.close()
                worker = None
                shares = dict.fromkeys(kernels, TIME_USED_UP if bench.left() < 1 else told(error))
            yield [_judged(blank[kernel], shares[kernel]) for kernel in kernels]
    finally:
        if worker is not None:
            worker.close()


def _row(name: str, kernel: str) -> Row:
    return Row(suite="proof", workload=name, case=kernel, provider="antlm_fast triton", quantity="of budget")


def _judged(row: Row, share: float | str) -> Row:
    if isinstance(share, str):
        return replace(row, reason=share)
    if not share <= 1.0:
        return replace(row, reason=f"WRONG: the error is {share:.3g} times what the budget allows")
    return replace(row, samples=(share,))


class Prover:
    """What runs in the worker's process."""

    def __init__(self, device: str, planted: str | None) -> None:
        self.device = device
        plant(planted)

    def prove(self, name: str) -> dict[str, float | str]:
        """The largest error over its budget of what each kernel writes, or what was wrong with it."""
        case = CASES[name]
        call, tensors = _call_of(case, self.device)
        # what is not written stays NaN; some library kernels have no deterministic form, and need none here
        torch.use_deterministic_algorithms(True, warn_only=True)
        found = [x.cpu() for x in launched(case, self.device)]
        torch.use_deterministic_algorithms(False)
        exact = _results(call, [x.to(case.dtype) for x in tensors], torch.float64, "cpu", "reference")
        eager = _results(call, tensors, case.dtype, "cpu", "reference")
        shares: dict[str, float | str] = {}
        named = dict(zip(_NAMES[case.op], zip(found, exact, eager, strict=True), strict=False))
        for kernel, outputs in KERNELS[case.op].items():
            try:
                shares[kernel] = max(_share(output, *named[output]) for output in outputs if output in named)
            except AssertionError as error:
                shares[kernel] = f"WRONG: {error}"
        return shares


def _share(name: str, found: Tensor, exact: Tensor, eager: Tensor) -> float:
    error, budget = error_and_budget(name, found, exact, eager, 3.0 if name.startswith("d_") else 2.0)
    return error / budget if budget else error


Call = Callable[..., Tensor]


def launched(case: Case, device: str) -> tuple[Tensor, ...]:
    """The result and all gradients by the Triton kernels, on the device."""
    return _results(*_call_of(case, device), case.dtype, device, "triton")


def _call_of(case: Case, device: str) -> tuple[Call, list[Tensor]]:
    return (_loss_call if case.op == "loss" else _attention_call)(case, GPU_SIZES[device])


def _results(call: Call, tensors: list[Tensor], dtype: torch.dtype, device: str, impl: str) -> tuple[Tensor, ...]:
    *arguments, gradient = (x.to(device, dtype) for x in tensors)
    return results_of(functools.partial(call, device=device, impl=impl), arguments, gradient)


def _attention_call(case: Case, sizes: Any) -> tuple[Call, list[Tensor]]:
    lengths = sizes.proof_lengths
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # causal, full, a prefix, causal again, ...
    prefixes = [(0, 2**31 - 1, length // 3)[place % 3] for place, length in enumerate(lengths)]
    prefix_len = torch.tensor(prefixes, dtype=torch.int32)
    heads, total = sizes.proof_heads, sum(lengths) + _SLACK_ROWS
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator)
    key_heads = heads // case.group
    tensors = [draw(total, count, case.head_dim) for count in (heads, key_heads, key_heads)]
    if case.op == "disentangled":
        tensors += [draw(2 * BUCKETS - 1, heads, case.head_dim) for _ in range(2)]
    tensors.append(draw(total, heads, case.head_dim))
    op = disentangled_attention_varlen if case.op == "disentangled" else attention_varlen

    def call(*inputs: Tensor, device: str, impl: str) -> Tensor:
        cu_seqlens = starts.to(device)
        seed = torch.tensor(5, device=device) if case.dropout_p else None
        return op(
            *inputs,
            cu_seqlens,
            cu_seqlens,
            max(lengths),
            max(lengths),
            prefix_len=prefix_len.to(device),
            dropout_p=case.dropout_p,
            dropout_seed=seed,
            impl=impl,
        )

    return call, tensors


def _loss_call(case: Case, sizes: Any) -> tuple[Call, list[Tensor]]:
    rows, hidden_size, vocab_size = sum(sizes.proof_lengths), case.head_dim, 517
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(rows, hidden_size, generator=generator)]
    tensors.append(torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5)
    if case.options:
        tensors.append(torch.randn(vocab_size, generator=generator))
    tensors.append(torch.ones(()))
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[::3] = -100

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, device: str, impl: str) -> Tensor:
        options = {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3} if case.options else {}
        return linear_cross_entropy(hidden, weight, targets.to(device), bias=bias, **options, impl=impl)

    return call, tensors


def compiled_ahead(bench: GpuBench) -> Row:
    """All kernels of the cases on all cores at once, into Triton's cache, where this and later stages find them."""
    from antlm_fast.kernels.triton_support.launch import arch_of

    arch = arch_of(torch.device("cuda"))
    row = Row(suite="proof", workload="kernels compiled ahead", case=arch, provider="antlm_fast triton")
    begun = time.monotonic()
    jobs = [(name, place, arch) for name, case in CASES.items() for place in range(2 if case.op == "loss" else 4)]
    done = compiled_on_all_cores(_compile, jobs, bench.left() / 2)
    if done < len(jobs):  # those that cannot be compiled fail again, by name, in their cases
        print(f"compiled ahead: {done} of {len(jobs)} kernels", flush=True)
    return replace(row, samples=(time.monotonic() - begun,), amount=float(done), unit="kernels/s")


def _compile(name: str, place: int, arch: str) -> None:
    compile_with_launcher(offline_launches_of(CASES[name], arch)[place], arch)


def offline_launches_of(case: Case, arch: str) -> list[Any]:
    """The launches of a case, for a GPU that need not be there."""
    from antlm_fast.kernels.attention import triton_launches
    from antlm_fast.kernels.linear_cross_entropy import triton_launches as loss_launches

    kind = "ieee" if case.dtype == torch.float32 else "half"
    if case.op == "loss":
        options = {"biased": case.options, "softcap": case.options, "smoothed": case.options}
        return loss_launches.offline_launches(arch, case.dtype, 512, 16001, kind=kind, **options)
    heads = GPU_SIZES["cuda"].proof_heads
    return triton_launches.offline_launches(
        arch,
        case.dtype,
        case.head_dim,
        heads,
        heads // case.group,
        dropout=case.dropout_p > 0,
        kind=kind,
        bucket_size=BUCKETS if case.op == "disentangled" else None,
    )
