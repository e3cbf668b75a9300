"""What the machine can do, measured here and now, and the least time that a workload needs at that.

floor = FLOPs / GEMM peak of the dtype + bytes / memory bandwidth. FLOPs are those of the mathematics, nothing computed
twice; bytes are each tensor of the interface read or written once. Peak and bandwidth are the best that was seen over a
few shapes, since what disturbs a measurement only ever slows it down.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import Bench, Call, Provider, Row, Told
from sizes import DTYPES

BYTES = {"fp32": 4, "bf16": 2}
MEDIUM = "fp32, medium precision"


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs on matrix units, and bytes that have to pass between memory and chip."""

    flops: float
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """flops_per_s: GEMM peak by dtype; bytes_per_s: memory bandwidth."""

    flops_per_s: Mapping[str, float]
    bytes_per_s: float

    def floor_seconds(self, work: Work, dtype: str) -> float | None:
        """None where a limit that the work needs was not measured."""
        seconds = work.flops / self.flops_per_s[dtype] + (work.bytes / self.bytes_per_s if work.bytes else 0.0)
        return None if math.isnan(seconds) else seconds

    def json(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(bench: Bench) -> tuple[Limits, list[Row]]:
    """Limits and the rows they were taken from."""
    sizes, device = bench.sizes, bench.device

    def product(name: str, shape: tuple[int, int, int]) -> Call:
        rows, inner, columns = shape
        dtype = DTYPES["fp32" if name == MEDIUM else name]
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        if name != MEDIUM:
            return lambda: torch.mm(a, b, out=out)
        if not medium_is_float32(device):
            raise Told("medium precision is not float32 on this machine: its products round their inputs")

        def call() -> None:
            with _matmul_precision("medium"):
                torch.mm(a, b, out=out)

        return call

    def stream(kind: str) -> Call:
        a, b, c = (torch.rand(sizes.stream_mib * 2**18, device=device) for _ in range(3))
        return (lambda: a.copy_(b)) if kind == "copy" else (lambda: torch.add(b, c, alpha=0.5, out=a))

    products = [
        Provider(
            case=f"{' x '.join(map(str, shape))}",
            name=name,
            prepare=functools.partial(product, name, shape),
            amount=2 * shape[0] * shape[1] * shape[2] / 1e9,
            unit="GFLOP/s",
        )
        for shape in sizes.gemm
        for name in (*DTYPES, MEDIUM)
    ]
    streams = [
        Provider(
            case=kind,
            name=f"{sizes.stream_mib} MiB a tensor",
            prepare=functools.partial(stream, kind),
            amount=tensors * sizes.stream_mib * 2**20 / 1e9,
            unit="GB/s",
        )
        for kind, tensors in (("copy", 2), ("triad", 3))
    ]
    rows = bench.measure("limits", "matrix products", products, rounds=sizes.rounds, warmup=2)
    rows += bench.measure("limits", "memory", streams, rounds=sizes.rounds)

    return limits_of(rows), rows


def limits_of(rows: Sequence[Row]) -> Limits:
    """The best of the rows that measure_limits gives."""

    def best(names: tuple[str, ...], kind: str) -> float:
        chosen = [row for row in rows if row.workload == kind and row.samples and (not names or row.provider in names)]
        return max((row.amount * 1e9 / min(row.samples) for row in chosen), default=float("nan"))

    peaks = {"fp32": best(("fp32", MEDIUM), "matrix products"), "bf16": best(("bf16",), "matrix products")}
    return Limits(flops_per_s=peaks, bytes_per_s=best((), "memory"))


@functools.cache
def medium_is_float32(device: str) -> bool:
    """Whether torch's "medium" products still are float32: on a CPU without AMX only the library changes."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with _matmul_precision("medium"):
        found = (a.to(device) @ b.to(device)).cpu()
    return float((found - exact).norm() / exact.norm()) < 1e-5


@contextlib.contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def attention_work(batch: int, heads: int, seqlen: int, head_dim: int, dtype: str, *, causal: bool) -> Work:
    """Forward and backward: 2 products and 4, over the scores that are seen; q, k, v, out and their gradients."""
    seen = seqlen * (seqlen + 1) / 2 if causal else seqlen**2
    tensor = batch * seqlen * heads * head_dim * BYTES[dtype]
    return Work(flops=12 * batch * heads * head_dim * seen, bytes=12 * tensor)


def disentangled_work(
    batch: int, heads: int, seqlen: int, head_dim: int, table_rows: int, dtype: str, *, causal: bool
) -> Work:
    """Attention's, and both relative terms by bucket: 2 products of every token with the table, forward, 4 backward."""
    plain = attention_work(batch, heads, seqlen, head_dim, dtype, causal=causal)
    return Work(flops=plain.flops + 12 * batch * heads * seqlen * table_rows * head_dim, bytes=plain.bytes)


def cross_entropy_work(labelled: int, hidden_size: int, vocab_size: int, dtype: str) -> Work:
    """Head and loss over the labelled rows: 1 product forward, 2 backward; rows, weight and their gradients."""
    return Work(
        flops=6 * labelled * hidden_size * vocab_size,
        bytes=2 * (labelled + vocab_size) * hidden_size * BYTES[dtype],
    )


def step_work(config: Any, sequences: int, seqlen: int, labelled: int, dtype: str, *, causal: bool) -> Work:
    """A training step: every layer on every token, the head on labelled tokens alone, AdamW over all parameters.

    A matrix product of a layer costs 6 FLOPs a weight and token, forward and backward. AdamW reads weight, gradient and
    two moments in float32 and writes all but the gradient, and in bfloat16 leaves a copy: 28 or 30 bytes a parameter.
    """
    tokens, hidden = sequences * seqlen, config.hidden_size
    layer = 4 * hidden**2 + 3 * hidden * config.intermediate_size
    if config.architecture == "baby_llama":
        layer -= 2 * hidden * (config.num_attention_heads - config.kv_heads) * config.head_dim
    if config.architecture == "gpt_bert":
        layer += hidden**2  # the gate
    head = hidden * config.vocab_size + (0 if config.architecture == "baby_llama" else hidden**2)
    flops = 6 * tokens * layer * config.num_hidden_layers + 6 * labelled * head
    shape = (sequences, config.num_attention_heads, seqlen, config.head_dim)
    if config.architecture == "baby_llama":
        attention = attention_work(*shape, dtype, causal=causal)
        tables = 1 if config.tie_word_embeddings else 2
    else:
        attention = disentangled_work(*shape, 2 * config.position_bucket_size - 1, dtype, causal=causal)
        tables = 1
    parameters = layer * config.num_hidden_layers + tables * hidden * config.vocab_size
    return Work(
        flops=flops + config.num_hidden_layers * attention.flops, bytes=parameters * (30 if dtype == "bf16" else 28)
    )
