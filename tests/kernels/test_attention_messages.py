"""What attention refuses, and what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from antlm_fast.kernels.attention import attention, attention_varlen

Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, "q must have shape (batch, seqlen, heads, head_dim); got (3, 4, 8)"),
        ({"q": Q.int()}, TypeError, "q must be float16, bfloat16, float32 or float64; got torch.int32"),
        ({"k": K.half()}, TypeError, "k must have q's dtype torch.float32; got torch.float16"),
        ({"v": K.to("meta")}, ValueError, "v must be on q's device cpu; got meta"),
        ({"v": K[:, :4]}, ValueError, "v must have k's shape (2, 5, 2, 8); got (2, 4, 2, 8)"),
        ({"q": Q[..., :6]}, ValueError, "k must have q's head_dim 6, at least 1; got 8"),
        ({"q": Q[:, :, :3]}, ValueError, "q must have a multiple of k's 2 heads, at least 1; got 3"),
        ({"q": Q[:1]}, ValueError, "k must have q's batch size 1; got 2"),
        ({"causal": None}, ValueError, "causal or prefix_len must be given, and not both; got neither"),
        ({"prefix_len": CU[:2]}, ValueError, "causal or prefix_len must be given, and not both; got both"),
        ({"causal": 1}, TypeError, "causal must be a bool or a bool tensor; got int"),
        ({"causal": CU[:2]}, TypeError, "causal must be a bool or a bool tensor; got torch.int32"),
        ({"causal": torch.ones(3) > 0}, ValueError, "causal must have shape () or (2,); got (3,)"),
        ({"causal": (torch.ones(2) > 0).to("meta")}, ValueError, "causal must be on q's device cpu; got meta"),
        ({"causal": None, "prefix_len": 3}, TypeError, "prefix_len must be an int32 tensor; got int"),
        (
            {"causal": None, "prefix_len": CU[:2].long()},
            TypeError,
            "prefix_len must be an int32 tensor; got torch.int64",
        ),
        ({"causal": None, "prefix_len": CU[0]}, ValueError, "prefix_len must have shape (2,); got ()"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite; got nan"),
        (
            {"softmax_scale": torch.nn.Parameter(torch.tensor(0.3))},
            TypeError,
            "softmax_scale must be a float, which has no gradient; got a tensor (multiply q by it)",
        ),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1; got 1.0"),
        ({"dropout_p": 0.1, "dropout_seed": 2**63}, ValueError, f"dropout_seed must fit 64 bits; got {2**63}"),
        (
            {"dropout_p": 0.1, "dropout_seed": 1.0},
            TypeError,
            "dropout_seed must be an int or an int64 tensor; got float",
        ),
        ({"dropout_p": 0.1, "dropout_seed": CU.long()}, ValueError, "dropout_seed must have shape (); got (3,)"),
    ],
)
def test_dense_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"q": Q, "k": K, "v": K, "causal": True, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q must be int32; got torch.int64"),
        ({"cu_seqlens_q": CU[None]}, ValueError, "cu_seqlens_q must have shape (num_seqs + 1,); got (1, 3)"),
        ({"cu_seqlens_k": CU.to("meta")}, ValueError, "cu_seqlens_k must be on q's device cpu; got meta"),
        ({"cu_seqlens_q": CU + 1}, ValueError, "cu_seqlens_q must begin with 0; got 1"),
        ({"cu_seqlens_k": CU * 2}, ValueError, "cu_seqlens_k must end at or before row 5; got 6"),
        ({"cu_seqlens_k": CU[[0, 2, 1]]}, ValueError, "cu_seqlens_k must never decrease; got a step of -1"),
        ({"cu_seqlens_k": CU[:2]}, ValueError, "cu_seqlens_k must have cu_seqlens_q's length 3; got 2"),
        ({"max_seqlen_q": 1}, ValueError, "max_seqlen_q must be at least the longest sequence, 2; got 1"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0; got -1"),
        ({"max_seqlen_k": CU[0]}, TypeError, "max_seqlen_k must be an int; got Tensor"),
        ({"causal": torch.ones(3) > 0}, ValueError, "causal must have shape () or (2,); got (3,)"),
    ],
)
def test_packed_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {
        "cu_seqlens_q": CU,
        "cu_seqlens_k": CU,
        "max_seqlen_q": 2,
        "max_seqlen_k": 2,
        "causal": True,
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        attention_varlen(Q[0], K[0], K[0], **{**call, **change})
