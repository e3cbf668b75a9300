"""The yardstick computes attention: a wrong one would make the comparison of instructions worthless."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("its numbers are checked on the CPU under TRITON_INTERPRET=1", allow_module_level=True)

FOLDER = Path(__file__).parents[2] / "benchmarks"
BATCH, HEADS, SEQLEN = 2, 3, 128


@pytest.fixture(scope="module")
def plain():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("peers.plain_flash_attention")
    for name in ("peers", "peers.plain_flash_attention"):
        sys.modules.pop(name, None)


def expected(q, k, v, grad_out, causal, scale):
    """Out, lse, delta and the gradients in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1), float("-inf"))
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    out.backward(grad_out.double())
    delta = (out * grad_out).sum(-1).transpose(1, 2).contiguous()
    return out.detach(), scores.logsumexp(-1).detach(), delta.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("tile", [(64, 32), (128, 64), (32, 32)])
@pytest.mark.parametrize("keep_loop", [False, True])
def test_forward_and_gradients_are_those_of_attention(plain, causal, head_dim, tile, keep_loop):
    wide, narrow = tile
    torch.manual_seed(0)
    q, k, v, grad_out = torch.randn(4, BATCH, SEQLEN, HEADS, head_dim).unbind()
    scale = 0.3
    out, lse, delta, *gradients = expected(q, k, v, grad_out, causal, scale)
    shape = (q.stride(1), q.stride(2), SEQLEN, HEADS, scale)
    options = {"CAUSAL": causal, "HEAD_DIM": head_dim, "KEEP_LOOP": keep_loop}

    found_out, found_lse = torch.full_like(q, float("nan")), torch.full((BATCH, HEADS, SEQLEN), float("nan"))
    grid = (SEQLEN // wide, BATCH * HEADS)
    plain.plain_forward[grid](q, k, v, found_out, found_lse, *shape, **options, BLOCK_M=wide, BLOCK_N=narrow)
    torch.testing.assert_close(found_out.double(), out, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found_lse.double(), lse, atol=2e-6, rtol=2e-6)

    dq, dk, dv = (torch.full_like(q, float("nan")) for _ in range(3))
    rows = (found_lse, delta.float())
    plain.plain_dq[grid](q, k, v, grad_out, *rows, dq, *shape, **options, BLOCK_M=wide, BLOCK_N=narrow)
    plain.plain_dkdv[grid](q, k, v, grad_out, *rows, dk, dv, *shape, **options, BLOCK_M=narrow, BLOCK_N=wide)
    for found, right in zip((dq, dk, dv), gradients, strict=True):
        torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)
