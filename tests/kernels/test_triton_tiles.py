"""The Triton attention kernels under tiles of every shape, wide offsets, and tiles that a device has no room for."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from antlm_fast.kernels.attention import attention, attention_varlen, triton_launches
from antlm_fast.kernels.triton_support import launch as launching
from antlm_fast.kernels.triton_support.interpreter import interpreting
from antlm_fast.kernels.triton_support.launch import Launch, Tile
from antlm_fast.testing.budget import assert_within_budget


def needs_kernels(test: Any) -> Any:
    """Interpreted, it runs here; compiled, it is one of those that need a GPU."""
    return test if interpreting() else pytest.mark.gpu(test)


DEVICE = "cpu" if interpreting() else "cuda"
LENGTHS_Q, LENGTHS_K = (1, 33, 0, 17, 40, 64), (7, 33, 5, 40, 17, 64)
PREFIX = (0, 12, 3, 0, 2**31 - 1, 50)


def _results(dtype: torch.dtype, impl: str, inputs: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    q, k, v, upstream = (x.to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    starts = [
        torch.tensor([0, *lengths]).cumsum(0).to(device=DEVICE, dtype=torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K)
    ]
    prefix = torch.tensor(PREFIX, dtype=torch.int32, device=DEVICE)
    out, lse = attention_varlen(
        *leaves, *starts, max(LENGTHS_Q), max(LENGTHS_K), prefix_len=prefix, return_lse=True, impl=impl, **options
    )
    gradients = torch.autograd.grad(out, leaves, upstream)
    return dict(zip(("out", "lse", "d_q", "d_k", "d_v"), (out.detach(), lse, *gradients), strict=True))


def _assert_right(head_dim: int, dtype: torch.dtype = torch.float32, slack: float = 3.0, **options: Any) -> None:
    """Results within twice the budget, gradients within `slack` times."""
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS_Q) + 3, 2), (sum(LENGTHS_K) + 5, 1), (sum(LENGTHS_K) + 5, 1), (sum(LENGTHS_Q) + 3, 2)]
    inputs = [torch.randn(*shape, head_dim, device=DEVICE).to(dtype).double() for shape in shapes]
    exact = _results(torch.float64, "reference", inputs, **options)
    eager = _results(dtype, "reference", inputs, **options)
    actual = _results(dtype, "triton", inputs, **options)
    for name, wanted in exact.items():
        assert_within_budget(name, actual[name], wanted, eager[name], slack if name.startswith("d_") else 2.0)


@needs_kernels
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_every_shape_of_tile(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int) -> None:
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(block_m, block_n, 4, 1))
    _assert_right(16)


@needs_kernels
@pytest.mark.parametrize("head_dim", [1, 8, 24, 96, 128, 200, 256])
def test_head_sizes_that_are_padded_or_large(head_dim: int) -> None:
    _assert_right(head_dim, torch.bfloat16, dropout_p=0.2, dropout_seed=3)


@needs_kernels
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 2.0])
def test_any_scale(softmax_scale: float) -> None:
    # the backward forms exp2(score - log-sum), eager's softmax takes the maximum away first: large scores leave more
    # roundings (up to 4.1 times eager's error and one rounding, over six seeds at a scale of 2 on an AMD CPU)
    _assert_right(16, slack=3.0 * max(1.0, abs(softmax_scale)), softmax_scale=softmax_scale)


@needs_kernels
def test_offsets_of_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past 2**31 elements in a sequence the loops count in 64 bits; no test has such memory, so they are made to."""
    wide = []

    def run(self: Launch, device: torch.device) -> None:
        if "WIDE" in self.arguments:
            wide.append(self.name)
            self = replace(self, arguments={**self.arguments, "WIDE": True})
        original(self, device)

    original = Launch.run
    monkeypatch.setattr(Launch, "run", run)
    _assert_right(16)
    assert wide == ["forward_kernel", "dq_kernel", "dkdv_kernel"]


def test_the_host_chooses_64_bits_where_32_are_too_few() -> None:
    """A view whose rows lie 3 * 4096 numbers apart, in sequences of up to 170,000 tokens: 2.1e9 of them."""
    with torch.device("meta"):
        starts = torch.empty(2, dtype=torch.int32)
        for longest, wide in ((174_000, False), (175_000, True)):
            q = torch.empty(longest, 3, 32, 128).unbind(1)[0]
            call = triton_launches.AttentionLaunches(
                q, q, q, starts, starts, starts[:1], None, None, 1.0, 0.0, longest, longest, False, "sm_90", "half"
            )
            assert call.arguments["WIDE"] == wide


