"""What must hold of attention whatever the numbers: isolation, no leakage, live flags, determinism, dropout's law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from antlm_fast.kernels.attention import attention, attention_varlen
from antlm_fast.kernels.attention.torch_plan import device_plan, host_plan

LENGTHS = (5, 0, 17, 5, 33)


def _inputs(total: int, heads: int = 2, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(total, n, 8) for n in (heads, kv_heads, kv_heads))
    return q, k, v


def _packed(lengths: tuple[int, ...] = LENGTHS) -> tuple[Any, ...]:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return starts, starts, max(lengths), max(lengths)


def _changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).flatten(1).any(1).nonzero().flatten().tolist()


def test_a_later_token_never_changes_an_earlier_causal_row(impl: str) -> None:
    q, k, v = _inputs(20)
    before = attention_varlen(q, k, v, *_packed((20,)), causal=True, impl=impl)
    for changed in (0, 11, 19):
        k2, v2 = k.clone(), v.clone()
        k2[changed], v2[changed] = 5.0, -5.0
        after = attention_varlen(q, k2, v2, *_packed((20,)), causal=True, impl=impl)
        assert _changed_rows(before, after) == list(range(changed, 20))


def test_a_prefix_token_changes_every_row_and_a_later_one_only_what_follows(impl: str) -> None:
    q, k, v = _inputs(20)
    prefix = torch.tensor([8], dtype=torch.int32)
    before = attention_varlen(q, k, v, *_packed((20,)), prefix_len=prefix, impl=impl)
    for changed, wanted in ((7, range(20)), (8, range(8, 20))):
        v2 = v.clone()
        v2[changed] = -5.0
        after = attention_varlen(q, k, v2, *_packed((20,)), prefix_len=prefix, impl=impl)
        assert _changed_rows(before, after) == list(wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_never_see_each_other(impl: str, causal: bool) -> None:
    """Rows 5..21 are the third sequence; the gradient says the same from the other end."""
    q, k, v = (x.requires_grad_() for x in _inputs(60))
    before = attention_varlen(q, k, v, *_packed(), causal=causal, impl=impl)
    gradients = torch.autograd.grad(before[5:22].square().sum(), (q, k, v))
    for gradient in gradients:
        rows = _changed_rows(gradient, torch.zeros_like(gradient))
        # a causal first row sees one key, whatever its score: its query has no gradient
        assert set(rows) - {5} == set(range(6, 22))
    # gradients are asked for again, because a call without them may round otherwise
    changed = [torch.cat([x[:5], x[5:22] + 1.0, x[22:]]) for x in (q, k, v)]
    assert _changed_rows(before, attention_varlen(*changed, *_packed(), causal=causal, impl=impl)) == list(range(5, 22))


def test_packed_is_each_sequence_alone(impl: str) -> None:
    q, k, v = _inputs(60)
    flags = torch.tensor([True, False, False, True, True])
    together = attention_varlen(q, k, v, *_packed(), causal=flags, impl=impl)
    start = 0
    for length, flag in zip(LENGTHS, flags.tolist(), strict=True):
        rows = slice(start, start + length)
        alone = attention(*(x[None, rows] for x in (q, k, v)), causal=flag, impl=impl)[0]
        torch.testing.assert_close(together[rows], alone)
        start += length


@pytest.mark.parametrize("name", ["causal", "prefix_len", "one flag"])
def test_a_flag_changed_in_place_changes_the_next_call(impl: str, name: str) -> None:
    q, k, v = (x.view(3, 20, 2, 8) for x in _inputs(60))
    if name == "prefix_len":
        flag, option = torch.zeros(3, dtype=torch.int32), "prefix_len"
    else:
        flag, option = torch.ones(() if name == "one flag" else 3, dtype=torch.bool), "causal"
    options: dict[str, Any] = {option: flag}
    torch.testing.assert_close(attention(q, k, v, **options, impl=impl), attention(q, k, v, causal=True, impl=impl))
    flag.fill_(20 if name == "prefix_len" else False)
    torch.testing.assert_close(attention(q, k, v, **options, impl=impl), attention(q, k, v, causal=False, impl=impl))


def test_flipping_one_sequence_changes_only_that_sequence(impl: str) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(60))
    results = []
    for third in (True, False):
        flags = torch.tensor([True, False, third, False, True])
        out = attention_varlen(q, k, v, *_packed(), causal=flags, impl=impl)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for first, second in zip(*results, strict=True):
        rows = (~torch.isclose(first, second, rtol=1e-5, atol=1e-6)).flatten(1).any(1).nonzero().flatten().tolist()
        assert rows
        assert set(rows) <= set(range(5, 22))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_twice_is_bitwise_equal(impl: str, dropout_p: float) -> None:
    inputs = [x.requires_grad_() for x in _inputs(60, heads=4)]
    flags = torch.tensor([True, False, False, True, True])
    outs = [
        attention_varlen(*inputs, *_packed(), causal=flags, dropout_p=dropout_p, dropout_seed=4, impl=impl)
        for _ in range(2)
    ]
    assert torch.equal(*outs)
    first = torch.autograd.grad(outs[0].square().sum(), inputs, retain_graph=True)
    for again in (
        torch.autograd.grad(outs[0].square().sum(), inputs),
        torch.autograd.grad(outs[1].square().sum(), inputs),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_that_see_nothing_give_and_get_nothing(impl: str) -> None:
    """Eight queries over five keys: rows 0, 1 and 2 come before the first key."""
    q, k, v = _inputs(8)
    inputs = [
        q[None].clone().requires_grad_(),
        k[None, :5].clone().requires_grad_(),
        v[None, :5].clone().requires_grad_(),
    ]
    out, lse = attention(*inputs, causal=True, return_lse=True, impl=impl)
    assert not out[0, :3].any()
    assert torch.equal(lse[0, :, :3], torch.full((2, 3), -torch.inf))
    assert torch.isfinite(lse[0, :, 3:]).all()
    assert not lse.requires_grad
    upstream = torch.ones_like(out)
    gradients = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    assert not gradients[0][0, :3].any()
    upstream[0, :3] = 1e6
    again = torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_slack_rows_are_written_and_never_read(impl: str) -> None:
    """Three rows past the last sequence hold NaN; results and gradients there are 0, elsewhere as without them."""
    clean = [x.requires_grad_() for x in _inputs(60)]
    dirty = [torch.cat([x.detach(), torch.full((3, 2, 8), torch.nan)]).requires_grad_() for x in clean]
    wanted = attention_varlen(*clean, *_packed(), causal=True, impl=impl)
    out = attention_varlen(*dirty, *_packed(), causal=True, impl=impl)
    assert torch.equal(out[:60], wanted)
    assert torch.equal(out[60:], torch.zeros(3, 2, 8))
    with torch.no_grad():
        _, lse = attention_varlen(*dirty, *_packed(), causal=True, return_lse=True, impl=impl)
    assert torch.equal(lse[:, 60:], torch.full((2, 3), -torch.inf))
    upstream = torch.ones_like(out)
    upstream[60:] = torch.nan
    for a, b in zip(
        torch.autograd.grad(out, dirty, upstream), torch.autograd.grad(wanted, clean, upstream[:60]), strict=True
    ):
        assert torch.equal(a[:60], b)
        assert torch.equal(a[60:], torch.zeros(3, 2, 8))


@pytest.mark.parametrize("lengths", [(0, 0), (0,), ()])
def test_a_batch_of_nothing(impl: str, lengths: tuple[int, ...]) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(4))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, lse = attention_varlen(q, k, v, starts, starts, 0, 0, causal=True, return_lse=True, impl=impl)
    assert torch.equal(out, torch.zeros(4, 2, 8))
    assert torch.equal(lse, torch.full((2, 4), -torch.inf))
    assert not torch.autograd.grad(out.sum(), q)[0].any()


def test_dropout_is_the_same_in_every_implementation_and_layout(impl: str) -> None:
    """With v the identity a row of the output is the row of dropped probabilities, so the masks can be compared."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 16, 2, 16) for _ in range(2))
    v = torch.eye(16)[None, :, None].expand(2, 16, 2, 16)
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.25, "dropout_seed": 2**40 + 17}
    exact = attention(*(x.double() for x in (q, k, v)), **options, impl="reference")
    out = attention(q, k, v, **options, impl=impl)
    torch.testing.assert_close(out, exact.float())
    in_bf16 = attention(*(x.bfloat16() for x in (q, k, v)), **options, impl=impl)
    assert torch.equal(in_bf16 != 0, exact != 0)
    seed = torch.tensor(2**40 + 17)
    packed = attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)), *_packed((16, 16)), **{**options, "dropout_seed": seed}, impl=impl
    )
    torch.testing.assert_close(packed, exact.float().flatten(0, 1))
    _, lse = attention(q, k, v, **options, return_lse=True, impl=impl)
    _, without = attention(q, k, v, causal=True, return_lse=True, impl=impl)
    torch.testing.assert_close(lse, without)


