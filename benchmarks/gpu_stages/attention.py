"""Stage d: attention beside what others offer, at sizes that flash-attention's own figures are of.

Every way gets its inputs laid out as it likes them; what it needs beside them (block masks, lengths) is made before.
Graphs are replayed, so no host time is in the figures, and the second-level cache is overwritten before each. The
replayed graph's own results are held to float64 on two sequences and two heads. TFLOP/s as flash-attention counts them:
4 x head_dim for each pair of query and key that see each other, forward; 2.5 times that, backward.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Provider, Row, free_cache, measure
from peers import operations
from torch import Tensor

from antlm_fast.kernels.attention import attention, attention_varlen
from gpu_stages.plan import AttentionShape, GpuBench
from gpu_stages.timing import Passes, assert_right, passes, providers, results_of

BACKWARD_OVER_FORWARD = 2.5
_NAMES = ("out", "d_q", "d_k", "d_v")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """q, k, v and the result's gradient, packed (tokens, heads, head_dim); all lengths alike unless it says packed."""

    shape: AttentionShape
    tensors: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    causal: Tensor  # bool (sequences,)

    @property
    def cu_seqlens(self) -> Tensor:
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        return starts.to(self.tensors[0].device, torch.int32)

    @property
    def flops(self) -> float:
        """Of the forward."""
        seen = (
            n * (n + 1) / 2 if causal else n * n for n, causal in zip(self.lengths, self.causal.tolist(), strict=True)
        )
        return 4.0 * self.shape.heads * self.shape.head_dim * sum(seen)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A function of q, k, v, with its inputs and its results' way back to packed ones."""

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    to_packed: Callable[[Tensor], Tensor]


def run(bench: GpuBench) -> Iterator[list[Row]]:
    for shape in bench.sizes.attention:
        if bench.left() < 0:
            return
        yield measured(bench, shape, "attention")
        gc.collect()  # what the graphs hold
        free_cache(bench.device)


def measured(bench: GpuBench, shape: AttentionShape, suite: str) -> list[Row]:
    work = drawn(shape, bench.device)
    exact = functools.cache(functools.partial(reference_results, work))
    found: list[Provider] = []
    for way in ways(work):
        check = functools.partial(check_results, work, way, exact)
        prepare = functools.partial(prepared, way, bench.device)
        found += providers(
            bench,
            f"{shape.visibility}{', packed' if shape.packed else ''}",
            way.name,
            prepare,
            work.flops,
            check,
            backward_over_forward=BACKWARD_OVER_FORWARD,
        )
    return measure(suite, shape.title, found, rounds=bench.sizes.rounds, until=bench.until)


def prepared(way: Way, device: str) -> Passes:
    *arguments, gradient = way.inputs
    return passes(way.function, [x.detach().requires_grad_() for x in arguments], gradient, device)


