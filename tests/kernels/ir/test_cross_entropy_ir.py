"""Linear cross-entropy as each architecture's compiler leaves it, against the reference; and without its masks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.testing.budget import assert_within_budget

pytest.importorskip("triton")

from antlm_fast.kernels.linear_cross_entropy import triton_kernels, triton_launches
from antlm_fast.kernels.triton_support.launch import Tile

Executing = Callable[[str], AbstractContextManager[list[str]]]
# the matrix product that the compiler chooses
INSTRUCTIONS = {"sm_80": "tt.dot", "sm_90": "ttng.warp_group_dot", "sm_100": "ttng.tc_gen5_mma"}
IGNORED = -100


@pytest.fixture(params=INSTRUCTIONS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backward's tensors say where they really lie, so the tiles of the architecture are named here."""
    monkeypatch.setattr(triton_launches, "arch_of", lambda device: request.param)
    monkeypatch.setattr(triton_launches, "_SPLIT_COLS", 128)
    return request.param


def _inputs(rows: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As the dtype holds them; a third of the rows has no label, a third is predicted right."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, hidden_size), torch.randn(vocab, hidden_size) / hidden_size**0.5
    targets = (hidden @ weight.t()).argmax(1)
    targets[1::3] = torch.randint(vocab, (rows,))[1::3]
    targets[2::3] = IGNORED
    floats = {"hidden": hidden, "weight": weight, "bias": torch.randn(vocab), "upstream": torch.randn(rows)}
    return {**{name: x.to(dtype) for name, x in floats.items()}, "targets": targets}


def _results(inputs: dict[str, torch.Tensor], dtype: torch.dtype, impl: str, **options: Any) -> dict[str, torch.Tensor]:
    leaves = [inputs[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight", "bias")]
    losses, metrics = linear_cross_entropy(
        *leaves[:2], inputs["targets"], bias=leaves[2], reduction="none", return_metrics=True, impl=impl, **options
    )
    gradients = torch.autograd.grad(losses, leaves, inputs["upstream"].to(losses.dtype))
    return {
        "losses": losses.detach(),
        "lse": metrics.lse,
        "correct": metrics.correct.float(),
        **dict(zip(("d_hidden", "d_weight", "d_bias"), gradients, strict=True)),
    }


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "vocab", "options"),
    [
        (torch.bfloat16, 192, 300, {}),
        (torch.bfloat16, 80, 257, {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 3.0}),
        (torch.float16, 64, 300, {}),
        (torch.float32, 64, 100, {}),
    ],
    ids=["bfloat16", "bfloat16-every-option", "float16", "float32"],
)
def test_results_and_gradients(
    executing_ttgir: Executing,
    arch: str,
    dtype: torch.dtype,
    hidden_size: int,
    vocab: int,
    options: dict[str, Any],
) -> None:
    inputs = _inputs(140, hidden_size, vocab, dtype)
    exact, eager = (_results(inputs, of, "reference", **options) for of in (torch.float64, dtype))
    with executing_ttgir(arch) as modules:
        actual = _results(inputs, dtype, "triton", **options)
    for name, wanted in exact.items():
        assert_within_budget(name, actual[name], wanted, eager[name], 3.0 if name.startswith("d_") else 2.0)
    assert len(modules) == 2
    for module in modules:
        assert f'ttg.target = "cuda:{arch[3:]}"' in module
        assert "ttg.async_copy_global_to_local" in module
        if dtype != torch.float32:  # "ieee" takes the fused multiply-adds of plain arithmetic
            assert INSTRUCTIONS[arch] in module


def test_other_targets_and_numbers_of_rows_run_the_same_code(executing_ttgir: Executing) -> None:
    batches = [_inputs(rows, 64, 64, torch.bfloat16) for rows in (70, 33)]
    with executing_ttgir("sm_90") as modules:
        results = [_results(batch, torch.bfloat16, "triton") for batch in batches]
    wanted = [_results(batch, torch.float32, "reference") for batch in batches]
    assert modules[:2] == modules[2:]
    for a, b in zip(results, wanted, strict=True):
        torch.testing.assert_close(a["losses"], b["losses"], rtol=1e-3, atol=1e-3)


Variant = Callable[..., dict[str, ModuleType]]


@pytest.fixture(scope="module")
def variant() -> Iterator[Variant]:
    """The folder of benchmarks is no installed package: it is importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3]))
        yield importlib.import_module("benchmarks.variants").variant
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


D_LOGITS, FORWARD = "d_logits_kernel", "forward_kernel"
# fault: (kernel, text of its source, the text in its place, what the fault says)
MUTANTS = {
    "d_logits' rows": (
        D_LOGITS,
        "inside = (rows < num_rows)[:, None]",
        "inside = (rows >= 0)[:, None]",
        "past the end .* `d_logits_ptr`",
    ),
    "d_logits' padding": (
        D_LOGITS,
        "(cols < stride_d)[None, :]",
        "(cols >= 0)[None, :]",
        "program instances .* `d_logits_ptr`|past the end .* `d_logits_ptr`",
    ),
    "d_logits' store": (D_LOGITS, "element_ty), mask=inside)", "element_ty))", "`d_logits_ptr`"),
    "the last classes": (
        FORWARD,
        "at = tl.minimum(cols, vocab_size - 1)",
        "at = cols",
        "past the end .* `weight_ptr`",
    ),
    "the last rows": (
        FORWARD,
        "at = tl.minimum(rows, num_rows - 1)",
        "at = rows",
        "past the end .* `(hidden|targets|counts)_ptr`",
    ),
    "the partials' rows": (
        FORWARD,
        "target_logit, mask=rows < num_rows)",
        "target_logit)",
        "past the end .* `partials_ptr`|program instances .* `partials_ptr`",
    ),
}


def _train_step() -> dict[str, torch.Tensor]:
    return _results(_inputs(17, 64, 39, torch.bfloat16), torch.bfloat16, "triton")


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_missing_mask_is_caught(
    executing_ttgir: Executing, variant: Variant, monkeypatch: pytest.MonkeyPatch, fault: str, arch: str
) -> None:
    from ttsem.sanitize import KernelFault

    kernel, old, new, message = MUTANTS[fault]
    module = variant(("triton_kernels", old, new), modules=[triton_kernels])["triton_kernels"]
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 32, 4, 2))
    monkeypatch.setattr(triton_launches, kernel, getattr(module, kernel))
    with pytest.raises(KernelFault, match=message), executing_ttgir(arch):
        _train_step()


def test_the_same_step_without_a_fault_is_accepted(
    executing_ttgir: Executing, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(triton_launches, "tile_for", lambda *_: Tile(32, 32, 4, 2))
    wanted = _results(_inputs(17, 64, 39, torch.bfloat16), torch.float32, "reference")
    with executing_ttgir(arch) as modules:
        actual = _train_step()
    assert len(modules) == 2
    for name, x in actual.items():
        torch.testing.assert_close(x.float(), wanted[name].float(), rtol=2e-2, atol=2e-2)