def test_dropout_keeps_the_mean(impl: str) -> None:
    """q = 0 and v = 1: a row's result is (kept share) / (1 - p), of mean 1."""
    x, ones = torch.zeros(1, 128, 4, 2), torch.ones(1, 128, 4, 2)
    out = attention(x, x, ones, causal=False, dropout_p=0.2, dropout_seed=5, impl=impl)
    count = 128 * 128 * 4
    assert abs(out.mean().item() - 1.0) < 6 * (0.2 / 0.8 / count) ** 0.5
    assert out.std() > 0.01


def test_a_seed_of_none_comes_from_the_default_generator(impl: str) -> None:
    q, k, v = (x[None] for x in _inputs(12))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(attention(q, k, v, causal=True, dropout_p=0.5, impl=impl))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_autocast_changes_nothing(impl: str) -> None:
    inputs = [x[None].requires_grad_() for x in _inputs(20)]
    plain = attention(*inputs, causal=True, impl=impl)
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        out = attention(*inputs, causal=True, impl=impl)
        half = attention(*(x.bfloat16() for x in inputs), causal=True, impl=impl)
    assert torch.equal(out, plain)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True))


def test_gradients_go_where_they_are_wanted(impl: str) -> None:
    q, k, v = (x[None] for x in _inputs(12))
    (wanted,) = torch.autograd.grad(attention(q, k, v.requires_grad_(), causal=True, impl=impl).square().sum(), v)
    q2, v2 = q.clone().requires_grad_(), v.detach().requires_grad_()
    out = attention(q2, k, v2, causal=True, impl=impl)
    assert torch.equal(torch.autograd.grad(out.square().sum(), (q2, v2))[1], wanted)


