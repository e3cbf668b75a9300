"""What must hold of disentangled attention whatever the numbers: isolation, no leakage, live flags, determinism."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antlm_fast.kernels.disentangled_attention import disentangled_attention, disentangled_attention_varlen

LENGTHS = (5, 0, 17, 5, 33)
TABLES: dict[str, Any] = {"max_position": 16}


def _inputs(total: int, heads: int = 2, bucket_size: int = 8) -> list[torch.Tensor]:
    """q, k, v, q_rel, k_rel."""
    torch.manual_seed(1)
    shapes = [(total, heads, 8)] * 3 + [(2 * bucket_size - 1, heads, 8)] * 2
    return [torch.randn(shape) for shape in shapes]


def _packed(lengths: tuple[int, ...] = LENGTHS) -> tuple[Any, ...]:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return starts, starts, max(lengths, default=0), max(lengths, default=0)


def _attend(inputs: list[torch.Tensor], lengths: tuple[int, ...], impl: str, **options: Any) -> torch.Tensor:
    out: torch.Tensor = disentangled_attention_varlen(*inputs, *_packed(lengths), **TABLES, **options, impl=impl)
    return out


def _changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).flatten(1).any(1).nonzero().flatten().tolist()


def test_a_later_token_never_changes_an_earlier_causal_row(relative_impl: str) -> None:
    inputs = _inputs(20)
    before = _attend(inputs, (20,), relative_impl, causal=True)
    for changed in (0, 11, 19):
        others = [x.clone() for x in inputs]
        others[1][changed], others[2][changed] = 5.0, -5.0
        after = _attend(others, (20,), relative_impl, causal=True)
        assert _changed_rows(before, after) == list(range(changed, 20))


def test_a_causal_row_reads_no_table_row_of_later_keys(relative_impl: str) -> None:
    inputs = [x.requires_grad_() for x in _inputs(20)]
    out = _attend(inputs, (20,), relative_impl, causal=True)
    for table in torch.autograd.grad(out.square().sum(), inputs[3:]):
        assert not table[:7].any()  # buckets -7 .. -1
        assert table[7:].flatten(1).any(1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_never_see_each_other(relative_impl: str, causal: bool) -> None:
    """Rows 5..21 are the third sequence; the gradient says the same from the other end."""
    inputs = [x.requires_grad_() for x in _inputs(60)]
    before = _attend(inputs, LENGTHS, relative_impl, causal=causal)
    for gradient in torch.autograd.grad(before[5:22].square().sum(), inputs[:3]):
        rows = _changed_rows(gradient, torch.zeros_like(gradient))
        # a causal first row sees one key, whatever its score: its query has no gradient
        assert set(rows) - {5} == set(range(6, 22))
    changed = [*(torch.cat([x[:5], x[5:22] + 1.0, x[22:]]) for x in inputs[:3]), *inputs[3:]]
    after = _attend(changed, LENGTHS, relative_impl, causal=causal)
    assert _changed_rows(before, after) == list(range(5, 22))


def test_packed_is_each_sequence_alone(relative_impl: str) -> None:
    inputs = _inputs(60)
    flags = torch.tensor([True, False, False, True, True])
    together = _attend(inputs, LENGTHS, relative_impl, causal=flags)
    start = 0
    for length, flag in zip(LENGTHS, flags.tolist(), strict=True):
        rows = slice(start, start + length)
        alone = disentangled_attention(
            *(x[None, rows] for x in inputs[:3]), *inputs[3:], causal=flag, **TABLES, impl=relative_impl
        )
        torch.testing.assert_close(together[rows], alone[0])
        start += length


@pytest.mark.parametrize("name", ["causal", "prefix_len", "one flag"])
def test_a_flag_changed_in_place_changes_the_next_call(relative_impl: str, name: str) -> None:
    inputs = _inputs(60)
    if name == "prefix_len":
        flag, option = torch.zeros(3, dtype=torch.int32), "prefix_len"
    else:
        flag, option = torch.ones(() if name == "one flag" else 3, dtype=torch.bool), "causal"

    def run(**flags: Any) -> torch.Tensor:
        return _attend(inputs, (20, 20, 20), relative_impl, **flags)

    torch.testing.assert_close(run(**{option: flag}), run(causal=True))
    flag.fill_(20 if name == "prefix_len" else False)
    torch.testing.assert_close(run(**{option: flag}), run(causal=False))


def test_flipping_one_sequence_changes_only_that_sequence(relative_impl: str) -> None:
    inputs = [x.requires_grad_() for x in _inputs(60)]
    results = []
    for third in (True, False):
        out = _attend(inputs, LENGTHS, relative_impl, causal=torch.tensor([True, False, third, False, True]))
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs[:3])))
    for first, second in zip(*results, strict=True):
        rows = (~torch.isclose(first, second, rtol=1e-5, atol=1e-6)).flatten(1).any(1).nonzero().flatten().tolist()
        assert rows
        assert set(rows) <= set(range(5, 22))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_twice_is_bitwise_equal(relative_impl: str, dropout_p: float) -> None:
    inputs = [x.requires_grad_() for x in _inputs(60, heads=4)]
    options: dict[str, Any] = {"causal": torch.tensor([True, False, False, True, True])}
    options |= {"dropout_p": dropout_p, "dropout_seed": 4}
    outs = [_attend(inputs, LENGTHS, relative_impl, **options) for _ in range(2)]
    assert torch.equal(*outs)
    first = torch.autograd.grad(outs[0].square().sum(), inputs, retain_graph=True)
    for again in (
        torch.autograd.grad(outs[0].square().sum(), inputs),
        torch.autograd.grad(outs[1].square().sum(), inputs),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_that_see_nothing_give_and_get_nothing(relative_impl: str) -> None:
    """Eight queries over five keys: rows 0, 1 and 2 come before the first key."""
    q, k, v, *tables = _inputs(8)
    inputs = [x.clone().requires_grad_() for x in (q[None], k[None, :5], v[None, :5], *tables)]
    out, lse = disentangled_attention(*inputs, causal=True, **TABLES, return_lse=True, impl=relative_impl)
    assert not out[0, :3].any()
    assert torch.equal(lse[0, :, :3], torch.full((2, 3), -torch.inf))
    assert torch.isfinite(lse[0, :, 3:]).all()
    assert not lse.requires_grad
    upstream = torch.ones_like(out)
    gradients = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    assert not gradients[0][0, :3].any()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    upstream[0, :3] = 1e6
    again = torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_slack_rows_are_written_and_never_read(relative_impl: str) -> None:
    """Three rows past the last sequence hold NaN; results and gradients there are 0, elsewhere as without them."""
    clean = [x.requires_grad_() for x in _inputs(60)]
    nan = torch.full((3, 2, 8), torch.nan)
    dirty = [torch.cat([x.detach(), nan]).requires_grad_() for x in clean[:3]]
    dirty += [x.detach().clone().requires_grad_() for x in clean[3:]]
    wanted = _attend(clean, LENGTHS, relative_impl, causal=True)
    out = _attend(dirty, LENGTHS, relative_impl, causal=True)
    torch.testing.assert_close(out[:60], wanted)
    assert torch.equal(out[60:], torch.zeros(3, 2, 8))
    with torch.no_grad():
        _, lse = disentangled_attention_varlen(
            *dirty, *_packed(), causal=True, **TABLES, return_lse=True, impl=relative_impl
        )
    assert torch.equal(lse[:, 60:], torch.full((2, 3), -torch.inf))
    upstream = torch.ones_like(out)
    upstream[60:] = torch.nan
    for a, b in zip(
        torch.autograd.grad(out, dirty, upstream), torch.autograd.grad(wanted, clean, upstream[:60]), strict=True
    ):
        torch.testing.assert_close(a[: b.shape[0]], b)
        assert not a[b.shape[0] :].any()


@pytest.mark.parametrize("lengths", [(0, 0), (0,), ()])
def test_a_batch_of_nothing(relative_impl: str, lengths: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_() for x in _inputs(4)]
    out, lse = disentangled_attention_varlen(
        *inputs, *_packed(lengths), causal=True, **TABLES, return_lse=True, impl=relative_impl
    )
    assert torch.equal(out, torch.zeros(4, 2, 8))
    assert torch.equal(lse, torch.full((2, 4), -torch.inf))
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs, materialize_grads=True))


def test_dropout_is_the_same_in_every_implementation(relative_impl: str) -> None:
    """With v the identity a row of the output is the row of dropped probabilities, so the masks can be compared."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 16, 2, 16) for _ in range(2))
    tables = [torch.randn(15, 2, 16) for _ in range(2)]
    v = torch.eye(16)[None, :, None].expand(2, 16, 2, 16)
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.25, "dropout_seed": 2**40 + 17, **TABLES}
    exact = disentangled_attention(*(x.double() for x in (q, k, v, *tables)), **options, impl="reference")
    torch.testing.assert_close(disentangled_attention(q, k, v, *tables, **options, impl=relative_impl), exact.float())
    in_bf16 = disentangled_attention(*(x.bfloat16() for x in (q, k, v, *tables)), **options, impl=relative_impl)
    assert torch.equal(in_bf16 != 0, exact != 0)


