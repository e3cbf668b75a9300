"""The fused layers under torch's tracers: torch.compile, the checks of custom ops, tensors without memory."""

from __future__ import annotations

import pytest
import torch

from antlm_fast.kernels.fused_layers import add_dropout, add_norm, gated_unit, layer_norm, rotary, rotary_qkv
from antlm_fast.kernels.native.library import unavailable_reason

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def native() -> None:
    if reason := unavailable_reason("cpu", F32):
        pytest.skip(reason)


def layer(x, residual, weight, cos, sin, seed):  # type: ignore[no-untyped-def]
    total, normed = add_norm(
        x, residual, weight=weight, eps=1e-3, dropout_p=0.2, dropout_seed=seed, out_dtype=BF16, impl="native"
    )
    gated = gated_unit(normed, activation="gelu_tanh", gate_first=False, norm_eps=1e-3, out_dtype=F32, impl="native")
    q, k, v = rotary_qkv(gated.view(-1, 4, 6), cos, sin, heads=2, kv_heads=1, impl="native")
    turned = rotary(torch.cat((q, k, v), 1), cos, sin, impl="native").flatten(1)
    dropped = add_dropout(turned, residual[:, :24], dropout_p=0.1, dropout_seed=seed, impl="native")
    return total, layer_norm(dropped, kind="layer", eps=1e-3, impl="native")


def layer_inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(7, 48).bfloat16(), *(torch.randn(shape) for shape in ((7, 48), (48,), (7, 1, 6), (7, 1, 6)))]
    return [*(x.requires_grad_() for x in tensors[:3]), *tensors[3:], torch.tensor(3)]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dynamic", [False, True])
def test_native_ops_are_one_graph(dynamic: bool) -> None:
    inputs = layer_inputs()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for call in (layer, compiled):
        total, out = call(*inputs)
        results.append((total, out, *torch.autograd.grad(total.sum() + (out * out.detach()).sum(), inputs[:3])))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.usefixtures("native")
def test_native_ops_that_draw_their_seed_are_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: add_norm(x, x, eps=1e-3, dropout_p=0.5, impl="auto"), backend="aot_eager", fullgraph=True
    )
    x = torch.ones(20, 30)
    total, _ = compiled(x)
    assert 0.3 < (total == 3).double().mean().item() < 0.7
    assert ((total == 1) | (total == 3)).all()


@pytest.mark.usefixtures("native")
def test_opcheck() -> None:
    x, residual, weight, cos, sin, seed = layer_inputs()
    ops = torch.ops.antlm_fast
    heads = torch.randn(7, 8, 6, requires_grad=True)
    for op, arguments in (
        (ops.native_add_norm, (x, residual, weight, weight, seed, 0.2, 1e-3, True, BF16)),
        (ops.native_add_norm, (x, None, None, None, None, 0.0, 1e-3, False, F32)),
        (ops.native_layer_norm, (x, weight, None, 1e-3, False, F32)),
        (ops.native_add_dropout, (x, residual, seed, 0.2)),
        (ops.native_gated_unit, (x, 2, True, 1e-3, BF16)),
        (ops.native_gated_unit, (residual, 0, False, 0.0, F32)),
        (ops.native_rotary, (heads, cos, sin)),
        (ops.native_rotary_qkv, (heads, cos, sin, 4, 2, False)),
    ):
        torch.library.opcheck(op, arguments)


def test_on_a_gpu_that_is_not_there_torch_serves() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(6, 8, 10, dtype=BF16, device="cuda")
        table = torch.empty(6, 1, 10, device="cuda")
        total, normed = add_norm(x, x.float(), eps=1e-3, dropout_p=0.1, out_dtype=BF16)
        gated = gated_unit(normed, activation="silu", gate_first=True)
        q, k, v = rotary_qkv(x, table, table, heads=4, kv_heads=2)
    for out, shape, dtype in (
        (total, (6, 8, 10), F32),
        (normed, (6, 8, 10), BF16),
        (gated, (6, 8, 5), BF16),
        (q, (6, 4, 10), BF16),
        (k, (6, 2, 10), BF16),
        (v, (6, 2, 10), BF16),
    ):
        assert (out.shape, out.dtype, out.device.type) == (shape, dtype, "cuda")