@needs_kernels
def test_a_tile_that_does_not_fit_is_replaced_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def launch(self: Launch, tile: Tile) -> None:
        tried.append(tile)
        if tile.num_stages * tile.block_m * tile.block_n > 64 * 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        original(self, tile)

    original = Launch.launch
    monkeypatch.setattr(Launch, "launch", launch)
    monkeypatch.setattr(launching, "_replaced", {})
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(128, 64, 8, 3))
    with caplog.at_level(logging.WARNING):
        _assert_right(16)
    by_kernel = 4  # for each: 3 stages, 2, 1, then half the rows, which fits
    fits = Tile(64, 64, 8, 1)
    assert tried == [Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), fits] * by_kernel
    assert "forward_kernel: Tile(block_m=128, block_n=64, num_warps=8, num_stages=3) does not fit" in caplog.text
    tried.clear()
    _assert_right(16)
    assert tried == [fits] * by_kernel


@needs_kernels
def test_a_device_without_room_for_any_tile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(self: Launch, tile: Tile) -> None:
        raise OutOfResources(300_000, 1_000, "shared memory")

    monkeypatch.setattr(Launch, "launch", launch)
    monkeypatch.setattr(launching, "_replaced", {})
    with pytest.raises(OutOfResources, match="Required: 300000"):
        _assert_right(16)


def test_every_tile_of_the_table_is_there() -> None:
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        for head_dim in (1, 16, 17, 64, 80, 128, 129, 256):
            for kernel in ("forward", "dq", "dkdv"):
                for kind in ("half", "ieee") if arch == "gfx942" else ("half", "tf32", "ieee"):
                    assert triton_launches.tile_for(f"{kernel} {kind}", arch, head_dim).block_m >= 16
            assert triton_launches.tile_for("delta", arch, head_dim).block_m >= 16


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
)
def test_a_gpu_takes_the_newest_row_not_newer_than_itself(capability: tuple[int, int], arch: str) -> None:
    assert launching._nearest(capability) == arch


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "allow_tf32", "fp32_precision"])
def test_float32_follows_each_of_torchs_settings(way: str) -> None:
    """In a process of its own: torch refuses to be asked by an old name once a new one was used."""
    setting = {
        "set_float32_matmul_precision": "torch.set_float32_matmul_precision('high')",
        "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
        "fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    }[way]
    code = f"""
import torch
from antlm_fast.kernels.triton_support.launch import kind_of
before = kind_of(torch.float32)
{setting}
print(before, kind_of(torch.float32), kind_of(torch.bfloat16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "tf32", "half"]


@needs_kernels
def test_a_bound_beyond_all_rows_is_served() -> None:
    q = torch.randn(20, 2, 16, device=DEVICE)
    starts = torch.tensor([0, 5, 20], dtype=torch.int32, device=DEVICE)
    wanted = attention_varlen(q, q, q, starts, starts, 15, 15, causal=True, impl="triton")
    huge = 2**31 - 1
    assert torch.equal(attention_varlen(q, q, q, starts, starts, huge, huge, causal=True, impl="triton"), wanted)


@needs_kernels
@pytest.mark.parametrize("changed", ["prefix_len", "dropout_seed"])
def test_a_flag_may_change_before_the_backward(changed: str) -> None:
    q = torch.randn(1, 20, 2, 16, device=DEVICE, requires_grad=True)
    flags = {
        "prefix_len": torch.tensor([7], dtype=torch.int32, device=DEVICE),
        "dropout_seed": torch.tensor(3, device=DEVICE),
    }
    gradients = []
    for change in (False, True):
        out = attention(q, q, q, **flags, dropout_p=0.2, impl="triton")
        if change:
            flags[changed].add_(1)
        gradients.append(torch.autograd.grad(out.square().sum(), q)[0])
    assert torch.equal(*gradients)


@needs_kernels
def test_an_upstream_gradient_of_any_layout() -> None:
    q = torch.randn(1, 20, 2, 16, device=DEVICE, requires_grad=True)
    upstream = torch.randn(1, 16, 2, 20, device=DEVICE).transpose(1, 3)
    out = attention(q, q, q, causal=True, impl="triton")
    wanted = torch.autograd.grad(out, q, upstream.contiguous(), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, q, upstream)[0], wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_captured_graph_follows_the_flag_and_nothing_waits() -> None:
    q = torch.randn(2, 100, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    flag = torch.ones((), dtype=torch.bool, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = attention(q, q, q, causal=flag, impl="triton")
        return out, torch.autograd.grad(out, q, torch.ones_like(out))[0]

    wanted = {}
    for causal in (True, False):
        flag.fill_(causal)
        # detached: a graph of autograd that lives on would keep q's node on this stream, and the capture has its own
        wanted[causal] = [x.detach().clone() for x in step()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()  # its result is dropped at once
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for causal in (True, False, True):
        flag.fill_(causal)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, wanted[causal], strict=True))
