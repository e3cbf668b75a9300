"""The operations by themselves: attention, disentangled attention, linear cross-entropy; beside what others offer.

Every provider's result and gradients are held to the float64 reference, within the error that plain code of the same
dtype makes on the same inputs, before it is timed. Times are of forward and backward together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from fake_cuda import faces
from harness import Bench, Call, Provider, Row, Told
from peers import operations
from roofline import attention_work, cross_entropy_work, disentangled_work
from sizes import DTYPES
from torch import Tensor

from antlm_fast.kernels.attention import attention
from antlm_fast.kernels.attention.api import DENSE
from antlm_fast.kernels.disentangled_attention import disentangled_attention
from antlm_fast.kernels.disentangled_attention.api import VARLEN
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.kernels.linear_cross_entropy.api import TABLE
from antlm_fast.testing.budget import assert_within_budget

Function = Callable[..., Tensor]
BUCKETS = 32
# forms that hold seqlen^2 * head_dim numbers are left out beyond this
EINSUM_MIB = 4096
_CHECKED = 2  # sequences
# the specification is timed once, to show that it is no competitor, and not at lengths where that takes minutes
REFERENCE = "antlm_fast reference"
_LONGEST_REFERENCE = 128
NEEDS_COMPILER = ("FlexAttention", "logits of labelled rows, compiled")


def attention_suite(bench: Bench) -> Iterator[list[Row]]:
    """Each provider gets q, k, v laid out as it takes them, without a copy."""
    for batch, heads, seqlen, head_dim in bench.sizes.attention:
        for dtype_name, dtype in DTYPES.items():
            generator = torch.Generator().manual_seed(0)
            tensors = [torch.randn(batch, seqlen, heads, head_dim, generator=generator).to(dtype) for _ in range(4)]
            ours = [x.to(bench.device).requires_grad_(place < 3) for place, x in enumerate(tensors)]  # q, k, v, grad
            heads_first = [
                x.detach().transpose(1, 2).contiguous().requires_grad_(place < 3) for place, x in enumerate(ours)
            ]
            providers = []
            for causal in (True, False):
                reference = functools.partial(attention, causal=causal, impl="reference")
                check = Check(reference, tensors)
                ways: dict[str, tuple[Function, bool]] = {
                    f"antlm_fast {impl}": (functools.partial(attention, causal=causal, impl=impl), False)
                    for impl in preferred(DENSE, bench.device)
                }
                for name, (function, transposed) in operations.ATTENTION.items():
                    ways[name] = functools.partial(function, causal=causal), transposed
                work = attention_work(batch, heads, seqlen, head_dim, dtype_name, causal=causal)
                for name, (function, transposed) in ways.items():
                    inputs = heads_first if transposed else ours
                    providers.append(
                        Provider(
                            case="causal" if causal else "full",
                            name=name,
                            probe=tiny(function, inputs, {1: 2, 2: 16} if transposed else {1: 16, 2: 2}, bench, name),
                            prepare=functools.partial(check.checked, function, inputs, transposed=transposed),
                            amount=work.flops / 1e9,
                            unit="GFLOP/s",
                            floor=bench.floor(work, dtype_name),
                            faces=None if name in NEEDS_COMPILER else functools.partial(faces, function, inputs[:3]),
                            graph=True,
                            rounds=1 if name == REFERENCE else None,
                        )
                    )
            shape = f"B,H,T,D {batch},{heads},{seqlen},{head_dim}, {dtype_name}"
            yield bench.measure("attention", shape, providers, rounds=bench.sizes.rounds)


def disentangled_suite(bench: Bench) -> Iterator[list[Row]]:
    """Attention with both relative terms of LTG-BERT."""
    for batch, heads, seqlen, head_dim in bench.sizes.disentangled:
        for dtype_name in ("bf16",):
            inputs = disentangled_inputs(batch, heads, seqlen, head_dim, DTYPES[dtype_name], bench.device)
            providers = []
            for causal in (True, False):
                reference = functools.partial(disentangled_attention, causal=causal, impl="reference")
                check = Check(reference, [x.detach().cpu() for x in inputs])
                ways: dict[str, Function] = {
                    f"antlm_fast {impl}": functools.partial(disentangled_attention, causal=causal, impl=impl)
                    for impl in preferred(VARLEN, bench.device)
                }
                if seqlen > _LONGEST_REFERENCE:
                    ways[REFERENCE] = _too_slow
                for name, function in operations.DISENTANGLED.items():
                    ways[name] = functools.partial(function, causal=causal)
                    if "einsum" in name and 4 * seqlen**2 * heads * head_dim * 2 / 2**20 > EINSUM_MIB:
                        ways[name] = _too_large
                work = disentangled_work(batch, heads, seqlen, head_dim, 2 * BUCKETS - 1, dtype_name, causal=causal)
                providers += [
                    Provider(
                        case="causal" if causal else "full",
                        name=name,
                        probe=tiny(function, inputs, {1: 16, 2: 2}, bench, name),
                        prepare=functools.partial(check.checked, function, inputs),
                        amount=work.flops / 1e9,
                        unit="GFLOP/s",
                        floor=bench.floor(work, dtype_name),
                        faces=None if name in NEEDS_COMPILER else functools.partial(faces, function, inputs[:5]),
                        graph=True,
                        rounds=1 if name == REFERENCE else None,
                    )
                    for name, function in ways.items()
                ]
            shape = f"B,H,T,D {batch},{heads},{seqlen},{head_dim}, {dtype_name}"
            yield bench.measure("disentangled", shape, providers, rounds=bench.sizes.rounds)


def disentangled_inputs(
    batch: int, heads: int, seqlen: int, head_dim: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """q, k, v, the two tables, and the result's gradient."""
    generator = torch.Generator().manual_seed(0)
    tokens, table = (batch, seqlen, heads, head_dim), (2 * BUCKETS - 1, heads, head_dim)
    shapes = (tokens, tokens, tokens, table, table, tokens)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_(place < 5) for place, x in enumerate(tensors)]