def drawn(shape: AttentionShape, device: str) -> Workload:
    lengths = spread_lengths(shape) if shape.packed else (shape.seqlen,) * shape.sequences
    generator = torch.Generator(device).manual_seed(0)
    size = (sum(lengths), shape.heads, shape.head_dim)
    tensors = tuple(torch.randn(size, generator=generator, device=device).to(torch.bfloat16) for _ in range(4))
    causal = torch.full((len(lengths),), shape.visibility == "causal")
    if shape.visibility == "mixed":
        causal[: len(lengths) // 2] = True
    return Workload(shape=shape, tensors=tensors, lengths=lengths, causal=causal.to(device))


def spread_lengths(shape: AttentionShape) -> tuple[int, ...]:
    """Lengths like documents': log-normal, from one token up to the longest; the same every time."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(shape.sequences, generator=generator).exp() * shape.seqlen / 12
    lengths = draws.clamp(1, shape.seqlen).int().tolist()
    return (*lengths[:-1], shape.seqlen)


def ways(work: Workload) -> Iterator[Way]:
    """Ours first: the others are compared with it."""
    shape, device = work.shape, work.tensors[0].device.type
    if shape.packed:
        yield from _packed_ways(work)
        return
    whole = tuple(x.unflatten(0, (shape.sequences, shape.seqlen)) for x in work.tensors)
    heads_first = tuple(x.transpose(1, 2).contiguous() for x in whole)
    joined = functools.partial(torch.flatten, start_dim=0, end_dim=1)

    def from_heads_first(x: Tensor) -> Tensor:
        return joined(x.transpose(1, 2))

    ours = functools.partial(attention, causal=work.causal, impl="triton")
    yield Way(name="antlm_fast triton", function=ours, inputs=whole, to_packed=joined)
    if shape.flex:
        flex = functools.partial(_flex, mask=functools.cache(functools.partial(_dense_mask, work)))
        yield Way(name="FlexAttention", function=flex, inputs=heads_first, to_packed=from_heads_first)
        return
    # as models call it: the sequences' starts are there already
    yield from _our_packed_way(work)
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION") if device == "cuda" else ("MATH",)
    for backend in backends:
        function = functools.partial(_by_objective(work, _sdpa), backend=backend)
        name = f"SDPA {backend.partition('_')[0].lower()}"
        yield Way(name=name, function=function, inputs=heads_first, to_packed=from_heads_first)
    if device == "cuda":
        flash = _by_objective(work, operations.flash_attn)
        yield Way(name="flash-attn", function=flash, inputs=whole, to_packed=joined)


def _our_packed_way(work: Workload) -> Iterator[Way]:
    starts, longest = work.cu_seqlens, max(work.lengths)
    options = {"causal": work.causal, "impl": "triton"}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_varlen(q, k, v, starts, starts, longest, longest, **options)

    name = "antlm_fast triton" if work.shape.packed else "antlm_fast triton, varlen"
    yield Way(name=name, function=function, inputs=work.tensors, to_packed=lambda x: x)


def _packed_ways(work: Workload) -> Iterator[Way]:
    yield from _our_packed_way(work)
    if work.shape.flex:
        heads_first = tuple(x.transpose(0, 1)[None].contiguous() for x in work.tensors)
        flex = functools.partial(_flex, mask=functools.cache(functools.partial(_document_mask, work)))
        yield Way(name="FlexAttention", function=flex, inputs=heads_first, to_packed=lambda x: x[0].transpose(0, 1))
    elif work.tensors[0].device.type == "cuda":
        for name, function in (("torch varlen_attn", _torch_varlen), ("flash-attn varlen", _flash_varlen)):
            yield Way(name=name, function=_varlen(work, function), inputs=work.tensors, to_packed=lambda x: x)


def _by_objective(work: Workload, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One call for each value of the flag: the causal sequences come first."""
    count = int(work.causal.sum())
    if count in (0, len(work.lengths)):
        return functools.partial(function, causal=count > 0)

    def both(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        first = function(q[:count], k[:count], v[:count], causal=True, **options)
        return torch.cat((first, function(q[count:], k[count:], v[count:], causal=False, **options)))

    return both


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: str) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return operations.sdpa(q, k, v, causal=causal)


def _varlen(work: Workload, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One call for each value of the flag."""
    count, starts = int(work.causal.sum()), work.cu_seqlens
    parts = [(True, 0, count), (False, count, len(work.lengths))]
    parts = [part for part in parts if part[1] < part[2]]
    bounds = starts.tolist()
    own = [(starts[first : last + 1] - bounds[first]).contiguous() for _, first, last in parts]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for (causal, first, last), cu_seqlens in zip(parts, own, strict=True):
            rows = slice(bounds[first], bounds[last])
            longest = max(work.lengths[first:last])
            outs.append(function(q[rows], k[rows], v[rows], cu_seqlens, longest, causal=causal))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return call


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, *, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out: Tensor = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0 if causal else -1))
    return out


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, *, causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=causal)
    return out


def _flex(q: Tensor, k: Tensor, v: Tensor, *, mask: Callable[[], Any]) -> Tensor:
    out: Tensor = operations.compiled_flex()(q, k, v, block_mask=mask())
    return out


def _dense_mask(work: Workload) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    causal, length = work.causal, work.shape.seqlen
    if not bool(causal.any()):
        return None

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) | ~causal[b]

    return create_block_mask(seen, len(work.lengths), None, length, length, device=str(causal.device))


def _document_mask(work: Workload) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    causal, total = work.causal, sum(work.lengths)
    counts = torch.tensor(work.lengths, device=causal.device)
    document = torch.arange(len(work.lengths), device=causal.device).repeat_interleave(counts)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & ((i >= j) | ~causal[document[i]])

    return create_block_mask(seen, None, None, total, total, device=str(causal.device))


def reference_results(work: Workload) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Of the checked sequences and heads: exact, and plain code in bfloat16."""
    *arguments, gradient = (_checked_part(work, x) for x in work.tensors)
    chosen = _chosen(work)
    lengths = [work.lengths[place] for place in chosen]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(gradient.device, torch.int32)
    causal = work.causal[chosen]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_varlen(q, k, v, starts, starts, max(lengths), max(lengths), causal=causal, impl="reference")

    exact = results_of(function, [x.double() for x in arguments], gradient)
    return exact, results_of(function, arguments, gradient)


def check_results(
    work: Workload,
    way: Way,
    exact: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    found: Sequence[Tensor],
) -> None:
    assert_right([_checked_part(work, way.to_packed(x)) for x in found], *exact(), _NAMES)


def _chosen(work: Workload) -> list[int]:
    """The first sequence and the last: where the objective is mixed, one of each."""
    return sorted({0, len(work.lengths) - 1})


def _checked_part(work: Workload, x: Tensor) -> Tensor:
    """Rows of the chosen sequences, of the first head and the last."""
    starts = torch.tensor([0, *work.lengths]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in _chosen(work)])
    heads = torch.tensor(sorted({0, work.shape.heads - 1}), device=x.device)
    return x.detach().index_select(0, rows.to(x.device)).index_select(1, heads)
