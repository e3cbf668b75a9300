"""What holds of LTG-BERT and GPT-BERT alike: who sees whom, where dropout acts, what is refused."""

import pytest
import torch

from antlm_fast.models import MODEL_CONFIGS, BabyLlamaConfig, LanguageModel, build_model
from antlm_fast.models.layer_parts import Pending
from antlm_fast.types import Objective, PackedBatch

FULL = 2**31 - 1


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_in_a_causal_sequence_no_logit_depends_on_a_later_token(architecture, impl, tiny, tokens):
    made, ids = tiny(architecture), tokens(1, 18)
    changed = ids.clone()
    changed[0, 11:] = (ids[0, 11:] + 1) % 31
    before, after = (made(x, causal=True, impl=impl) for x in (ids, changed))
    assert torch.equal(before[0, :11], after[0, :11])
    assert (before[0, 11:] - after[0, 11:]).abs().max() > 1e-3
    before, after = (made(x, causal=False, impl=impl) for x in (ids, changed))
    assert ((before[0] - after[0]).abs().amax(-1) > 1e-6).all()  # under the full mask every position sees the change


def test_the_gradient_of_an_early_loss_never_reaches_a_later_token(architecture, tiny, tokens):
    made, ids = tiny(architecture), tokens(1, 16)
    embedded = []

    def keep(_module, _inputs, out):
        out.retain_grad()
        embedded.append(out)

    made.embedding.register_forward_hook(keep)
    made(ids, causal=True)[0, 6].logsumexp(-1).backward()
    reach = embedded[0].grad.abs().amax(-1)
    assert (reach[:7] > 0).all()
    assert (reach[7:] == 0).all()


@pytest.mark.parametrize("prefix", [0, FULL, 3])
def test_packed_sequences_never_see_each_other(architecture, prefix, tiny, tokens, packed):
    made, lengths = tiny(architecture), [7, 1, 12, 5]
    ids = tokens(sum(lengths))
    together = packed(made, lengths, [prefix] * 4, ids)
    changed = ids.clone()
    changed[8:20] = (ids[8:20] + 5) % 31  # the third sequence
    after = packed(made, lengths, [prefix] * 4, changed)
    assert torch.equal(together[:8], after[:8])
    assert torch.equal(together[20:], after[20:])
    assert (together[8:20] - after[8:20]).abs().max() > 1e-3
    start = 0
    for length in lengths:  # and each is what it is alone
        alone = packed(made, [length], [prefix], ids[start : start + length])
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-9, atol=1e-9)
        start += length


def test_one_batch_can_mix_causal_full_and_prefix_sequences(architecture, tiny, tokens, packed):
    made, lengths, prefixes = tiny(architecture), [9, 9, 9, 4], [0, FULL, 4, 2]
    ids = tokens(sum(lengths))
    mixed = packed(made, lengths, prefixes, ids)
    parts = list(zip(ids.split(lengths), mixed.split(lengths), strict=True))
    for (own_ids, own), prefix in zip(parts, prefixes, strict=True):
        alone = packed(made, [len(own_ids)], [prefix], own_ids)
        torch.testing.assert_close(own, alone, rtol=1e-9, atol=1e-9)
    for (own_ids, own), causal in zip(parts[:2], (True, False), strict=True):
        torch.testing.assert_close(own, made(own_ids[None], causal=causal)[0], rtol=1e-9, atol=1e-9)
    # inside a prefix of 4, token 0 sees token 3 but not token 4
    changed = ids.clone()
    changed[18 + 4] = (ids[18 + 4] + 1) % 31
    assert torch.equal(packed(made, lengths, prefixes, changed)[18:22], mixed[18:22])
    changed[18 + 3] = (ids[18 + 3] + 1) % 31
    assert (packed(made, lengths, prefixes, changed)[18] - mixed[18]).abs().max() > 1e-4