def test_views_of_one_projection_are_served(impl: str) -> None:
    """q, k and v as slices of one (batch, seqlen, 3, heads, head_dim) tensor, as models make them."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    wanted = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True, impl=impl)
    torch.testing.assert_close(attention(q, k, v, causal=True, impl=impl), wanted)


def test_the_host_plan_moves_nothing_for_one_length_and_groups_the_rest() -> None:
    plan = host_plan((0, 4, 8, 12), (0, 4, 8, 12), (0, 0, 0), 12, 12, 10**6)
    assert plan.map_q is None
    assert plan.map_k is None
    assert [(block.num_seqs, block.len_q, block.causal) for block in plan.blocks] == [(3, 4, True)]
    # 200 sequences of 1 to 64 tokens run in four calls, padded to 16, 32, 48 and 64
    starts = tuple(torch.tensor([0, *[1 + s * 37 % 64 for s in range(200)]]).cumsum(0).tolist())
    plan = host_plan(starts, starts, (0,) * 200, starts[-1], starts[-1], 10**6)
    assert sorted(block.len_q for block in plan.blocks) == [16, 32, 48, 64]
    assert sum(block.num_seqs for block in plan.blocks) == 200
    assert plan.map_q is not None
    assert torch.equal(plan.map_q.rows[plan.map_q.slots], torch.arange(starts[-1]))


def test_the_device_plan_gives_each_row_its_slot() -> None:
    starts = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    plan = device_plan(starts, starts, 4, 4, 0, 6, 6)
    # three sequences of 3, 0 and 2 rows, padded to 4: slots 0-2, none, 8-9; row 5 is slack
    assert plan.map_q is not None
    assert plan.map_q.slots[:5].tolist() == [0, 1, 2, 8, 9]
    assert plan.map_q.slack is not None
    assert plan.map_q.slack.flatten().tolist() == [False] * 5 + [True]
    limits = plan.blocks[0].limits
    assert limits is not None
    assert limits.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [1, 2, 0, 0]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_gives_no_nan(impl: str, scale: float, causal: bool) -> None:
    """torch's fused attention gives NaN, or keys that are not seen, for such a scale and a causal mask."""
    q, k, v = (x[None] for x in _inputs(20))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    if causal:
        scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    expected_lse = scores.logsumexp(-1).float()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        inputs = [x.to(dtype) for x in (q, k, v)]
        out = attention(*inputs, causal=causal, softmax_scale=scale, impl=impl)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
        out, lse = attention(*inputs, causal=causal, softmax_scale=scale, return_lse=True, impl=impl)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=tolerance)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, causal=causal, softmax_scale=scale, impl=impl)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        assert all(torch.isfinite(x).all() for x in gradients)
        if scale == 0.0:
            assert not gradients[0].any()
            assert not gradients[1].any()


