"""How the layers are put together: what is float32 under autocast and what is not, which implementation is asked."""

import pytest
import torch

from antlm_fast.models import BabyLlama, BabyLlamaConfig, LtgBert, LtgBertConfig, layer_parts
from antlm_fast.models.language_model import layer_impl
from antlm_fast.models.layer_parts import Linear, Pending, joint_product, linear_impl, product_dtype

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = [BabyLlama(BabyLlamaConfig(**SIZES)), LtgBert(LtgBertConfig(**SIZES))]
IDS = torch.arange(18).view(2, 9)


@pytest.fixture
def sums(monkeypatch):
    """What the layers add to the residual stream: (x, value, total, normed) dtypes of every sum with a norm."""
    seen = []
    add_norm = layer_parts.add_norm

    def watched(value, x, **options):
        total, normed = add_norm(value, x, **options)
        seen.append((x.dtype, value.dtype, total.dtype, normed.dtype, options["impl"]))
        return total, normed

    monkeypatch.setattr(layer_parts, "add_norm", watched)
    return seen


@pytest.mark.parametrize("made", MODELS, ids=lambda made: type(made).__name__)
def test_under_autocast_the_stream_is_float32_and_what_products_read_is_not(made, sums):
    read = []
    hooks = [
        part.register_forward_hook(lambda _, inputs, out: read.append((inputs[0].dtype, out.dtype)))
        for part in made.modules()
        if isinstance(part, Linear)
    ]
    for dtype, is_on in ((torch.float32, False), (torch.bfloat16, True)):
        read.clear(), sums.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            made.hidden_states(IDS, causal=True)
        assert len(sums) == (4 if isinstance(made, BabyLlama) else 3)
        assert {each[:4] for each in sums} == {(torch.float32, dtype, torch.float32, dtype)}
        assert set(read) == {(dtype, dtype)}
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
def test_the_implementation_that_is_asked_for_is_asked_of_the_layers(impl, sums):
    MODELS[0].hidden_states(IDS, causal=True, impl=impl)
    assert {each[4] for each in sums} == {impl}


def test_where_there_is_no_implementation_of_a_name_the_best_is_taken():
    assert [layer_impl(impl) for impl in ("auto", "reference", "torch", "native", "triton")] == [
        "auto",
        "reference",
        "torch",
        "native",
        "auto",
    ]
    assert [linear_impl(impl) for impl in ("auto", "reference", "torch", "native")] == [
        "auto",
        "reference",
        "torch",
        "auto",
    ]


def test_products_read_autocasts_dtype_but_for_float64():
    x = torch.ones(1)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.double()) == torch.float64


def test_a_joint_product_is_each_layers_own():
    torch.manual_seed(0)
    layers = [Linear(6, 5), Linear(6, 3), Linear(6, 4, bias=False)]
    x = torch.randn(7, 6)
    torch.testing.assert_close(joint_product(x, layers, "auto"), torch.cat([layer(x) for layer in layers], -1))


def test_what_is_pending_is_dropped_and_added_once():
    x, value, norm = torch.randn(5, 8), torch.randn(5, 8), torch.nn.LayerNorm(8)
    assert torch.equal(Pending(value).added_to(x, "auto"), x + value)
    total, normed = Pending(value).added_and_normed(x, norm, "auto")
    torch.testing.assert_close(total, x + value)
    torch.testing.assert_close(normed, norm(x + value))
    torch.manual_seed(1)
    added = Pending(value, 0.5).added_to(x, "auto") - x
    kept = added.abs() > 1e-6
    torch.testing.assert_close(added[kept], 2 * value[kept], rtol=1e-4, atol=1e-5)
    assert 0 < kept.sum() < 40