def test_flipping_one_flag_in_place_changes_that_sequence_alone(architecture, tiny, tokens):
    made, ids = tiny(architecture), tokens(3, 10)
    causal = torch.tensor([True, True, True])
    before = made(ids, causal=causal)
    causal[1] = False
    after = made(ids, causal=causal)
    # not bit for bit: a library's product may depend on how many sequences are multiplied at once
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-12, atol=1e-12)
    assert (before[1] - after[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_implementations_agree(architecture, dtype, tiny, tokens, packed):
    made, lengths, prefixes = tiny(architecture, dtype), [9, 20, 6], [0, FULL, 4]
    ids = tokens(sum(lengths))
    ours, reference = (packed(made, lengths, prefixes, ids, impl=impl) for impl in ("torch", "reference"))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def batch(ids, labelled):
    return PackedBatch(
        input_ids=ids,
        cu_seqlens=torch.tensor([0, 5, 12, 20], dtype=torch.int32),
        max_seqlen=8,
        prefix_len=torch.tensor([0, FULL, FULL], dtype=torch.int32),
        labelled=labelled,
        targets={objective: (positions * 7) % 31 for objective, positions in labelled.items()},
    )


MIXED = {
    Objective.MLM: torch.tensor([6, 11]),  # not the first in the batch: the order of objectives is not that of rows
    Objective.CLM: torch.tensor([0, 1, 2, 3]),
    Objective.MNTP: torch.tensor([15, 18]),
}


@pytest.mark.parametrize(
    "objectives", [list(MIXED), *([objective] for objective in MIXED)], ids=lambda chosen: "+".join(chosen)
)
def test_loss_sums_are_the_cross_entropy_of_the_labelled_logits(architecture, objectives, tiny, tokens, packed):
    made, ids = tiny(architecture), tokens(20)
    labelled = {objective: MIXED[objective] for objective in objectives}
    data = batch(ids, labelled)
    logits = packed(made, [5, 7, 8], [0, FULL, FULL], ids)
    sums = made.loss_sums(data, z_loss=0.01, label_smoothing=0.1)
    assert list(sums) == objectives
    for objective, positions in labelled.items():
        rows, targets = logits[positions], data.targets[objective]
        expected = torch.nn.functional.cross_entropy(rows, targets, reduction="sum", label_smoothing=0.1)
        torch.testing.assert_close(sums[objective], expected + 0.01 * rows.logsumexp(-1).square().sum())


def test_a_batch_without_objectives_has_no_losses(architecture, tiny, tokens):
    assert tiny(architecture).loss_sums(batch(tokens(20), {})) == {}


def test_a_mixed_step_reaches_every_parameter_in_bfloat16_too(architecture, tiny, tokens):
    made = tiny(architecture, torch.float32, hidden_dropout=0.1, attention_dropout=0.1, seed=3).train()
    ids = tokens(20)
    exact = tiny(architecture, torch.float32, seed=3).loss_sums(batch(ids, MIXED))
    with torch.autocast("cpu", torch.bfloat16):
        plain = tiny(architecture, torch.float32, seed=3).loss_sums(batch(ids, MIXED))
        sums = made.loss_sums(batch(ids, MIXED))
    for objective, loss in exact.items():
        assert plain[objective].item() == pytest.approx(loss.item(), rel=0.05)
        assert plain[objective].item() != loss.item()
    sum(sums.values()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


# dropout


def places(made):
    """{name: (module, the attribute that holds its probability)}"""
    found = {name: (module, "p") for name, module in made.named_modules() if isinstance(module, torch.nn.Dropout)}
    return found | {
        name: (module, "dropout_p") for name, module in made.named_modules() if hasattr(module, "dropout_p")
    }


def test_dropout_acts_in_every_place_and_only_in_training(architecture, tiny, tokens):
    made, ids = tiny(architecture), tokens(2, 9)
    found = places(made)
    layer_places = ("attention.dropout", "attention.heads", "feed_forward.dropout")
    assert set(found) == {"embedding.dropout", "relative.dropout", "head.dropout"} | {
        f"layers.{layer}.{place}" for layer in (0, 1) for place in layer_places
    }
    quiet = made.eval()(ids, causal=True)
    assert torch.equal(made.train()(ids, causal=True), quiet)  # all probabilities are 0
    for name, (module, attribute) in found.items():
        setattr(module, attribute, 0.5)
        torch.manual_seed(1)
        first, other = made.train()(ids, causal=True), made(ids, causal=True)
        assert (first - quiet).abs().max() > 1e-3, name
        assert (first - other).abs().max() > 1e-3, name
        torch.manual_seed(1)
        assert torch.equal(first, made(ids, causal=True)), name
        assert torch.equal(made.eval()(ids, causal=True), quiet), name
        setattr(module, attribute, 0.0)


def test_dropout_is_the_last_step_of_its_part(architecture, tiny, tokens):
    """What a part adds is 0, or 1 / (1 - p) times what it adds without dropout."""
    made, ids = tiny(architecture), tokens(2, 9)

    def added(out):
        return out.added_to(torch.zeros_like(out.value), "auto") if isinstance(out, Pending) else out

    parts = {
        "embedding": made.embedding,
        "relative": made.relative,
        "attention": made.layers[0].attention,
        "feed_forward": made.layers[0].feed_forward,
        "head": made.head,
    }
    for name, part in parts.items():
        seen = []
        hook = part.register_forward_hook(lambda _module, _inputs, out, seen=seen: seen.append(added(out)))
        made.eval()(ids, causal=True)
        part.dropout.p = 0.6
        made.train()(ids, causal=True)
        part.dropout.p = 0.0
        hook.remove()
        assert len(seen) == 2, name  # the relative table, too, is made once per forward
        quiet, dropped = seen
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], quiet[kept] / 0.4, msg=name)
        assert 0.2 < kept.double().mean().item() < 0.6, name


# calls and the registry


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        ((2, 4), {}, ValueError, "causal and prefix_len must be given one at a time; got neither"),
        ((2, 4), {"causal": True, "prefix_len": torch.zeros(2, dtype=torch.int32)}, ValueError, "got both"),
        ((2, 4), {"causal": True, "cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens must be None for"),
        ((4,), {"causal": True}, ValueError, r"input_ids must be .*; got shape \(4,\) and cu_seqlens None"),
        ((1, 21), {"causal": True}, ValueError, r"at most max_position_embeddings \(20\); got 21"),
        (
            (2, 4),
            {"causal": True, "rows": torch.tensor([2, 1])},
            ValueError,
            "rows must be ascending; got a step of -1",
        ),
        ((2, 4), {"causal": True, "rows": torch.tensor([2, 2])}, ValueError, "rows must be ascending; got a step of 0"),
        ((2, 4), {"causal": True, "rows": torch.tensor([2, 8])}, ValueError, r"rows must be in \[0, 8\); got 8"),
        ((2, 4), {"causal": True, "rows": torch.tensor([-1, 2])}, ValueError, r"rows must be in \[0, 8\); got -1"),
        (
            (2, 4),
            {"causal": True, "rows": torch.tensor([[1]])},
            ValueError,
            r"rows must have shape \(n,\); got \(1, 1\)",
        ),
        ((2, 4), {"causal": True, "rows": torch.tensor([1], dtype=torch.int32)}, TypeError, "rows must be int64; got"),
    ],
)
def test_wrong_calls_say_what_is_wrong(architecture, shape, arguments, error, message, tiny, tokens):
    with pytest.raises(error, match=message):
        tiny(architecture).hidden_states(tokens(*shape), **arguments)


def test_the_registry_builds_each_architecture_from_its_config():
    assert list(MODEL_CONFIGS) == ["baby_llama", "ltg_bert", "gpt_bert"]
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for name, config_class in MODEL_CONFIGS.items():
        config = config_class(**sizes, num_attention_heads=2)
        built = build_model(config)
        assert isinstance(built, LanguageModel)
        assert built.config is config
        assert config.architecture == name
        assert next(iter(config_class.__dataclass_fields__)) == "architecture"
        assert built(torch.tensor([[1, 2, 3]]), causal=False).shape == (1, 3, 9)
    with pytest.raises(
        TypeError, match="config must be one of BabyLlamaConfig, LtgBertConfig, GptBertConfig; got dict"
    ):
        build_model({"architecture": "ltg_bert"})
    with pytest.raises(ValueError, match="architecture must be 'baby_llama' in BabyLlamaConfig; got 'llama'"):
        BabyLlamaConfig(architecture="llama")
