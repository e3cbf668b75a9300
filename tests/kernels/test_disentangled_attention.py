"""Disentangled attention: the reference against numbers worked by hand, every implementation against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from antlm_fast.kernels.disentangled_attention import (
    disentangled_attention,
    disentangled_attention_varlen,
    relative_bucket,
)
from antlm_fast.kernels.disentangled_attention.buckets import last_distances
from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.testing.budget import assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOT_COMPUTED = {"triton": (torch.float64,), "native": (torch.float64, torch.float16)}
TERMS = ("both", "q_rel", "k_rel", "none")
KINDS = ("causal", "full", "one tensor flag", "mixed", "prefix")
GRADIENTS = ("d_q", "d_k", "d_v", "d_q_rel", "d_k_rel")


@pytest.mark.parametrize(
    ("distance", "bucket"),
    # mid = 16 of 32 buckets and 512 positions: near distances stand for themselves;
    # 24: ceil(15 * ln(24/16) / ln(511/16)) + 16 = ceil(1.76) + 16 = 18; 511: ceil(15) + 16 = 31; beyond: the same
    [
        *((0, 0), (1, 1), (16, 16), (17, 17), (18, 17), (24, 18), (32, 20), (64, 23), (128, 26), (256, 29)),
        *((511, 31), (512, 31), (10**9, 31)),
    ],
)
def test_buckets_of_ltg_bert(distance: int, bucket: int) -> None:
    found = relative_bucket(torch.tensor([distance, -distance]))
    assert found.tolist() == [bucket, -bucket]


@pytest.mark.parametrize(
    ("bucket_size", "max_position"),
    [(32, 512), (32, 128), (64, 512), (8, 16), (48, 1024), (5, 9), (3, 7), (2, 512), (32, 16), (32, 17), (32, 18)],
)
def test_buckets_of_other_sizes(bucket_size: int, max_position: int) -> None:
    """Against the formula in float64, whose logarithms are near a whole number only at the last distance."""
    distance = torch.arange(-2 * max_position, 2 * max_position)
    found = relative_bucket(distance, bucket_size=bucket_size, max_position=max_position)
    assert found.diff().min() >= 0
    mid = bucket_size // 2
    for r, bucket in zip(distance.tolist(), found.tolist(), strict=True):
        size = min(abs(r), max_position - 1)
        if size > mid:
            fraction = (mid - 1) * math.log(size / mid) / math.log((max_position - 1) / mid)
            size = math.ceil(fraction - 1e-9) + mid
        assert bucket == int(math.copysign(size, r)), r
    assert found.abs().max() < bucket_size


@pytest.mark.parametrize(("name", "value", "error"), [("bucket_size", 1, ValueError), ("max_position", 1.5, TypeError)])
def test_bucket_sizes_that_cannot_be(name: str, value: Any, error: type[Exception]) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(error, match=f"{name} must be"):
        relative_bucket(torch.tensor([1]), **options)
    with pytest.raises(TypeError, match="distance must be an integer tensor"):
        relative_bucket(torch.tensor([1.0]))


def _column(impl: str, *values: float) -> torch.Tensor:
    """(n, 1, 1): one head, head_dim 1; in the widest dtype of the implementation."""
    return torch.tensor(values, dtype=torch.float32 if impl in NOT_COMPUTED else torch.float64).view(-1, 1, 1)


def _assert_is(actual: torch.Tensor, *values: float) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(values, dtype=actual.dtype))


def test_by_hand(relative_impl: str) -> None:
    # two buckets (B = 2): row 0 of a table is for keys after the query, row 1 for its own, row 2 for keys before it.
    # q = (1, 1), k = (0, ln 2), k_rel = (ln 2, 0, ln 5), q_rel = (log2 3, 0, log2 7), scale 1; v = (4, 8)
    # row 0, key 0 (itself):  q.k + q.k_rel[1] + k.q_rel[1] = 0 + 0 + 0             weight 1
    # row 0, key 1 (after):   ln 2 + ln 2 + ln 2 * log2 3 = ln 2 + ln 2 + ln 3      weight 12
    # row 1, key 0 (before):  0 + ln 5 + 0 * log2 7                                 weight 5
    # row 1, key 1 (itself):  ln 2 + 0 + 0                                          weight 2
    q, k = _column(relative_impl, 1, 1), _column(relative_impl, 0, math.log(2))
    v = _column(relative_impl, 4, 8)
    k_rel = _column(relative_impl, math.log(2), 0, math.log(5))
    q_rel = _column(relative_impl, math.log2(3), 0, math.log2(7))
    starts = torch.tensor([0, 2], dtype=torch.int32)
    options: dict[str, Any] = {"max_position": 2, "softmax_scale": 1.0, "impl": relative_impl}

    def attend(q_rel: torch.Tensor | None, k_rel: torch.Tensor | None, causal: bool = False) -> Any:
        return disentangled_attention_varlen(
            q, k, v, q_rel, k_rel, starts, starts, 2, 2, causal=causal, return_lse=True, **options
        )

    out, lse = attend(q_rel, k_rel)
    _assert_is(out, 100 / 13, 36 / 7)
    _assert_is(lse, math.log(13), math.log(7))
    out, lse = attend(q_rel, k_rel, causal=True)
    _assert_is(out, 4, 36 / 7)
    _assert_is(lse, 0, math.log(7))
    _assert_is(attend(q_rel, None)[0], 52 / 7, 20 / 3)  # 1 : 6 and 1 : 2
    _assert_is(attend(None, k_rel)[0], 36 / 5, 36 / 7)  # 1 : 4 and 5 : 2
    _assert_is(attend(None, None)[0], 20 / 3, 20 / 3)  # 1 : 2
    # the second query alone: the last place without positions, place 1 with them
    one = torch.tensor([0, 1], dtype=torch.int32)
    for positions in (None, torch.tensor([1], dtype=torch.int32)):
        out = disentangled_attention_varlen(
            q[1:], k, v, q_rel, k_rel, one, starts, 1, 2, causal=True, positions_q=positions, **options
        )
        _assert_is(out, 36 / 7)


def test_the_scale_counts_the_terms_by_hand(relative_impl: str) -> None:
    # one query before two keys, q = 1, k = (0, s ln 3) with s = sqrt(terms): weights 1 : 3 over 4 and 8, so 7
    table = _column(relative_impl, 0, 0, 0)
    for q_rel, k_rel, terms in ((table, table, 3), (table, None, 2), (None, table, 2), (None, None, 1)):
        out = disentangled_attention(
            _column(relative_impl, 1)[None],
            _column(relative_impl, 0, math.sqrt(terms) * math.log(3))[None],
            _column(relative_impl, 4, 8)[None],
            q_rel,
            k_rel,
            causal=False,
            impl=relative_impl,
        )
        _assert_is(out, 7)


def _results(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, impl: str, packed: tuple[Any, ...], **options: Any
) -> dict[str, torch.Tensor]:
    """Output, lse and gradients for given inputs and upstream gradient, computed in a dtype."""
    inputs = {name: x.to(dtype).requires_grad_() for name, x in tensors.items() if name != "upstream"}
    arguments = (*(inputs.get(name) for name in ("q", "k", "v", "q_rel", "k_rel")), *packed)
    op: Any = disentangled_attention_varlen if packed else disentangled_attention
    out = op(*arguments, **options, impl=impl)
    gradients = torch.autograd.grad(out, list(inputs.values()), tensors["upstream"].to(dtype))
    with torch.no_grad():
        again, lse = op(*arguments, **options, return_lse=True, impl=impl)
    assert out.dtype == again.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    named = {f"d_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"out": out.detach(), "out (no grad, with lse)": again, "lse": lse, **named}


def _assert_all_within_budget(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, impl: str, packed: tuple[Any, ...] = (), **options: Any
) -> None:
    if dtype in NOT_COMPUTED.get(impl, ()):
        with pytest.raises(UnsupportedError, match=f"not {str(dtype).removeprefix('torch.')}"):
            _results(tensors, dtype, impl, packed, **options)
        return
    # the exact result is that of the inputs as the dtype holds them
    tensors = {name: x.to(dtype).double() for name, x in tensors.items()}
    exact = _results(tensors, torch.float64, "reference", packed, **options)
    actual = _results(tensors, dtype, impl, packed, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
        return
    eager = _results(tensors, dtype, "reference", packed, **options)
    # where a softmax is over one key the gradients are exactly 0, the difference of terms that are not
    largest = max(exact[name].abs().max().item() for name in GRADIENTS if name in exact and exact[name].numel())
    for name, wanted in exact.items():
        scale = largest if name in GRADIENTS and not wanted.any() else 0.0
        assert_within_budget(name, actual[name], wanted, eager[name], 3.0 if name in GRADIENTS else 2.0, scale=scale)


def _tensors(
    shape_q: tuple[int, ...], shape_k: tuple[int, ...], bucket_size: int = 32, terms: str = "both"
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"q": shape_q, "k": shape_k, "v": shape_k, "upstream": shape_q}
    tables = {"both": ("q_rel", "k_rel"), "none": ()}.get(terms, (terms,))
    shapes |= dict.fromkeys(tables, (2 * bucket_size - 1, *shape_q[-2:]))
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def _flags(kind: str, num_seqs: int) -> dict[str, Any]:
    index = torch.arange(num_seqs)
    return {
        "causal": {"causal": True},
        "full": {"causal": False},
        "one tensor flag": {"causal": torch.tensor(True)},
        "mixed": {"causal": index % 2 == 0},
        "prefix": {"prefix_len": (5 * index - 3).to(torch.int32)},
    }[kind]


def _packed(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    both = (lengths_q, lengths_q if lengths_k is None else lengths_k)
    starts = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in both]
    return (*starts, *(max(lengths) for lengths in both))


@pytest.mark.parametrize(
    ("dtype", "terms", "kind"),
    [
        *((torch.float32, terms, kind) for terms in TERMS for kind in KINDS),
        *((dtype, terms, "mixed") for dtype in DTYPES if dtype != torch.float32 for terms in TERMS),
    ],
    ids=str,
)
def test_dense_matches_reference(relative_impl: str, terms: str, kind: str, dtype: torch.dtype) -> None:
    tensors = _tensors((4, 33, 2, 16), (4, 33, 2, 16), 8, terms)
    _assert_all_within_budget(tensors, dtype, relative_impl, max_position=16, **_flags(kind, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_awkward_lengths(relative_impl: str, kind: str, dtype: torch.dtype) -> None:
    """Lengths about the first buckets, and an empty sequence, three slack rows."""
    lengths = (1, 31, 0, 32, 33, 130)
    total = sum(lengths) + 3
    tensors = _tensors((total, 2, 16), (total, 2, 16))
    _assert_all_within_budget(tensors, dtype, relative_impl, _packed(lengths), **_flags(kind, len(lengths)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "kind"), [(511, "full"), (513, "causal"), (513, "full")])
def test_lengths_about_the_last_bucket(long_relative_impl: str, length: int, kind: str, dtype: torch.dtype) -> None:
    tensors = _tensors((length, 1, 16), (length, 1, 16))
    _assert_all_within_budget(tensors, dtype, long_relative_impl, _packed((length,)), **_flags(kind, 1))


@pytest.mark.parametrize("term", ["q_rel", "k_rel"])
def test_lengths_about_every_bucket_edge(relative_impl: str, term: str) -> None:
    """A sequence that just has no distance of a bucket, one that has a single one, one that has two."""
    ends = last_distances(32, 512)
    far = [length for last in ends[16:-1] for length in (last + 1, last + 2, last + 3)]
    lengths = tuple(dict.fromkeys(length for length in far if length < 140))
    tensors = _tensors((sum(lengths), 1, 16), (sum(lengths), 1, 16), 32, term)
    _assert_all_within_budget(tensors, torch.float32, relative_impl, _packed(lengths), causal=False)
    # the same edges nearer by: every length up to 20 with the last bucket from 15 on
    lengths = tuple(range(1, 21))
    tensors = _tensors((sum(lengths), 1, 16), (sum(lengths), 1, 16), 8, term)
    _assert_all_within_budget(tensors, torch.float32, relative_impl, _packed(lengths), causal=False, max_position=16)


@pytest.mark.parametrize(("bucket_size", "max_position"), [(5, 9), (3, 7), (2, 2), (16, 8), (40, 64)])
def test_other_tables(relative_impl: str, bucket_size: int, max_position: int) -> None:
    """Odd sizes have rows that no distance uses; they get no gradient."""
    tensors = _tensors((53, 2, 8), (53, 2, 8), bucket_size)
    packed = _packed((17, 3, 33))
    flags = _flags("mixed", 3)
    _assert_all_within_budget(tensors, torch.float32, relative_impl, packed, max_position=max_position, **flags)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_with_other_numbers_of_keys(relative_impl: str, kind: str, dropout_p: float) -> None:
    """Longer, shorter and no keys; no queries; more slack on one side than on the other."""
    lengths_q, lengths_k = (7, 16, 0, 17, 5, 0, 40), (16, 7, 9, 17, 0, 0, 3)
    tensors = _tensors((sum(lengths_q) + 2, 2, 8), (sum(lengths_k) + 5, 2, 8), 8)
    options = {**_flags(kind, 7), "max_position": 16, "dropout_p": dropout_p, "dropout_seed": 9}
    _assert_all_within_budget(tensors, torch.float32, relative_impl, _packed(lengths_q, lengths_k), **options)


@pytest.mark.parametrize("head_dim", [16, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(relative_impl: str, head_dim: int, dtype: torch.dtype) -> None:
    tensors = _tensors((60, 3, head_dim), (60, 3, head_dim))
    _assert_all_within_budget(tensors, dtype, relative_impl, _packed((23, 37)), dropout_p=0.1, dropout_seed=3,
                              **_flags("mixed", 2))  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_other_scales(relative_impl: str, scale: float) -> None:
    tensors = _tensors((40, 2, 8), (40, 2, 8), 8)
    options = {"max_position": 16, "softmax_scale": scale, **_flags("mixed", 2)}
    _assert_all_within_budget(tensors, torch.float32, relative_impl, _packed((17, 23)), **options)


def test_a_sequence_too_long_to_keep_its_probabilities(long_relative_impl: str) -> None:
    """Past the length at which the plain-torch implementation changes its way, beside a short one."""
    lengths = (400, 9)
    tensors = _tensors((409, 1, 8), (409, 1, 8))
    for flags in (*(_flags(kind, 2) for kind in ("causal", "full")), {"prefix_len": torch.tensor([300, 2]).int()}):
        _assert_all_within_budget(tensors, torch.float32, long_relative_impl, _packed(lengths), **flags)


@pytest.mark.parametrize("kind", ["causal", "full", "mixed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_queries_of_some_rows_are_those_rows(relative_impl: str, kind: str, dropout_p: float) -> None:
    """Output, lse and gradients of a few rows, asked for alone and among all (dropout's mask included)."""
    lengths = (9, 0, 33, 4, 20)
    tensors = {name: x.float() for name, x in _tensors((66, 2, 8), (66, 2, 8), 8).items()}
    inputs = {name: tensors[name].requires_grad_() for name in ("q", "k", "v", "q_rel", "k_rel")}
    rows = torch.tensor([0, 4, 8, 9, 10, 30, 41, 44, 65])
    starts = torch.tensor([0, 3, 3, 7, 8, 9], dtype=torch.int32)
    positions = torch.tensor([0, 4, 8, 0, 1, 21, 32, 2, 19], dtype=torch.int32)
    options: dict[str, Any] = {"max_position": 16, "dropout_p": dropout_p, "dropout_seed": 5, "return_lse": True}
    options |= {**_flags(kind, 5), "impl": relative_impl}
    cu, longest = _packed(lengths)[0], max(lengths)
    whole, whole_lse = disentangled_attention_varlen(*inputs.values(), cu, cu, longest, longest, **options)
    q, *others = inputs.values()
    some, some_lse = disentangled_attention_varlen(
        q[rows], *others, starts, cu, 4, longest, positions_q=positions, **options
    )
    torch.testing.assert_close(some, whole[rows])
    torch.testing.assert_close(some_lse, whole_lse[:, rows])
    upstream = tensors["upstream"][rows]
    wanted = torch.autograd.grad(whole[rows], list(inputs.values()), upstream)
    found = torch.autograd.grad(some, list(inputs.values()), upstream)
    for name, a, b in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"d_{name}: {text}")