def test_a_seed_of_none_comes_from_the_default_generator(relative_impl: str) -> None:
    inputs = _inputs(12)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(_attend(inputs, (12,), relative_impl, causal=True, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_autocast_changes_nothing(relative_impl: str) -> None:
    inputs = [x.requires_grad_() for x in _inputs(20)]
    plain = _attend(inputs, (20,), relative_impl, causal=True)
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        out = _attend(inputs, (20,), relative_impl, causal=True)
        half = _attend([x.bfloat16() for x in inputs], (20,), relative_impl, causal=True)
        if relative_impl != "reference":  # whose backward is autograd's own
            found = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(out, plain)
    assert half.dtype == torch.bfloat16
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("wanted", range(5))
def test_gradients_go_where_they_are_wanted(relative_impl: str, wanted: int) -> None:
    inputs = [x.requires_grad_() for x in _inputs(12)]
    full = torch.autograd.grad(_attend(inputs, (12,), relative_impl, causal=True).square().sum(), inputs)
    some = [x.detach().requires_grad_(index == wanted) for index, x in enumerate(inputs)]
    (alone,) = torch.autograd.grad(_attend(some, (12,), relative_impl, causal=True).square().sum(), some[wanted])
    torch.testing.assert_close(alone, full[wanted])


def test_views_of_one_projection_are_served(relative_impl: str) -> None:
    """q, k and v, and both tables, as slices of one projection each, as models make them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(18, 3, 2, 8).unbind(1)
    q_rel, k_rel = torch.randn(15, 2, 2, 8).unbind(1)
    wanted = _attend([x.contiguous() for x in (q, k, v, q_rel, k_rel)], (9, 9), relative_impl, causal=True)
    torch.testing.assert_close(_attend([q, k, v, q_rel, k_rel], (9, 9), relative_impl, causal=True), wanted)


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear_in_the_length(relative_impl: str, causal: bool) -> None:
    """No tensor of a forward and backward holds as much as one head's scores; twice the length, twice the largest."""
    if relative_impl == "reference":
        pytest.skip("the reference keeps every score, by design")
    found = []
    for length in (1024, 2048):
        inputs = [x.requires_grad_() for x in _inputs(length, heads=1)]
        with _LargestTensor() as largest:
            _attend(inputs, (length,), relative_impl, causal=causal).sum().backward()
        found.append(largest.elements)
    assert found[1] < 2048 * 2048
    assert found[1] <= 2.2 * found[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_seen_is_not_felt(relative_impl: str, bad: float) -> None:
    """Keys beyond what the queries of some rows see, and those of a sequence without queries."""
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 2, 2, 3), (0, 5, 8, 12)))
    options: dict[str, Any] = {
        "positions_q": torch.tensor([0, 2, 0], dtype=torch.int32),
        "prefix_len": torch.tensor([0, 9, 3], dtype=torch.int32),
        "max_position": 5,
        "impl": relative_impl,
    }
    torch.manual_seed(3)
    q, k, v, *tables = (torch.randn(n, 2, 8) for n in (3, 12, 12, 5, 5))
    felt = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    results = []
    for other in (0.0, bad):
        hidden = [x.where(felt[:, None, None], other) for x in (k, v)]
        leaves = [x.detach().requires_grad_() for x in (q, *hidden, *tables)]
        out = disentangled_attention_varlen(*leaves, starts_q, starts_k, 2, 5, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert not results[1][2][~felt].any()
    assert not results[1][3][~felt].any()


def test_a_sequence_of_one_key_and_no_query(relative_impl: str) -> None:
    torch.manual_seed(0)
    q, k, v, *tables = (torch.randn(n, 2, 8, requires_grad=True) for n in (2, 3, 3, 5, 5))
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 2, 2), (0, 2, 3)))
    options: dict[str, Any] = {"max_position": 5, "causal": True, "impl": relative_impl}
    out = disentangled_attention_varlen(q, k, v, *tables, starts_q, starts_k, 2, 2, **options)
    alone = disentangled_attention_varlen(q, k[:2], v[:2], *tables, starts_q[:2], starts_k[:2], 2, 2, **options)
    torch.testing.assert_close(out, alone)
    gradients = torch.autograd.grad(out.sum(), (k, v))
    assert not any(x[2].any() for x in gradients)
    assert all(x[:2].any() for x in gradients)


