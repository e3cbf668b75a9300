"""What a wrong call of a fused layer is told, and which implementation serves which call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from antlm_fast.kernels.dispatch import IMPLS, UnsupportedError
from antlm_fast.kernels.fused_layers import OPS, add_dropout, add_norm, gated_unit, layer_norm, rotary, rotary_qkv

X, HALF, WIDE = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.float64)
HEADS, TABLE = torch.ones(3, 4, 6), torch.ones(3, 1, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.int(),), {}, TypeError, "x must be float16, bfloat16, float32 or float64; got torch.int32"),
        ((X[:, :0],), {}, ValueError, r"x must have shape \(..., columns\), at least one column; got \(3, 0\)"),
        ((X, HALF), {}, TypeError, "residual must be float32 or of x's dtype torch.float32; got torch.bfloat16"),
        ((WIDE, X), {}, TypeError, "residual must be float32 or of x's dtype torch.float64; got torch.float32"),
        ((X, X[:2]), {}, ValueError, r"residual must have x's shape \(3, 4\); got \(2, 4\)"),
        ((X, X.to("meta")), {}, ValueError, "residual must be on x's device cpu; got meta"),
        ((X,), {"out_dtype": torch.int8}, TypeError, "out_dtype must be float16, .*; got torch.int8"),
        ((X,), {"kind": "batch"}, ValueError, "kind must be one of 'rms', 'layer'; got 'batch'"),
        ((X,), {"eps": 0.0}, ValueError, "eps must be finite and above 0; got 0.0"),
        ((X,), {"bias": X[0]}, ValueError, "bias must be None without a weight; got a tensor"),
        ((X,), {"weight": X[0, :3]}, ValueError, r"weight must have shape \(4,\); got \(3,\)"),
        (
            (X,),
            {"weight": X[0].double()},
            TypeError,
            "weight must be floating, and float64 where x is; got torch.float64",
        ),
        ((X,), {"weight": X[0].to("meta")}, ValueError, "weight must be on x's device cpu; got meta"),
        ((X,), {"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1; got 1.0"),
        ((X,), {"dropout_p": 0.1, "dropout_seed": 2**63}, ValueError, "dropout_seed must fit 64 bits; got 9"),
        ((X,), {"dropout_p": 0.1, "dropout_seed": 0.5}, TypeError, "dropout_seed must be an int or .*; got float"),
        (
            (X,),
            {"dropout_p": 0.1, "dropout_seed": torch.zeros(1).long()},
            ValueError,
            r"must have shape \(\); got \(1,\)",
        ),
    ],
)
def test_add_norm(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_norm(*arguments, **{"eps": 1e-3} | options)


def test_the_others() -> None:
    with pytest.raises(ValueError, match="eps must be finite and above 0; got -1.0"):
        layer_norm(X, eps=-1.0)
    with pytest.raises(ValueError, match="dropout_p must be at least 0 and below 1; got -0.1"):
        add_dropout(X, dropout_p=-0.1)
    with pytest.raises(ValueError, match="x must have an even number of columns, gate and value; got 3"):
        gated_unit(X[:, :3], activation="silu", gate_first=True)
    with pytest.raises(ValueError, match="activation must be one of 'silu', 'gelu_tanh', 'gelu'; got 'relu'"):
        gated_unit(X, activation="relu", gate_first=True)
    with pytest.raises(ValueError, match="norm_eps must be finite and above 0; got 0.0"):
        gated_unit(X, activation="silu", gate_first=True, norm_eps=0.0)
    with pytest.raises(ValueError, match=r"x must have shape \(tokens, heads, head_dim\); got \(3, 4\)"):
        rotary(X, TABLE, TABLE)
    with pytest.raises(ValueError, match="x must have an even head_dim; got 5"):
        rotary(HEADS[..., :5], TABLE, TABLE)
    with pytest.raises(TypeError, match="cos must be float32; got torch.float64"):
        rotary(HEADS, TABLE.double(), TABLE)
    with pytest.raises(ValueError, match=r"sin must have shape \(3, 1, 6\); got \(2, 1, 6\)"):
        rotary(HEADS, TABLE, TABLE[:2])
    with pytest.raises(ValueError, match=r"x must have heads \+ 2 \* kv_heads = 1 \+ 2 \* 1 heads; got 4"):
        rotary_qkv(HEADS, TABLE, TABLE, heads=1, kv_heads=1)


def test_the_table_of_each_op_has_a_reference_and_prefers_native() -> None:
    assert set(OPS) == {"add_norm", "add_dropout", "layer_norm", "gated_unit", "rotary", "rotary_qkv"}
    for table in OPS.values():
        assert list(table) == ["native", "torch", "reference"]
        assert set(table) <= set(IMPLS)


def test_native_says_what_it_does_not_compute() -> None:
    with pytest.raises(UnsupportedError, match=r"add_norm\(impl='native'\): .* float32 and bfloat16, not float64"):
        add_norm(WIDE, WIDE, eps=1e-3, impl="native")
    with pytest.raises(UnsupportedError, match=r"layer_norm\(impl='native'\): .* float32 and bfloat16, not float16"):
        layer_norm(X, eps=1e-3, out_dtype=torch.float16, impl="native")
    with pytest.raises(UnsupportedError, match=r"rotary\(impl='native'\): .* run on the CPU, not on meta"):
        rotary(HEADS.to("meta"), TABLE.to("meta"), TABLE.to("meta"), impl="native")
    with pytest.raises(UnsupportedError, match="this version has no triton implementation of gated_unit"):
        gated_unit(X, activation="silu", gate_first=True, impl="triton")