@pytest.mark.parametrize("kind", ["causal", "full", "prefix"])
@pytest.mark.parametrize("terms", ["both", "q_rel", "k_rel"])
def test_gradcheck(relative_impl: str, kind: str, terms: str) -> None:
    if relative_impl in NOT_COMPUTED:
        pytest.skip(f"gradcheck needs float64, which {relative_impl} does not compute")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 3, dtype=torch.float64, requires_grad=True) for length in (7, 6, 6))
    tables = [torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    flags = _flags(kind, 2)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor, **dropped: Any) -> Any:
        q_rel, k_rel = {"both": tables, "q_rel": (tables[0], None), "k_rel": (None, tables[0])}[terms]
        return disentangled_attention(q, k, v, q_rel, k_rel, max_position=5, **flags, **dropped, impl=relative_impl)

    inputs = (q, k, v, *(tables if terms == "both" else tables[:1]))
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, dropout_p=0.4, dropout_seed=1), inputs)


OPTIONS: dict[str, tuple[Any, Any]] = {
    "causal": (True, False),
    "max_position": (8, 16),
    "softmax_scale": (None, 0.5),
    "dropout_p": (0.0, 0.5),
    "dropout_seed": (1, 2),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_every_implementation(relative_impl: str, option: str) -> None:
    tensors = {name: x.float() for name, x in _tensors((2, 20, 2, 8), (2, 20, 2, 8), 8).items()}
    arguments = [tensors[name] for name in ("q", "k", "v", "q_rel", "k_rel")]
    base = {"causal": True, "dropout_p": 0.5 if option == "dropout_seed" else 0.0, "dropout_seed": 1}
    results = []
    for value in OPTIONS[option]:
        options = {**base, option: value, "impl": relative_impl}
        results.append(disentangled_attention(*arguments, **options))
        flat = [x.flatten(0, 1) for x in arguments[:3]] + arguments[3:]
        packed = disentangled_attention_varlen(*flat, *_packed((20, 20)), **options)
        torch.testing.assert_close(packed, results[-1].flatten(0, 1), msg=lambda text: f"dense and packed: {text}")
    assert (results[0] - results[1]).abs().max() > 1e-2, f"{relative_impl} ignores {option}"
