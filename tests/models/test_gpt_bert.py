"""GPT-BERT: its equations by hand, its size, its initial weights."""

import math

import pytest
import torch

from antlm_fast.models import GptBert, GptBertConfig

FULL = 2**31 - 1


def test_small_has_the_number_of_parameters_that_is_published():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GptBert(GptBertConfig()).parameters())
    assert round(count / 1e6, 1) == 29.9
    assert GptBertConfig().layer_norm_eps == 1e-5


# an eps that counts shows that every norm has it
@pytest.mark.parametrize(("prefix", "eps"), [(0, 1e-5), (FULL, 0.3), (5, 1e-5)])
def test_logits_and_gradients_are_those_of_the_equations(prefix, eps, tiny, tokens, by_hand, assert_equal_by_hand):
    made, ids = tiny("gpt_bert", layer_norm_eps=eps), tokens(17)
    hand = by_hand(made)

    def weighted(outputs, name):
        weights = hand.p[f"{name}.weight"]
        assert len(weights) == len(outputs)
        return sum(weight * output for weight, output in zip(weights, outputs, strict=True))

    x = hand.embedding(ids)
    outputs = [x]
    for layer in range(made.config.num_hidden_layers):
        name = f"layers.{layer}"
        y = hand.norm(x)
        value, gate = hand.linear(y, f"{name}.attention.value_gate").chunk(2, -1)
        gated = hand.norm(hand.heads(y, value, layer, prefix) * hand.gelu(gate))
        outputs.append(x + hand.linear(gated, f"{name}.attention.out"))
        x = weighted(outputs, f"{name}.attention_sum")
        outputs.append(x + hand.feed_forward(x, layer))
        x = weighted(outputs, f"{name}.feed_forward_sum")
    assert_equal_by_hand(made, hand.logits(x), prefix, ids)


def test_at_first_each_sum_is_its_last_output(tokens):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 3}
    made = GptBert(GptBertConfig(vocab_size=31, **sizes)).eval()
    sums = [parameter for name, parameter in made.named_parameters() if name.endswith("sum.weight")]
    assert [len(weights) for weights in sums] == [2, 3, 4, 5, 6, 7]
    for weights in sums:
        assert weights.tolist() == [0.0] * (len(weights) - 1) + [1.0]
    before = made(tokens(1, 9), causal=True)
    with torch.no_grad():
        for module in made.layers:  # the sums taken out
            module.attention_sum.forward = module.feed_forward_sum.forward = lambda outputs: outputs[-1]
    assert torch.equal(before, made(tokens(1, 9), causal=True))
    for i, layer in enumerate(made.layers):
        scale = math.sqrt(1 / (2 * (1 + i))) * math.sqrt(2 / (5 * 32))
        for matrix in (layer.feed_forward.wide.weight, layer.feed_forward.narrow.weight):
            assert matrix.abs().max().item() == pytest.approx(2 * scale, rel=0.03)


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture must be 'gpt_bert' in GptBertConfig; got 'ltg_bert'"):
        GptBertConfig(architecture="ltg_bert")