def test_the_largest_score_has_weight_1_however_large_it_is(impl: str) -> None:
    """The difference of two scores near 1e10, each rounded apart, may be hundreds: exp of it is inf, or all are 0."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 17, 1, 64).to(dtype) for _ in range(3))
        leaves = [x.requires_grad_() for x in (q * 1e11, k, v)]
        out, lse = attention(*leaves, causal=True, softmax_scale=0.3, return_lse=True, impl=impl)
        products = torch.einsum("bqhd,bkhd->bhqk", leaves[0].double(), leaves[1].double())
        best = products.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), -torch.inf).max(-1)
        expected = v[0, best.indices[0, 0], 0]  # scores are so far apart that the largest alone counts
        torch.testing.assert_close(out[0, :, 0], expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), 0.3 * best.values, rtol=2e-2, atol=0)
        if impl != "triton":  # whose backward has the sums' logarithm alone, as flash-attention's
            assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_seen_is_not_felt(impl: str, bad: float) -> None:
    """Queries that see nothing, keys that nobody sees: results and gradients are as if they held 0."""
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 5, 5, 8), (0, 3, 7, 10)))
    torch.manual_seed(3)
    tensors = [torch.randn(9, 2, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)]
    felt_q, felt_k = torch.ones(9, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    felt_q[[0, 1, 8]] = False  # more queries than keys, and a slack row
    felt_k[[3, 4, 5, 6, 10, 11]] = False  # keys without queries, and slack rows
    felt = [felt_q, felt_k, felt_k]
    results = []
    for other in (0.0, bad):
        leaves = [x.where(rows[:, None, None], other).requires_grad_() for x, rows in zip(tensors, felt, strict=True)]
        out = attention_varlen(*leaves, starts_q, starts_k, 5, 4, causal=True, impl=impl)
        upstream = torch.ones_like(out).where(felt_q[:, None, None], other)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for expected, actual, rows in zip(*results, [felt_q, *felt], strict=True):
        torch.testing.assert_close(actual, expected)
        assert not actual[~rows].any()
    q = tensors[0][None, :5].where(felt_q[:5, None, None], bad)
    out = attention(q, tensors[1][None, :3], tensors[2][None, :3], causal=True, impl=impl)
    torch.testing.assert_close(out[0], results[0][0][:5])


def test_no_sequences_give_gradients_of_0_and_not_none(impl: str) -> None:
    leaves = [torch.randn(3, 2, 8, requires_grad=True) for _ in range(3)]
    none = torch.zeros(1, dtype=torch.int32)
    out = attention_varlen(*leaves, none, none, 0, 0, causal=True, impl=impl)
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(gradient, torch.zeros(3, 2, 8))


def test_autocast_takes_queries_that_rotary_left_in_float32(impl: str) -> None:
    """A layer of a user's: projections are bfloat16 under autocast, and x * cos is float32."""
    q, k, v = (x[None].requires_grad_() for x in _inputs(20))
    narrow = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    wanted = attention(*narrow, causal=True, impl=impl)
    with torch.autocast(q.device.type, torch.bfloat16):
        out = attention(q, k, narrow[2], causal=True, impl=impl)
    assert torch.equal(out, wanted)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, narrow[2]))
    assert [x.dtype for x in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    for actual, expected in zip(gradients, torch.autograd.grad(wanted.float().square().sum(), narrow), strict=True):
        assert torch.equal(actual.bfloat16(), expected)
    with pytest.raises(TypeError, match="v must have q's dtype torch.float32; got torch.bfloat16"):
        attention(q, k, narrow[2], causal=True, impl=impl)


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_a_recorded_graph_of_packed_sequences_takes_other_lengths(impl: str) -> None:
    """What nobody sees depends on the lengths, and must not become a constant of the graph."""
    q, _, _ = _inputs(6)

    def call(starts_q: torch.Tensor, starts_k: torch.Tensor) -> torch.Tensor:
        return attention_varlen(q, q, q, starts_q, starts_k, 6, 6, causal=True, impl=impl)

    def starts(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    try:
        graph = make_fx(call)(starts(0, 2, 6), starts(0, 3, 6))
    except RuntimeError as error:
        assert impl == "torch" and "tracing tensor" in str(error)  # which reads the lengths, and says so
        return
    for lengths in ((starts(0, 2, 6), starts(0, 3, 6)), (starts(0, 4, 6), starts(0, 3, 6)), (starts(0, 4, 6),) * 2):
        torch.testing.assert_close(graph(*lengths), call(*lengths))