def cross_entropy_suite(bench: Bench) -> Iterator[list[Row]]:
    """Head and loss, with all rows labelled (CLM) and with 15 % (MLM)."""
    rows, hidden_size, vocab_size = bench.sizes.cross_entropy
    for dtype_name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        inputs = cross_entropy_inputs(rows, hidden_size, vocab_size, dtype, generator)
        on_device = [x.detach().to(bench.device).requires_grad_(x.requires_grad) for x in inputs]
        providers = []
        for share in (1.0, 0.15):
            targets = drawn_targets(rows, vocab_size, share, generator)
            reference = functools.partial(linear_cross_entropy, targets=targets, impl="reference")
            check = Check(reference, inputs)
            moved = targets.to(bench.device)
            ways: dict[str, Function] = {
                f"antlm_fast {impl}": functools.partial(linear_cross_entropy, targets=moved, impl=impl)
                for impl in preferred(TABLE, bench.device)
            }
            for name, function in operations.CROSS_ENTROPY.items():
                if name in NEEDS_COMPILER and not bench.sizes.compiled:
                    function = not_compiled
                ways[name] = functools.partial(function, targets=moved)
            work = cross_entropy_work(int((targets != -100).sum()), hidden_size, vocab_size, dtype_name)
            providers += [
                Provider(
                    case=f"{share:.0%} labelled",
                    name=name,
                    prepare=functools.partial(check.checked, function, on_device),
                    amount=work.flops / 1e9,  # of labelled rows alone
                    unit="GFLOP/s",
                    floor=bench.floor(work, dtype_name),
                    faces=None
                    if name in NEEDS_COMPILER
                    else functools.partial(faces, function, on_device[:2], targets=moved),
                )
                for name, function in ways.items()
            ]
        shape = f"rows,hidden,vocab {rows},{hidden_size},{vocab_size}, {dtype_name}"
        yield bench.measure("cross_entropy", shape, providers, rounds=bench.sizes.rounds)


