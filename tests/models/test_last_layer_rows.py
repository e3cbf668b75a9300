"""Where few rows leave a model its last layer computes these alone: the same numbers, every gradient included."""

import pytest
import torch

from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.types import Objective, PackedBatch

FULL = 2**31 - 1
LENGTHS = [6, 0, 1, 9, 14]  # one sequence is empty
STARTS = torch.tensor([0, 6, 6, 7, 16, 30], dtype=torch.int32)
CLM, MLM, MNTP = Objective.CLM, Objective.MLM, Objective.MNTP
# name: (prefix_len of each sequence, labelled positions); some sequences have no labelled position
BATCHES = {
    "CLM": ([0] * 5, {CLM: [0, 4, 9, 10, 28]}),
    "MLM": ([FULL] * 5, {MLM: [3, 6, 14, 29]}),
    "MNTP": ([FULL] * 5, {MNTP: [2, 16, 17]}),
    "prefix": ([3, 0, 0, 5, 20], {CLM: [1, 3, 7, 15, 16, 22]}),
    "mixed": ([0, FULL, FULL, FULL, 0], {MLM: [8, 15], CLM: [1, 5, 17, 18, 28], MNTP: [6]}),
    "one row": ([0, 0, 0, FULL, 0], {MLM: [12]}),
    "half": ([FULL] * 5, {MLM: list(range(0, 30, 2))}),
}


def batch(name, ids):
    prefix_len, labelled = BATCHES[name]
    labelled = {objective: torch.tensor(positions) for objective, positions in labelled.items()}
    return PackedBatch(
        input_ids=ids,
        cu_seqlens=STARTS,
        max_seqlen=14,
        prefix_len=torch.tensor(prefix_len, dtype=torch.int32),
        labelled=labelled,
        targets={objective: (positions * 11) % 31 for objective, positions in labelled.items()},
    )


def losses_and_gradients(made, data, **options):
    made.zero_grad()
    torch.manual_seed(5)
    sums = made.loss_sums(data, z_loss=0.01, **options)
    sum(sums.values()).backward()
    return sums, {name: parameter.grad.clone() for name, parameter in made.named_parameters()}


def assert_same(made, data, **options):
    some, their_gradients = losses_and_gradients(made, data, **options)
    every, gradients = losses_and_gradients(made, data, last_layer_rows=False, **options)
    assert list(some) == list(every)
    for objective in every:
        torch.testing.assert_close(some[objective], every[objective], rtol=1e-11, atol=1e-11)
    for name, expected in gradients.items():
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(their_gradients[name], expected, rtol=1e-9, atol=1e-11 * scale, msg=name)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_losses_and_gradients_are_those_of_all_rows(architecture, name, impl, tiny, tokens):
    assert_same(tiny(architecture), batch(name, tokens(30)), impl=impl)


def test_a_model_of_one_layer_saves_too(architecture, tiny, tokens):
    assert_same(tiny(architecture, num_hidden_layers=1), batch("mixed", tokens(30)))


def test_attention_drops_the_same_probabilities_whichever_rows_are_asked_for(architecture, tiny, tokens):
    made = tiny(architecture, attention_dropout=0.4).train()
    assert_same(made, batch("mixed", tokens(30)))
    quiet, _ = losses_and_gradients(made.eval(), batch("mixed", tokens(30)))
    dropped, _ = losses_and_gradients(made.train(), batch("mixed", tokens(30)))
    assert (quiet[CLM] - dropped[CLM]).abs().item() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_hidden_states_of_rows_are_those_rows(architecture, causal, tiny, tokens):
    made, ids = tiny(architecture), tokens(3, 11)
    every = made.hidden_states(ids, causal=causal).flatten(0, 1)
    assert every.shape == (33, 12)
    chosen = torch.rand(20, 33, generator=torch.Generator().manual_seed(3)) < torch.linspace(0, 1, 20)[:, None]
    for rows in (mask.nonzero().squeeze(1) for mask in chosen):
        some = made.hidden_states(ids, causal=causal, rows=rows)
        torch.testing.assert_close(some, every[rows], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        made.hidden_states(ids, causal=causal, rows=torch.arange(33)), every, rtol=1e-10, atol=1e-10
    )


def test_no_rows_give_no_loss_and_no_gradient(architecture, tiny, tokens):
    made, data = tiny(architecture), batch("MLM", tokens(30))
    none = torch.zeros(0, dtype=torch.int64)
    data.labelled[MLM], data.targets[MLM] = none, none
    for impl in ("torch", "reference"):
        assert made.hidden_states(tokens(2, 5), causal=True, rows=none, impl=impl).shape == (0, 12)
        sums, gradients = losses_and_gradients(made, data, impl=impl)
        assert sums[MLM].item() == 0.0
        assert all(not gradient.any() for gradient in gradients.values())


def test_only_the_labelled_rows_are_computed_where_at_most_half_are_labelled(architecture, tiny, tokens):
    made, ids = tiny(architecture), tokens(30)
    computed = []
    for part in (made.layers[0].feed_forward, made.layers[1].feed_forward, made.layers[1].attention.out, made.head):
        part.register_forward_hook(lambda _module, inputs, _out: computed.append(len(inputs[0])))
    made.loss_sums(batch("half", ids))
    assert computed == [30, 15, 15, 15]
    computed.clear()
    made.loss_sums(batch("half", ids), last_layer_rows=False)
    assert computed == [30, 30, 30, 15]
    computed.clear()
    more = batch("half", ids)
    more.labelled[MLM], more.targets[MLM] = torch.arange(16), torch.arange(16)
    made.loss_sums(more)
    assert computed == [30, 30, 30, 16]


@pytest.fixture
def baby_llama():
    def make(kv_heads):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = BabyLlama(BabyLlamaConfig(vocab_size=31, num_key_value_heads=kv_heads, **sizes)).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
        return made

    return make


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_baby_llama_gives_the_rows_of_the_whole(name, impl, kv_heads, baby_llama, tokens):
    made, ids, rows = baby_llama(kv_heads), tokens(2, 9), torch.tensor([0, 8, 9, 13])
    every = made.hidden_states(ids, causal=True, impl=impl).flatten(0, 1)
    some = made.hidden_states(ids, causal=True, rows=rows, impl=impl)
    torch.testing.assert_close(some, every[rows], rtol=1e-11, atol=1e-11)
    assert_same(made, batch(name, tokens(30)), impl=impl)


@pytest.mark.parametrize(("kv_heads", "queries"), [(None, 15), (2, 0)])
def test_baby_llama_computes_only_the_labelled_rows(kv_heads, queries, baby_llama, tokens):
    """Where key heads are shared, queries of all rows are a part of one product with keys and values."""
    made = baby_llama(kv_heads)
    computed = {}
    for name, part in made.model.named_modules():
        part.register_forward_hook(lambda _, inputs, __, name=name: computed.update({name: len(inputs[0])}))
    made.loss_sums(batch("half", tokens(30)))
    parts = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
    assert [computed[f"layers.0.{part}"] for part in parts] == [30, 30, 30, 30]
    assert [computed[f"layers.1.{part}"] for part in parts] == [30, 15, 15, 15]
    assert computed.get("layers.1.self_attn.q_proj", 0) == queries
