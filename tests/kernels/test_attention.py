"""Attention: the reference against numbers worked by hand, and every implementation against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from antlm_fast.kernels.attention import attention, attention_varlen
from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.testing.budget import assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOT_COMPUTED = {"triton": (torch.float64,), "native": (torch.float64, torch.float16)}
AWKWARD = (1, 7, 0, 15, 16, 17, 63, 64, 65, 127)


def _column(impl: str, *values: float) -> torch.Tensor:
    """(1, n, 1, 1): one sequence, one head, head_dim 1; in the widest dtype of the implementation."""
    dtype = torch.float32 if impl in NOT_COMPUTED else torch.float64
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


def _assert_is(actual: torch.Tensor, *values: float) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(values, dtype=actual.dtype))


def test_causal_by_hand(impl: str) -> None:
    # scores q_i * k_j with k = (0, ln 3); v = (4, 8).
    # row 0 sees key 0 alone: 4.       row 1, q = 1: weights 1 : 3 over 4 and 8: (4 + 24) / 4 = 7; lse = ln(1 + 3)
    out, lse = attention(
        _column(impl, 1, 1), _column(impl, 0, math.log(3)), _column(impl, 4, 8), causal=True, return_lse=True, impl=impl
    )
    _assert_is(out, 4.0, 7.0)
    _assert_is(lse, 0.0, math.log(4))


def test_bidirectional_and_scale_by_hand(impl: str) -> None:
    # scale 2 and q = 1/2 undo each other in row 0: weights 1 : 3 give 7. Row 1, q = 1: scores 0, 2 ln 3: weights 1 : 9
    # over 4 and 8: (4 + 72) / 10 = 7.6
    out = attention(
        _column(impl, 0.5, 1),
        _column(impl, 0, math.log(3)),
        _column(impl, 4, 8),
        causal=False,
        softmax_scale=2.0,
        impl=impl,
    )
    _assert_is(out, 7.0, 7.6)


def test_visibility_is_aligned_to_the_bottom_right_by_hand(impl: str) -> None:
    # q = 0: a row's result is the mean of the values it sees.
    values, keys = _column(impl, 3, 6, 12), _column(impl, 0, 0, 0)
    # two queries, three keys: row 0 sees two keys, mean 4.5; row 1 sees three, mean 7
    out = attention(_column(impl, 0, 0), keys, values, causal=True, impl=impl)
    _assert_is(out, 4.5, 7.0)
    # four queries, three keys: row 0 sees none (0, lse -inf), then 3, 4.5, 7 with lse ln 1, ln 2, ln 3
    queries = _column(impl, 0, 0, 0, 0)
    out, lse = attention(queries, keys, values, causal=True, return_lse=True, impl=impl)
    _assert_is(out, 0.0, 3.0, 4.5, 7.0)
    _assert_is(lse, -math.inf, 0.0, math.log(2), math.log(3))
    # a prefix of two: rows 0 and 1 see two keys as well
    prefix = torch.tensor([2], dtype=torch.int32)
    out = attention(queries, keys, values, prefix_len=prefix, impl=impl)
    _assert_is(out, 4.5, 4.5, 4.5, 7.0)


def test_gradients_by_hand(impl: str) -> None:
    # one query q = 1, keys (0, ln 3), values (4, 8): p = (1/4, 3/4), out = 7.
    # d out / d v = p;  d out / d k_j = q p_j (v_j - out) = (1/4 * -3, 3/4 * 1);  d out / d q = sum p_j k_j (v_j - out)
    q, k, v = (x.requires_grad_() for x in (_column(impl, 1), _column(impl, 0, math.log(3)), _column(impl, 4, 8)))
    d_q, d_k, d_v = torch.autograd.grad(attention(q, k, v, causal=False, impl=impl).sum(), (q, k, v))
    _assert_is(d_v, 0.25, 0.75)
    _assert_is(d_k, -0.75, 0.75)
    _assert_is(d_q, 0.75 * math.log(3))


def test_key_heads_serve_neighbouring_query_heads_by_hand(impl: str) -> None:
    # four query heads, two key heads with values 1 and 2: heads 0 and 1 read the first, 2 and 3 the second
    q, k = torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 2, 1)
    out = attention(q, k, torch.tensor([1.0, 2.0]).view(1, 1, 2, 1), causal=False, impl=impl)
    assert out.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def _results(
    tensors: list[torch.Tensor], dtype: torch.dtype, impl: str, packed: tuple[Any, ...], **options: Any
) -> dict[str, torch.Tensor]:
    """Output, lse and gradients for given q, k, v and upstream gradient, computed in a dtype."""
    q, k, v, upstream = (x.to(dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    op = attention_varlen if packed else attention
    out = op(*inputs, *packed, **options, impl=impl)
    gradients = torch.autograd.grad(out, inputs, upstream)
    # lse changes the way a call goes, so it is asked for apart
    with torch.no_grad():
        again, lse = op(*inputs, *packed, **options, return_lse=True, impl=impl)
    assert out.dtype == again.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    names = ("out", "out (no grad, with lse)", "lse", "d_q", "d_k", "d_v")
    return dict(zip(names, (out.detach(), again, lse, *gradients), strict=True))


def _assert_all_within_budget(
    tensors: list[torch.Tensor], dtype: torch.dtype, impl: str, packed: tuple[Any, ...] = (), **options: Any
) -> None:
    if dtype in NOT_COMPUTED.get(impl, ()):
        with pytest.raises(UnsupportedError, match=f"not {str(dtype).removeprefix('torch.')}"):
            _results(tensors, dtype, impl, packed, **options)
        return
    # the exact result is that of the inputs as the dtype holds them
    tensors = [x.to(dtype).double() for x in tensors]
    exact = _results(tensors, torch.float64, "reference", packed, **options)
    actual = _results(tensors, dtype, impl, packed, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)
        return
    eager = _results(tensors, dtype, "reference", packed, **options)
    # the softmax of one key is 1 whatever the score: its gradients are exactly 0, the difference of terms that are not
    largest = max(
        (x.abs().max().item() for name, x in exact.items() if name.startswith("d_") and x.numel()), default=0.0
    )
    for name, wanted in exact.items():
        slack = 3.0 if name.startswith("d_") else 2.0
        scale = largest if name.startswith("d_") and not wanted.any() else 0.0
        assert_within_budget(name, actual[name], wanted, eager[name], slack, scale=scale)


def _tensors(shape_q: tuple[int, ...], shape_k: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in (shape_q, shape_k, shape_k, shape_q)]


def _flags(kind: str, num_seqs: int) -> dict[str, Any]:
    index = torch.arange(num_seqs)
    return {
        "causal": {"causal": True},
        "full": {"causal": False},
        "one tensor flag": {"causal": torch.tensor(True)},
        "mixed": {"causal": index % 2 == 0},
        "prefix": {"prefix_len": (5 * index - 3).to(torch.int32)},
    }[kind]


KINDS = ("causal", "full", "one tensor flag", "mixed", "prefix")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_matches_reference(impl: str, kind: str, dtype: torch.dtype) -> None:
    _assert_all_within_budget(_tensors((4, 33, 4, 16), (4, 33, 2, 16)), dtype, impl, **_flags(kind, 4))


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 1), (1, 17), (17, 1), (15, 64), (65, 16), (7, 0), (0, 7)])
@pytest.mark.parametrize("kind", ["causal", "full", "prefix"])
def test_dense_with_other_numbers_of_keys(impl: str, kind: str, len_q: int, len_k: int) -> None:
    _assert_all_within_budget(_tensors((3, len_q, 2, 8), (3, len_k, 1, 8)), torch.float32, impl, **_flags(kind, 3))


def _packed(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> tuple[Any, ...]:
    starts = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k)]
    return (*starts, max(lengths_q), max(lengths_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_matches_reference_on_awkward_lengths(impl: str, kind: str, dtype: torch.dtype) -> None:
    """Every awkward length, an empty sequence, and three slack rows."""
    total = sum(AWKWARD) + 3
    tensors = _tensors((total, 2, 16), (total, 1, 16))
    _assert_all_within_budget(tensors, dtype, impl, _packed(AWKWARD, AWKWARD), **_flags(kind, len(AWKWARD)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_with_other_numbers_of_keys(impl: str, kind: str, dropout_p: float) -> None:
    """Longer, shorter and no keys; no queries; more slack on one side than on the other."""
    lengths_q, lengths_k = (7, 16, 0, 17, 5, 0, 40), (16, 7, 9, 17, 0, 0, 3)
    tensors = _tensors((sum(lengths_q) + 2, 2, 8), (sum(lengths_k) + 5, 2, 8))
    options = {**_flags(kind, 7), "dropout_p": dropout_p, "dropout_seed": 9}
    _assert_all_within_budget(tensors, torch.float32, impl, _packed(lengths_q, lengths_k), **options)


@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes_and_groups(impl: str, head_dim: int, group: int, dtype: torch.dtype) -> None:
    tensors = _tensors((40, 4, head_dim), (40, 4 // group, head_dim))
    _assert_all_within_budget(tensors, dtype, impl, _packed((17, 23), (17, 23)), **_flags("mixed", 2))


def test_a_sequence_too_long_to_keep_its_probabilities(impl: str) -> None:
    """Past the length at which the plain-torch implementation changes its way, beside a short one."""
    lengths = (400, 9)
    tensors = _tensors((409, 1, 8), (409, 1, 8))
    for kind in ("causal", "prefix", "full"):
        _assert_all_within_budget(tensors, torch.float32, impl, _packed(lengths, lengths), **_flags(kind, 2))
    prefix = torch.tensor([300, 2], dtype=torch.int32)
    _assert_all_within_budget(tensors, torch.float32, impl, _packed(lengths, lengths), prefix_len=prefix)


@pytest.mark.parametrize("kind", ["causal", "full", "prefix"])
def test_gradcheck(impl: str, kind: str) -> None:
    if impl in NOT_COMPUTED:
        pytest.skip(f"gradcheck needs float64, which {impl} does not compute")
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, length, heads, 3, dtype=torch.float64, requires_grad=True)
        for length, heads in ((5, 2), (4, 1), (4, 1))
    )
    flags = _flags(kind, 2)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **flags, impl=impl), (q, k, v))
    dropped = {**flags, "dropout_p": 0.4, "dropout_seed": 1}
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **dropped, impl=impl), (q, k, v))


OPTIONS: dict[str, tuple[Any, Any]] = {
    "causal": (True, False),
    "softmax_scale": (None, 0.5),
    "dropout_p": (0.0, 0.5),
    "dropout_seed": (1, 2),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_every_implementation(impl: str, option: str) -> None:
    q, k, v, _ = (x.float() for x in _tensors((2, 9, 2, 8), (2, 9, 2, 8)))
    packed = _packed((9, 9), (9, 9))
    base = {"causal": True, "dropout_p": 0.5 if option == "dropout_seed" else 0.0, "dropout_seed": 1}
    dense, varlen = [], []
    for value in OPTIONS[option]:
        options = {**base, option: value}
        dense.append(attention(q, k, v, **options, impl=impl))
        varlen.append(attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *packed, **options, impl=impl))
    assert (dense[0] - dense[1]).abs().max() > 1e-2, f"{impl} ignores {option}"
    assert (varlen[0] - varlen[1]).abs().max() > 1e-2, f"{impl} ignores {option} when packed"
    for a, b in zip(dense, varlen, strict=True):
        torch.testing.assert_close(a.flatten(0, 1), b, msg=lambda text: f"dense and packed differ: {text}")
