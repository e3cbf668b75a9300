"""One binary for every objective: flags, lengths, batches and heads compile no attention kernel anew."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from antlm_fast.kernels.attention import api, attention, attention_varlen
from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("there are no compiled kernels under TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.jit import JITFunction

from antlm_fast.kernels.attention import triton_launches
from antlm_fast.kernels.triton_support.offline import standing_in, target

KERNELS = ("forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel")
HEAD_DIM = 32


class Binaries:
    """What launches look up: calls per kernel, and the distinct compiled kernels that they got."""

    def __init__(self) -> None:
        self.launches: dict[str, int] = defaultdict(int)
        self.compiled: dict[str, set[str]] = defaultdict(set)

    def counts(self) -> list[int]:
        return [len(self.compiled[name]) for name in KERNELS]


@pytest.fixture
def binaries(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Binaries]:
    """Launches for an sm_90 that is not there: they go as far as the compiled kernel, and do not run it."""
    seen, run = Binaries(), JITFunction.run

    def look_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        seen.launches[self.fn.__name__] += 1
        seen.compiled[self.fn.__name__].add(compiled.hash)
        return compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", look_up)
    monkeypatch.setattr(api, "unavailable_reason", lambda device_type: None)
    monkeypatch.setattr(triton_launches, "arch_of", lambda device: "sm_90")
    for name in KERNELS:
        kernel = getattr(triton_launches, name)
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    with standing_in(target("sm_90")):
        yield seen


def _inputs(total: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(total, n, HEAD_DIM, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads))


def _train_step(lengths: tuple[int, ...], heads: int, kv_heads: int, slack: int = 0, **options: Any) -> None:
    inputs = _inputs(sum(lengths) + slack, heads, kv_heads)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = attention_varlen(*inputs, starts, starts, max(lengths), max(lengths), impl="triton", **options)
    torch.autograd.grad(out, inputs, torch.zeros_like(out))


def _flags(num_seqs: int) -> list[dict[str, Any]]:
    ones = torch.ones(num_seqs, dtype=torch.bool)
    prefix = torch.arange(2 * num_seqs, dtype=torch.int32)
    return [
        {"causal": True},
        {"causal": False},
        {"causal": torch.tensor(True)},
        {"causal": ones},
        {"causal": ~ones},
        {"prefix_len": prefix[:num_seqs]},
        {"prefix_len": prefix[::2]},
        {"prefix_len": prefix[num_seqs:]},
    ]


BATCHES = ((1,), (16,), (17, 31), (64, 0, 1, 63), (5,) * 16, (129, 2))


def test_flags_lengths_batches_and_heads_share_one_binary(binaries: Binaries) -> None:
    steps = 0
    for lengths in BATCHES:
        for flags in _flags(len(lengths)):
            _train_step(lengths, 4, 2, **flags)
            steps += 1
    for heads, kv_heads in ((2, 1), (12, 4), (32, 16)):
        for slack in (0, 1, 16):
            _train_step((7, 32), heads, kv_heads, slack, causal=torch.tensor(False))
            steps += 1
    for scale in (0.125, 1.0, 2, -0.5):
        _train_step((7, 32), 4, 2, causal=True, softmax_scale=scale)
        steps += 1
    dense = tuple(x.unflatten(0, (3, 13)) for x in _inputs(39, 4, 2))
    attention(*dense, causal=torch.tensor([True, False, True]), impl="triton").sum().backward()
    steps += 1
    assert [binaries.launches[name] for name in KERNELS] == [steps] * 4
    assert binaries.counts() == [1, 1, 1, 1]
    # nor does a launch look anything up anew: Triton's table of specialisations holds one row a kernel
    assert [len(getattr(triton_launches, name).device_caches[0][0]) for name in KERNELS] == [1, 1, 1, 1]
    # without groups (one key head for each query head) dK/dV has no loop over a group: one binary more, for all flags
    for heads in (1, 3, 16):
        for flags in _flags(2):
            _train_step((7, 32), heads, heads, **flags)
    assert binaries.counts() == [1, 1, 1, 2]


def test_dropout_adds_one_binary_whatever_its_rate_and_seed(binaries: Binaries) -> None:
    for seed, dropout_p in enumerate((0.1, 0.5, 0.75)):
        _train_step((7, 32), 4, 2, causal=True, dropout_p=dropout_p, dropout_seed=seed)
        seeds = torch.arange(8)
        _train_step((7, 32), 4, 2, causal=False, dropout_p=dropout_p, dropout_seed=seeds[seed])
    assert binaries.counts() == [1, 1, 1, 1]
    _train_step((7, 32), 4, 2, causal=True)
    assert binaries.counts() == [2, 1, 2, 2]  # delta knows nothing of dropout


def test_another_dtype_is_another_binary(binaries: Binaries) -> None:
    """That the count can be more than one."""
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad():
            attention(*(x[None] for x in _inputs(16, 1, 1, dtype)), causal=True, impl="triton")
    assert binaries.counts() == [2, 0, 0, 0]


def test_relative_terms_are_one_binary_more_for_all_lengths_and_flags(binaries: Binaries) -> None:
    def step(lengths: tuple[int, ...], heads: int, slack: int = 0, max_position: int = 64, **options: Any) -> None:
        inputs = _inputs(sum(lengths) + slack, heads, heads)
        tables = torch.zeros(2, 31, heads, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        longest = max(lengths)
        out = disentangled_attention_varlen(
            *inputs, *tables, starts, starts, longest, longest, max_position=max_position, impl="triton", **options
        )
        torch.autograd.grad(out, (*inputs, tables), torch.zeros_like(out))

    for lengths in BATCHES:
        for flags in _flags(len(lengths)):
            step(lengths, 4, **flags)
    for heads in (1, 2, 16):
        step((7, 32), heads, slack=heads, causal=True, softmax_scale=-0.5)
    for max_position in (17, 65, 512):
        step((7, 900), 4, max_position=max_position, causal=False)
    assert binaries.counts() == [1, 1, 1, 1]
    assert [len(getattr(triton_launches, name).device_caches[0][0]) for name in KERNELS] == [1, 1, 1, 1]
    _train_step((7, 32), 4, 4, causal=True)
    assert binaries.counts() == [2, 1, 2, 2]
