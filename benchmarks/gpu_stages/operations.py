"""Stage f: disentangled attention and the loss, forward, backward and both, beside their peers.

As in stage d, graphs are replayed. The loss's ways that look for the labelled rows wait for the device, and cannot be
captured: those are timed as calls, and their host time counts.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from harness import Provider, Row, free_cache, measure
from op_workloads import BUCKETS, disentangled_inputs, drawn_targets
from peers import operations
from torch import Tensor

from antlm_fast.kernels.disentangled_attention import disentangled_attention
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from gpu_stages.plan import GpuBench
from gpu_stages.timing import Passes, assert_right, eager_passes, passes, providers, results_of

_RELATIVE_NAMES = ("out", "d_q", "d_k", "d_v", "d_q_rel", "d_k_rel")
_LOSS_NAMES = ("loss", "d_hidden", "d_weight")
_CHECKED_SEQUENCES = 1
Results = Sequence[Tensor]
Function = Callable[..., Tensor]


def run(bench: GpuBench) -> Iterator[list[Row]]:
    eager = [functools.partial(disentangled, bench, *shape) for shape in bench.sizes.disentangled]
    losses = [functools.partial(loss, bench, *shape) for shape in bench.sizes.cross_entropy]
    works = [*losses[:2], *eager, *losses[2:]]
    if bench.sizes.compiled:  # what takes tens of seconds to compile comes last, on the first shape alone
        works.append(functools.partial(disentangled, bench, *bench.sizes.disentangled[0], compiled=True))
        works.append(functools.partial(loss, bench, *bench.sizes.cross_entropy[0], compiled=True))
    for work in works:
        if bench.left() < 0:
            return
        yield work()
        gc.collect()  # what the graphs hold
        free_cache(bench.device)


def disentangled(
    bench: GpuBench, batch: int, heads: int, seqlen: int, head_dim: int, *, compiled: bool = False
) -> list[Row]:
    """Both relative terms, full and causal, no dropout; ours beside the compiled peer, or beside the others."""
    *arguments, gradient = disentangled_inputs(batch, heads, seqlen, head_dim, torch.bfloat16, bench.device)
    peers = [name for name in operations.DISENTANGLED if "einsum" not in name and (name == "FlexAttention") == compiled]
    found: list[Provider] = []
    for causal in (False, True):
        ours = functools.partial(disentangled_attention, causal=causal, impl="triton")
        named: dict[str, Function] = {"antlm_fast triton": ours}
        named |= {name: functools.partial(operations.DISENTANGLED[name], causal=causal) for name in peers}
        exact = functools.cache(functools.partial(_relative_reference, arguments, gradient, causal))
        seen = seqlen * (seqlen + 1) / 2 if causal else seqlen**2
        # the products with the tables, a row of them for every token, and attention's own
        flops = 4.0 * batch * heads * head_dim * (seen + seqlen * (2 * BUCKETS - 1))
        for name, function in named.items():
            found += providers(
                bench,
                "causal" if causal else "full",
                name,
                functools.partial(_prepared, function, arguments, gradient, bench.device),
                flops,
                functools.partial(_check_relative, function, exact, arguments, gradient, alone=not compiled),
                backward_over_forward=2.5,
            )
    title = f"{batch} x {seqlen} tokens, {heads} heads of {head_dim}{', compiled peer' if compiled else ''}"
    return measure("disentangled", title, found, rounds=bench.sizes.rounds, until=bench.until)


def _relative_reference(arguments: Results, gradient: Tensor, causal: bool) -> tuple[Results, Results]:
    function = functools.partial(disentangled_attention, causal=causal, impl="reference")
    part, own = _first_sequences(arguments), gradient.detach()[:_CHECKED_SEQUENCES]
    exact = results_of(function, [x.double() for x in part], own)
    return exact, results_of(function, part, own)


def _check_relative(
    function: Function,
    exact: Callable[[], tuple[Results, Results]],
    arguments: Results,
    gradient: Tensor,
    found: Results,
    *,
    alone: bool,
) -> None:
    """The first sequence of the batch that is timed; `alone`: the tables' gradients too, by a call of that sequence."""
    if alone:
        results = results_of(function, _first_sequences(arguments), gradient.detach()[:_CHECKED_SEQUENCES])
        assert_right(results, *exact(), _RELATIVE_NAMES)
    among_all = [x.detach()[:_CHECKED_SEQUENCES] for x in found[:4]]
    assert_right(among_all, *(each[:4] for each in exact()), _RELATIVE_NAMES[:4])


def _first_sequences(arguments: Results) -> list[Tensor]:
    return [x.detach()[:_CHECKED_SEQUENCES] if x.ndim == 4 else x.detach() for x in arguments]


def loss(
    bench: GpuBench, rows: int, hidden_size: int, vocab_size: int, share: float, *, compiled: bool = False
) -> list[Row]:
    """Ours beside the compiled peer, or beside the others."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    targets = drawn_targets(rows, vocab_size, share, generator).to(bench.device)
    arguments = [x.to(bench.device, torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    gradient = torch.ones((), device=bench.device)
    named: dict[str, Function] = {
        f"antlm_fast {impl}": functools.partial(linear_cross_entropy, targets=targets, impl=impl)
        for impl in ("triton", "torch")
    }
    for name, function in operations.CROSS_ENTROPY.items():
        if ("compiled" in name) == compiled:
            named[name] = functools.partial(function, targets=targets)

    @functools.cache
    def exact() -> tuple[Results, Results]:
        function = functools.partial(linear_cross_entropy, targets=targets, impl="reference")
        return results_of(function, [x.double() for x in arguments], gradient), results_of(
            function, arguments, gradient
        )

    labelled = int((targets != -100).sum())
    found: list[Provider] = []
    for name, function in named.items():
        found += providers(
            bench,
            f"{share:.0%} labelled",
            name,
            functools.partial(_prepared, function, arguments, gradient, bench.device),
            2.0 * labelled * hidden_size * vocab_size,
            lambda results: assert_right(results, *exact(), _LOSS_NAMES),
            backward_over_forward=2.0,
        )
    title = f"{rows} rows, hidden {hidden_size}, vocabulary {vocab_size}{', compiled peer' if compiled else ''}"
    return measure("cross_entropy", title, found, rounds=bench.sizes.rounds, until=bench.until)


def _prepared(function: Function, arguments: Results, gradient: Tensor, device: str) -> Passes:
    """Captured where it can be; on leaves of its own, for a leaf's node keeps the stream that it was first used on."""
    arguments = [x.detach().requires_grad_() for x in arguments]
    gradient = gradient.to(function(*arguments))  # the result's dtype is the way's own; and what is compiled is so now
    if device == "cpu" or not _waits(function, arguments):
        return passes(function, arguments, gradient, device)
    return eager_passes(function, arguments, gradient)


def _waits(function: Function, arguments: Results) -> bool:
    """Whether a call waits for the GPU, which a captured one cannot."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*arguments)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
