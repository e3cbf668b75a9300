"""Relative terms in the Triton kernels: tiles of every shape, tables of every size, and the ops as torch sees them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen, relative_bucket
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on the CPU only under TRITON_INTERPRET=1", allow_module_level=True)

from antlm_fast.kernels.attention import triton_launches, triton_tables
from antlm_fast.kernels.disentangled_attention import triton_impl
from antlm_fast.kernels.triton_support.launch import Launch, Tile

LENGTHS_Q, LENGTHS_K = (1, 33, 0, 17, 40), (7, 33, 5, 40, 17)
PREFIX = (0, 12, 3, 0, 2**31 - 1)
NAMES = ("out", "lse", "d_q", "d_k", "d_v", "d_q_rel", "d_k_rel")
BACKENDS = ("eager", "aot_eager")
Tensors = tuple[torch.Tensor, ...]


def _starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _inputs(total_q: int, total_k: int, bucket_size: int, head_dim: int = 16) -> list[torch.Tensor]:
    """q, k, v, q_rel, k_rel and an upstream gradient."""
    torch.manual_seed(0)
    rows = (total_q, total_k, total_k, 2 * bucket_size - 1, 2 * bucket_size - 1, total_q)
    return [torch.randn(n, 2, head_dim) for n in rows]


def _results(impl: str, dtype: torch.dtype, inputs: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    *leaves, upstream = (x.to(dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    starts = (_starts(LENGTHS_Q), _starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    prefix = torch.tensor(PREFIX, dtype=torch.int32)
    out, lse = disentangled_attention_varlen(*leaves, *starts, prefix_len=prefix, return_lse=True, impl=impl, **options)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return dict(zip(NAMES, (out.detach(), lse, *gradients), strict=True))


def _assert_right(bucket_size: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    inputs = [x.to(dtype) for x in _inputs(sum(LENGTHS_Q) + 3, sum(LENGTHS_K) + 5, bucket_size)]
    exact = _results("reference", torch.float64, inputs, **options)
    eager = _results("reference", dtype, inputs, **options)
    actual = _results("triton", dtype, inputs, **options)
    for name, wanted in exact.items():
        assert_within_budget(name, actual[name], wanted, eager[name], 3.0 if name.startswith("d_") else 2.0)


@pytest.mark.parametrize(
    ("block_m", "block_n", "dtype"),
    [
        (16, 16, torch.float32),
        (16, 64, torch.bfloat16),
        (32, 16, torch.float32),
        (64, 16, torch.bfloat16),
        (64, 64, torch.float32),
    ],
    ids=str,
)
def test_every_shape_of_tile(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(block_m, block_n, 4, 1))
    _assert_right(8, dtype, max_position=16)


def test_offsets_of_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = []

    def run(self: Launch, device: torch.device) -> None:
        if "WIDE" in self.arguments:
            wide.append(self.name)
            self = replace(self, arguments={**self.arguments, "WIDE": True})
        original(self, device)

    original = Launch.run
    monkeypatch.setattr(Launch, "run", run)
    _assert_right(5, max_position=9, softmax_scale=-0.3)
    assert wide == ["forward_kernel", "dq_kernel", "dkdv_kernel"]


def test_terms_count_among_what_32_bits_must_reach() -> None:
    """Rows of the terms that are wider than those of q."""
    with torch.device("meta"):
        starts = torch.empty(2, dtype=torch.int32)
        for longest, wide in ((260_000, False), (263_000, True)):
            q = torch.empty(longest, 1, 16)
            tables = (torch.empty(n, dtype=torch.int32) for n in (3, 3, 8192))
            terms = triton_tables.RelativeTerms(q, q, *tables)
            call = triton_launches.AttentionLaunches(
                q, q, q, starts, starts, starts[:1], None, terms, 1.0, 0.0, longest, longest, False, "sm_90", "half"
            )
            assert call.arguments["WIDE"] == wide


@pytest.mark.parametrize(
    ("bucket_size", "max_position"), [(32, 512), (8, 16), (5, 9), (3, 7), (2, 2), (32, 16), (32, 18), (40, 64)]
)
def test_tables_are_those_of_relative_bucket(bucket_size: int, max_position: int) -> None:
    term = torch.empty(1, 1, triton_tables.padded_table_rows(bucket_size))
    found = triton_tables.relative_terms(term, None, bucket_size, max_position, 700)
    assert found is not None
    distances = torch.arange(-found.reach, found.reach + 1)
    assert found.reach >= 700 + 256
    columns = relative_bucket(distances, bucket_size=bucket_size, max_position=max_position) + bucket_size - 1
    assert torch.equal(found.buckets, columns.int())
    assert torch.equal(found.mirrored, columns.flip(0).int())
    # a column's start: the smallest distance that lies in it or beyond; all distances lie beyond the first's
    starts = found.run_starts
    assert starts.diff().min() >= 0
    for column in range(term.shape[-1]):
        lies_beyond = distances >= starts[column]
        assert torch.equal(columns >= column, lies_beyond), column
    assert starts[columns.min()] < -(2**29)
    assert starts[columns.max() + 1] > 2**29


def test_tables_are_made_once() -> None:
    term = torch.empty(1, 1, 64)
    first = triton_tables.relative_terms(term, term, 32, 512, 260)
    again = triton_tables.relative_terms(term, None, 32, 512, 700)
    assert first is not None
    assert again is not None
    assert again.buckets is first.buckets


def test_more_columns_take_smaller_tiles() -> None:
    """The sums over buckets stay in registers."""
    sizes = {}
    for bucket_size in (32, 128):
        launches = triton_launches.offline_launches(
            "sm_90", torch.bfloat16, 64, 8, 8, dropout=False, kind="half", bucket_size=bucket_size
        )
        sizes[bucket_size] = [launch.tile for launch in launches]
    (_, _, small_dq, small_dkdv), (_, _, dq, dkdv) = sizes[128], sizes[32]
    assert small_dq.block_m == max(dq.block_m // 4, 16)
    assert small_dkdv.block_n == max(dkdv.block_n // 4, 16)


OPS = ("relative_products_op", "relative_products_backward_op")


def _arguments_of(op: str) -> Tensors:
    x, table, cu = torch.randn(11, 2, 16), torch.randn(7, 2, 16), _starts((4, 5))
    return (x, table, cu) if op == OPS[0] else (torch.randn(2, 11, 16), x, table, cu)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    arguments = _arguments_of(op)
    if op == OPS[0]:
        arguments = tuple(x.requires_grad_() if x.is_floating_point() else x for x in arguments)
    passed = torch.library.opcheck(getattr(triton_impl, op), arguments)
    assert list(passed.values()) == ["SUCCESS"] * 4


@pytest.mark.parametrize("op", OPS)
def test_fake_results_have_the_face_of_real_ones(op: str) -> None:
    arguments = [x.bfloat16() if x.is_floating_point() else x for x in _arguments_of(op)]
    real = getattr(triton_impl, op)(*arguments)
    with FakeTensorMode() as mode:
        fake = getattr(triton_impl, op)(*(mode.from_tensor(x) for x in arguments))
    real, fake = ((x,) if torch.is_tensor(x) else x for x in (real, fake))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


def _call(q: Any, k: Any, v: Any, q_rel: Any, k_rel: Any, starts: Any, longest: int, flag: Any, **options: Any) -> Any:
    counts = options.pop("counts", starts)
    return disentangled_attention_varlen(
        q, k, v, q_rel, k_rel, counts, starts, longest, longest,
        causal=flag, max_position=16, dropout_p=0.2, dropout_seed=3, impl="triton", **options,
    )  # fmt: skip


def _trained(step: Any, inputs: list[torch.Tensor], *rest: Any, **options: Any) -> Tensors:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = step(*leaves, *rest, **options)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flags_flipped_in_place_reach_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    lengths = (9, 7)
    inputs, starts, flag = _inputs(18, 18, 8)[:5], _starts(lengths), torch.ones(2, dtype=torch.bool)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_call, fullgraph=True, backend=counter)
    results = []
    for values in ((1, 1), (0, 1), (1, 1)):
        flag.copy_(torch.tensor(values))
        results.append(_trained(compiled, inputs, starts, 9, flag))
        for a, b in zip(results[-1], _trained(_call, inputs, starts, 9, flag.clone()), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(results[0], results[1], strict=True))


def test_batches_of_other_lengths_and_positions_reach_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_call, fullgraph=True, backend=counter, dynamic=True)
    flag = torch.tensor([True, False])
    for lengths, wanted in (((7, 20), ((2, 6), (0, 5, 19))), ((23, 4), ((1, 9, 22), (3,)))):
        starts = _starts(lengths)
        counts = _starts(tuple(map(len, wanted)))
        positions = torch.tensor([*wanted[0], *wanted[1], 0, 0], dtype=torch.int32)  # two slack rows
        inputs = _inputs(len(positions), sum(lengths) + 2, 8)[:5]
        options = {"counts": counts, "positions_q": positions}
        actual = _trained(compiled, inputs, starts, max(lengths), flag, **options)
        for a, b in zip(actual, _trained(_call, inputs, starts, max(lengths), flag, **options), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_a_backward_under_autocast_changes_nothing() -> None:
    inputs, starts = _inputs(18, 18, 8)[:5], _starts((9, 7))

    def gradients(autocast: bool) -> Tensors:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = _call(*leaves, starts, 9, True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))
