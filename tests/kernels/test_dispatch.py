"""The choice of an implementation: what is asked for is served or refused, and auto says once what it took."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from antlm_fast.kernels import attention as attention_op
from antlm_fast.kernels import linear_cross_entropy as loss_op
from antlm_fast.kernels.dispatch import IMPLS, Implementation, ImplementationRow, UnsupportedError, choose, survey
from antlm_fast.kernels.native import library as native
from antlm_fast.kernels.triton_support import availability


@dataclass(frozen=True)
class Call:
    size: int


def _only_even(call: Call) -> str | None:
    return None if call.size % 2 == 0 else f"needs an even size, got {call.size}"


def _only_small(call: Call) -> str | None:
    return None if call.size < 100 else f"needs a size below 100, got {call.size}"


TABLE = {"native": Implementation(_only_even, lambda: "native"), "torch": Implementation(_only_small, lambda: "torch")}


def test_auto_takes_the_first_that_serves() -> None:
    assert choose("op", TABLE, "auto", Call(2)).forward() == "native"
    assert choose("op", TABLE, "auto", Call(3)).forward() == "torch"


def test_auto_logs_once_for_each_kind_of_call(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "antlm_fast.kernels.dispatch"):
        for size in (5, 5, 7, 5):
            choose("logged_op", TABLE, "auto", Call(size))
    assert [record.getMessage() for record in caplog.records] == [
        "logged_op: impl='auto' takes 'torch' for Call(size=5)",
        "logged_op: impl='auto' takes 'torch' for Call(size=7)",
    ]


def test_auto_with_nothing_that_serves_gives_every_reason() -> None:
    with pytest.raises(UnsupportedError) as raised:
        choose("op", TABLE, "auto", Call(101))
    message = str(raised.value)
    assert message.startswith(
        "op(impl='auto'): no implementation serves this call (native: needs an even size, got 101"
    )
    assert "torch: needs a size below 100, got 101" in message


def test_explicit_never_falls_back() -> None:
    with pytest.raises(UnsupportedError) as raised:
        choose("op", TABLE, "native", Call(3))
    assert str(raised.value) == "op(impl='native'): needs an even size, got 3"


def test_a_name_that_is_not_built_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError) as raised:
        choose("op", TABLE, "triton", Call(2))
    assert str(raised.value) == "op(impl='triton'): this version has no triton implementation of op"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="impl must be one of") as raised:
        choose("op", TABLE, "cuda", Call(2))
    wanted = "impl must be one of 'auto', 'reference', 'native', 'triton', 'torch'; got 'cuda'"
    assert str(raised.value) == wanted


def test_survey_has_a_row_for_every_name() -> None:
    assert survey("op", TABLE, Call(3)) == [
        ImplementationRow("native", "needs an even size, got 3", False),
        ImplementationRow("torch", None, True),
        ImplementationRow("reference", "this version has no reference implementation of op", False),
        ImplementationRow("triton", "this version has no triton implementation of op", False),
    ]


def test_every_op_exports_a_table_of_known_names_with_a_reference() -> None:
    ops = {**attention_op.OPS, **loss_op.OPS}
    assert set(ops) == {"attention", "attention_varlen", "linear_cross_entropy"}
    for table in ops.values():
        assert "reference" in table
        assert set(table) <= set(IMPLS) - {"auto"}


def test_ops_name_themselves_and_why_the_kernels_in_c_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", lambda: "the C++ kernels are not built")
    x = torch.randn(1, 2, 1, 4)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    message = r"{0}\(impl='native'\): the C\+\+ kernels are not built$"
    with pytest.raises(UnsupportedError, match=message.format("attention")):
        attention_op.attention(x, x, x, causal=True, impl="native")
    with pytest.raises(UnsupportedError, match=message.format("attention_varlen")):
        attention_op.attention_varlen(x[0], x[0], x[0], cu, cu, 2, 2, causal=True, impl="native")
    with pytest.raises(UnsupportedError, match=message.format("linear_cross_entropy")):
        loss_op.linear_cross_entropy(x[0, :, 0], x[0, :, 0], torch.tensor([0, 1]), impl="native")
    call = attention_op.AttentionCall("cpu", torch.bfloat16, 64, 8, 8)
    rows = survey("attention", attention_op.OPS["attention"], call)
    assert [(row.impl, row.chosen) for row in rows if row.impl in ("native", "torch")] == [
        ("native", False),
        ("torch", True),
    ]


@pytest.mark.parametrize("missing", [False, True])
def test_triton_attention_says_why_it_cannot_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(availability, "find_spec", lambda name: None if missing else object())
    install = "triton is not installed (pip install '.[gpu]' in antlm_fast's checkout)"
    reason = install if missing else "Triton kernels run on CUDA"
    x = torch.randn(1, 2, 1, 4)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(UnsupportedError) as dense:
        attention_op.attention(x, x, x, causal=True, impl="triton")
    assert str(dense.value).startswith(f"attention(impl='triton'): {reason}")
    with pytest.raises(UnsupportedError) as packed:
        attention_op.attention_varlen(x[0], x[0], x[0], cu, cu, 2, 2, causal=True, impl="triton")
    assert str(packed.value).startswith(f"attention_varlen(impl='triton'): {reason}")


def test_whether_triton_serves_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.13 cannot follow find_spec: no op was one graph there."""
    monkeypatch.setattr(availability, "find_spec", torch.compiler.disable(lambda name: None))

    def length(x: torch.Tensor) -> torch.Tensor:
        return x + len(availability.unavailable_reason("cpu") or "")

    x = torch.zeros(2)
    assert torch.equal(torch.compile(length, backend="eager", fullgraph=True)(x), length(x))


def test_ops_need_nothing_but_torch() -> None:
    """A fresh process in which the optional packages cannot be imported still computes."""
    code = """
import sys
for name in ("triton", "transformers", "tokenizers", "numpy.testing"):
    sys.modules[name] = None
import torch
from antlm_fast.kernels.attention import attention
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
x = torch.ones(1, 3, 1, 4)
assert torch.equal(attention(x, x, x, causal=True, impl="reference"), x)
loss = linear_cross_entropy(x[0, :, 0], torch.ones(2, 4), torch.tensor([0, 1, 1]))
print(f"{loss.item():.4f}")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "0.6931"