def cross_entropy_inputs(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """Hidden rows, the head's weight, and the loss's gradient."""
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_(), torch.ones(())]


def drawn_targets(rows: int, vocab_size: int, share: float, generator: torch.Generator) -> Tensor:
    labelled = torch.rand(rows, generator=generator) < share
    return torch.randint(vocab_size, (rows,), generator=generator).where(labelled, -100)


def preferred(table: Iterable[str], device: str) -> list[str]:
    """Implementations in the order of impl="auto", Triton's last on a CPU: the first row is the one compared with."""
    return sorted(table, key=lambda impl: (impl == "reference", impl == "triton" and device != "cuda"))


class Check:
    """Holds providers to the reference in float64, which is computed when the first of them asks.

    Of inputs with a batch, the first sequences are checked in full, and their results again among all of them.
    """

    def __init__(self, reference: Function, inputs: Sequence[Tensor]) -> None:
        inputs = _first(inputs)
        self.exact = functools.cache(lambda: results(reference, [x.double() for x in inputs]))
        self.plain = functools.cache(lambda: results(reference, inputs))

    def checked(self, function: Function, inputs: Sequence[Tensor], *, transposed: bool = False) -> Call:
        """Forward and backward of the function, once its numbers are right."""
        *arguments, grad_out = inputs
        found = results(function, _first(inputs))
        with torch.no_grad():
            whole = _first([function(*arguments)])[0]
        names = ["result", *(f"gradient of input {place}" for place in range(len(arguments))), "result of all"]
        exact, plain = self.exact(), self.plain()
        triples = zip((*found, whole), (*exact, exact[0]), (*plain, plain[0]), names, strict=True)
        for actual, wanted, eager, name in triples:
            actual = actual.transpose(1, 2) if transposed and actual.ndim == 4 else actual
            assert_within_budget(name, actual.cpu(), wanted, eager, slack=3.0 if "gradient" in name else 2.0)
        gradient = grad_out.to(found[0])
        return lambda: torch.autograd.grad(function(*arguments), arguments, gradient)


def _first(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach()[:_CHECKED].requires_grad_(x.requires_grad) if x.ndim == 4 else x for x in tensors]


def results(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The result, then the gradients of all inputs but the last, which is the result's own gradient."""
    *arguments, grad_out = (x.detach().requires_grad_(x.requires_grad) for x in inputs)
    arguments = [x.requires_grad_() for x in arguments]
    out = function(*arguments)
    return (out.detach(), *torch.autograd.grad(out, arguments, grad_out.to(out)))


def tiny(
    function: Function, inputs: Sequence[Tensor], cut: dict[int, int], bench: Bench, name: str
) -> Callable[[], object] | None:
    """A real call, forward and backward, on the first few tokens and heads of the inputs."""
    if name.startswith("antlm_fast"):
        return None
    if name in NEEDS_COMPILER and not bench.sizes.compiled:
        return not_compiled

    def probe() -> object:
        small = []
        for x in inputs:
            y = x.detach()
            if x.ndim == 4:
                y = y[:1]
                for axis, length in cut.items():
                    y = y.narrow(axis, 0, min(length, y.shape[axis]))
            else:
                y = y.narrow(1, 0, min(2, y.shape[1]))
            small.append(y.contiguous())
        return results(function, small)

    return probe


def not_compiled(*_: object, **__: object) -> Tensor:
    raise Told("nothing is compiled at these sizes, or with --uncompiled; see --sizes full")


def _too_slow(*_: object, **__: object) -> Tensor:
    raise Told("the specification, which is not timed at this length")


def _too_large(*_: object, **__: object) -> Tensor:
    raise Told(f"its gathered tables would take more than {EINSUM_MIB} MiB")
