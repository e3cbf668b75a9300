"""The operations by themselves: attention and linear cross-entropy, each beside what torch offers for it.

Every provider's result and gradients are held to the float64 reference, within the error that plain code of the same
dtype makes on the same inputs, before it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from harness import Call, Provider, Row, measure
from sizes import DTYPES, Sizes
from torch import Tensor
from torch.nn import functional as F

from antlm_fast.kernels.attention import attention
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.testing.budget import assert_within_budget

Function = Callable[..., Tensor]


def peak(sizes: Sizes) -> Iterator[list[Row]]:
    """Square matrix products: what the machine gives torch just now."""
    side = sizes.gemm_side

    def prepare(dtype: torch.dtype) -> Call:
        a, b, out = (torch.randn(side, side).to(dtype) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)

    providers = [
        Provider(
            case=name,
            name="torch.mm",
            prepare=functools.partial(prepare, dtype),
            amount=2 * side**3 / 1e9,
            unit="GFLOP/s",
        )
        for name, dtype in DTYPES.items()
    ]
    yield measure("peak", f"GEMM {side} x {side} x {side}", providers, rounds=sizes.rounds, warmup=2)


def attention_suite(sizes: Sizes) -> Iterator[list[Row]]:
    """Forward and backward; each provider gets q, k, v laid out as it takes them, without a copy."""
    for batch, heads, seqlen, head_dim in sizes.attention:
        for dtype_name, dtype in DTYPES.items():
            generator = torch.Generator().manual_seed(0)
            tensors = [torch.randn(batch, seqlen, heads, head_dim, generator=generator).to(dtype) for _ in range(4)]
            ours = [x.requires_grad_(place < 3) for place, x in enumerate(tensors)]  # q, k, v and out's gradient
            heads_first = [
                x.detach().transpose(1, 2).contiguous().requires_grad_(place < 3) for place, x in enumerate(ours)
            ]
            providers = []
            for causal in (True, False):
                reference = functools.partial(attention, causal=causal, impl="reference")
                exact = functools.cache(functools.partial(_results, reference, [x.double() for x in tensors]))
                eager = functools.cache(functools.partial(_results, reference, tensors))
                ways: dict[str, tuple[Function, list[Tensor], bool]] = {
                    "antlm_fast torch": (functools.partial(attention, causal=causal, impl="torch"), ours, False),
                    "antlm_fast triton": (functools.partial(attention, causal=causal, impl="triton"), ours, False),
                    "SDPA": (functools.partial(F.scaled_dot_product_attention, is_causal=causal), heads_first, True),
                    "eager bmm + softmax": (functools.partial(_eager_attention, causal=causal), heads_first, True),
                }
                for name, (function, inputs, transposed) in ways.items():
                    providers.append(
                        Provider(
                            case="causal" if causal else "full",
                            name=name,
                            prepare=functools.partial(_checked, function, inputs, exact, eager, transposed=transposed),
                            # 2 products forward, 4 backward; a causal mask leaves half
                            amount=12 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1) / 1e9,
                            unit="GFLOP/s",
                        )
                    )
            shape = f"B,H,T,D {batch},{heads},{seqlen},{head_dim}, {dtype_name}, forward + backward"
            yield measure("attention", shape, providers, rounds=sizes.rounds)


def cross_entropy_suite(sizes: Sizes) -> Iterator[list[Row]]:
    """Head and loss, forward and backward, with all rows labelled (CLM) and with 15 % (MLM)."""
    rows, hidden_size, vocab_size = sizes.cross_entropy
    for dtype_name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype).requires_grad_()
        weight = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype)
        inputs = [hidden, weight.requires_grad_(), torch.ones(())]
        providers = []
        for share in (1.0, 0.15):
            labelled = torch.rand(rows, generator=generator) < share
            targets = torch.randint(vocab_size, (rows,), generator=generator).where(labelled, -100)
            reference = functools.partial(linear_cross_entropy, targets=targets, impl="reference")
            exact = functools.cache(functools.partial(_results, reference, [x.double() for x in inputs]))
            eager = functools.cache(functools.partial(_results, reference, inputs))
            ways: dict[str, Function] = {
                "antlm_fast torch": functools.partial(linear_cross_entropy, targets=targets, impl="torch"),
                "logits of all rows": functools.partial(_full_logits, targets=targets),
                "torch chunked, labelled rows": functools.partial(_of_labelled_rows, _torch_chunked, targets=targets),
            }
            if share < 1.0:
                ways["logits of labelled rows"] = functools.partial(_of_labelled_rows, _full_logits, targets=targets)
            providers += [
                Provider(
                    case=f"{share:.0%} labelled",
                    name=name,
                    prepare=functools.partial(_checked, function, inputs, exact, eager),
                    amount=6 * int(labelled.sum()) * hidden_size * vocab_size / 1e9,  # of labelled rows alone
                    unit="GFLOP/s",
                )
                for name, function in ways.items()
            ]
        shape = f"rows,hidden,vocab {rows},{hidden_size},{vocab_size}, {dtype_name}, forward + backward"
        yield measure("cross_entropy", shape, providers, rounds=sizes.rounds)


def _results(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The result, then the gradients of all inputs but the last, which is the result's own gradient."""
    *arguments, grad_out = (x.detach().requires_grad_(x.requires_grad) for x in inputs)
    out = function(*arguments)
    return (out.detach(), *torch.autograd.grad(out, arguments, grad_out.to(out.dtype)))


def _checked(
    function: Function,
    inputs: list[Tensor],
    exact: Callable[[], tuple[Tensor, ...]],
    eager: Callable[[], tuple[Tensor, ...]],
    *,
    transposed: bool = False,
) -> Call:
    found = _results(function, inputs)
    for place, (actual, wanted, plain) in enumerate(zip(found, exact(), eager(), strict=True)):
        name = f"gradient of input {place - 1}" if place else "result"
        assert_within_budget(
            name, actual.transpose(1, 2) if transposed else actual, wanted, plain, slack=3.0 if place else 2.0
        )
    *arguments, grad_out = inputs
    gradient = grad_out.to(found[0].dtype)
    return lambda: torch.autograd.grad(function(*arguments), arguments, gradient)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def _full_logits(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _torch_chunked(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    """torch's own linear_cross_entropy (torch >= 2.13); without options it is the logits of all rows."""
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def _of_labelled_rows(function: Function, hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
    kept = (targets != -100).nonzero().squeeze(1)
    return function(hidden.index_select(0, kept), weight, targets=targets.index_select(0, kept))