def test_the_reference_sums_a_tables_gradient_in_float32() -> None:
    """600 queries and 600 keys share the outermost rows; summed in bfloat16 they would stop growing."""
    torch.manual_seed(0)
    tensors = [torch.randn(n, 1, 4).bfloat16() for n in (600, 600, 600, 3, 3)]
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = disentangled_attention_varlen(*leaves, *_packed((600,)), max_position=4, causal=True, impl="reference")
        gradients.append(torch.autograd.grad((out * out.detach()).sum(), leaves[3:]))
    for exact, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=0.04 * exact.abs().max().item())


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": ({"k": torch.zeros(12, 1, 8), "v": torch.zeros(12, 1, 8)}, ValueError, "k must have q's 2 heads; got 1"),
    "even table": (
        {"q_rel": torch.zeros(14, 2, 8)},
        ValueError,
        "q_rel must have shape (2 * bucket_size - 1, 2, 8), bucket_size at least 2; got (14, 2, 8)",
    ),
    "table's heads": ({"k_rel": torch.zeros(15, 3, 8)}, ValueError, "k_rel must have shape (2 * bucket_size - 1, 2"),
    "table's dtype": (
        {"k_rel": torch.zeros(15, 2, 8, dtype=torch.bfloat16)},
        TypeError,
        "k_rel must have q's dtype torch.float32; got torch.bfloat16",
    ),
    "two tables": ({"k_rel": torch.zeros(13, 2, 8)}, ValueError, "k_rel must have q_rel's shape (15, 2, 8)"),
    "max_position": ({"max_position": 1}, ValueError, "max_position must be at least 2; got 1"),
    "positions' dtype": ({"positions_q": torch.arange(12)}, TypeError, "positions_q must be int32; got torch.int64"),
    "positions' shape": ({"positions_q": torch.zeros(3).int()}, ValueError, "positions_q must have shape (12,)"),
    "positions' order": (
        {"positions_q": torch.zeros(12).int()},
        ValueError,
        "positions_q must ascend within a sequence; got [0, 0, 0, 0, 0, 0, 0, 0]",
    ),
    "positions' range": (
        {"positions_q": torch.arange(1, 13).int()},
        ValueError,
        "positions_q must be from 0 to 11 in a sequence of 12 keys; got 12",
    ),
    "no flag": ({"causal": None}, ValueError, "causal or prefix_len must be given, and not both; got neither"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused(what: str) -> None:
    changes, error, message = WRONG[what]
    names = ("q", "k", "v", "q_rel", "k_rel")
    arguments: dict[str, Any] = {**dict(zip(names, _inputs(12), strict=True)), "causal": True, **TABLES, **changes}
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=re.escape(message)):
        disentangled_attention_varlen(*tensors, *_packed((12,)), **arguments)
