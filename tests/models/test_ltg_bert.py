"""LTG-BERT: its equations by hand, its sizes, its initial weights."""

import math

import pytest
import torch

from antlm_fast.models import LtgBert, LtgBertConfig

FULL = 2**31 - 1


def parameters(**sizes):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LtgBert(LtgBertConfig(**sizes)).parameters())


def test_the_sizes_have_the_numbers_of_parameters_that_are_published():
    assert round(parameters() / 1e6, 1) == 98.2  # base, arXiv 2303.09859
    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024, "vocab_size": 6144}
    assert round(parameters(**small) / 1e6, 1) == 23.8
    extra_small = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512}
    assert round(parameters(**extra_small) / 1e6, 1) == 8.5
    assert LtgBertConfig().layer_norm_eps == 1e-7


# an eps that counts shows that every norm has it
@pytest.mark.parametrize(("prefix", "eps"), [(0, 1e-7), (FULL, 0.3), (5, 1e-7)])
def test_logits_and_gradients_are_those_of_the_equations(prefix, eps, tiny, tokens, by_hand, assert_equal_by_hand):
    made, ids = tiny("ltg_bert", layer_norm_eps=eps), tokens(17)
    hand = by_hand(made)
    x = hand.embedding(ids)
    for layer in range(made.config.num_hidden_layers):
        name = f"layers.{layer}.attention"
        y = hand.norm(x)
        heads = hand.heads(y, hand.linear(y, f"{name}.value"), layer, prefix)
        x = x + hand.norm(hand.linear(heads, f"{name}.out"), f"{name}.out_norm")
        x = x + hand.feed_forward(x, layer)
    assert_equal_by_hand(made, hand.logits(x), prefix, ids)


def test_initial_weights_are_a_cut_normal_distribution_scaled_by_depth():
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 4}
    made = LtgBert(LtgBertConfig(vocab_size=500, num_hidden_layers=3, position_bucket_size=32, **sizes))
    std = math.sqrt(2 / (5 * 96))
    cut_std = std * 0.87962566  # of a unit normal cut at -2 and 2
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1:
            expected = 1.0 if name.endswith("norm.weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name
            continue
        scale = 1.0
        if "feed_forward" in name:
            scale = math.sqrt(1 / (2 * (1 + int(name.split(".")[1]))))
        assert parameter.abs().max().item() <= 2 * std * scale * (1 + 1e-6), name
        assert parameter.abs().max().item() > 1.95 * std * scale, name
        assert parameter.std().item() == pytest.approx(cut_std * scale, rel=0.05), name
        assert abs(parameter.mean().item()) < 4 * std * scale / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt_bert"}, "architecture must be 'ltg_bert' in LtgBertConfig; got 'gpt_bert'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1; got 0"),
        ({"position_bucket_size": 1}, "position_bucket_size must be at least 2; got 1"),
        ({"max_position_embeddings": 1}, "max_position_embeddings must be at least 2; got 1"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and below 1; got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be at least 0 and below 1; got -0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0; got 0.0"),
        ({"hidden_size": 100}, r"hidden_size must be a multiple of num_attention_heads \(12\); got 100"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LtgBertConfig(**changes)
