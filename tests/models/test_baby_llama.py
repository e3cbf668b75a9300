"""BabyLlama against Hugging Face's Llama, its size, and what its tokens may and may not see."""

import pytest
import torch

from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.types import Objective, PackedBatch

FULL = 2**31 - 1


def small(**changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return BabyLlamaConfig(**(sizes | changes))


def model(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    made = BabyLlama(small(**changes)).to(dtype)
    with torch.no_grad():  # norms away from 1, larger weights: every part of the model counts
        for _name, parameter in made.named_parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return made


def tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def packed(made, lengths, prefix_len, ids):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return made(ids, prefix_len=torch.tensor(prefix_len, dtype=torch.int32), cu_seqlens=cu_seqlens)


def test_58m_has_the_published_number_of_parameters():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in BabyLlama(BabyLlamaConfig()).parameters())
    assert round(count / 1e6, 2) == 58.34  # arXiv 2308.02019


def huggingface(made):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{name: getattr(made.config, name) for name in made.config.__dataclass_fields__ if name != "rope_theta"}
        | {"num_key_value_heads": made.config.kv_heads},
        rope_parameters={"rope_type": "default", "rope_theta": made.config.rope_theta},
        attn_implementation="eager",
    )
    other = transformers.LlamaForCausalLM(config)
    other.load_state_dict(made.state_dict())  # strict: the names are the same, none more, none less
    return other


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_logits_and_gradients_are_those_of_hugging_face(causal, kv_heads):
    made = model(num_key_value_heads=kv_heads, rope_theta=5000.0, rms_norm_eps=1e-5)
    other = huggingface(made)
    ids = tokens(2, 33)
    ours, theirs = made(ids, causal=causal), other(ids, is_causal=causal).logits
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 3e-6 * scale
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = dict(other.named_parameters())
    for name, parameter in made.named_parameters():
        expected = gradients[name].grad
        assert (parameter.grad - expected).abs().max() < 1e-5 * expected.abs().max(), name


def test_flag_changes_the_logits():
    made, ids = model(), tokens(2, 12)
    assert (made(ids, causal=True) - made(ids, causal=False)).abs().max() > 0.1


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_in_a_causal_sequence_no_logit_depends_on_a_later_token(impl):
    made, ids = model(dtype=torch.float64), tokens(1, 20)
    changed = ids.clone()
    changed[0, 13:] = (ids[0, 13:] + 1) % 97
    before, after = (made(x, causal=True, impl=impl) for x in (ids, changed))
    assert torch.equal(before[0, :13], after[0, :13])
    assert (before[0, 13:] - after[0, 13:]).abs().max() > 1e-3
    before, after = (made(x, causal=False, impl=impl) for x in (ids, changed))
    assert ((before[0] - after[0]).abs().amax(-1) > 1e-6).all()  # under the full mask every position sees the change


def test_the_gradient_of_an_early_loss_never_reaches_a_later_token():
    made, ids = model(dtype=torch.float64), tokens(1, 16)
    embedded = []

    def keep(_module, _inputs, out):
        out.retain_grad()
        embedded.append(out)

    made.model.embed_tokens.register_forward_hook(keep)
    made(ids, causal=True)[0, 6].logsumexp(-1).backward()
    reach = embedded[0].grad.abs().amax(-1)
    assert (reach[:7] > 0).all()
    assert (reach[7:] == 0).all()


@pytest.mark.parametrize("prefix", [0, FULL, 3])
def test_packed_sequences_never_see_each_other(prefix):
    made, lengths = model(dtype=torch.float64), [7, 1, 12, 5]
    ids = tokens(sum(lengths))
    together = packed(made, lengths, [prefix] * 4, ids)
    changed = ids.clone()
    changed[8:20] = (ids[8:20] + 5) % 97  # the third sequence
    after = packed(made, lengths, [prefix] * 4, changed)
    assert torch.equal(together[:8], after[:8])
    assert torch.equal(together[20:], after[20:])
    assert (together[8:20] - after[8:20]).abs().max() > 1e-3
    start = 0
    for length in lengths:  # and each is what it is alone
        alone = packed(made, [length], [prefix], ids[start : start + length])
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-9, atol=1e-9)
        start += length


def test_one_batch_can_mix_causal_full_and_prefix_sequences():
    made, lengths = model(dtype=torch.float64), [9, 9, 9, 4]
    ids = tokens(sum(lengths))
    mixed = packed(made, lengths, [0, FULL, 4, 2], ids)
    parts = list(zip(ids.split(lengths), mixed.split(lengths), strict=True))
    for (own_ids, own), prefix in zip(parts, [0, FULL, 4, 2], strict=True):
        alone = packed(made, [len(own_ids)], [prefix], own_ids)
        torch.testing.assert_close(own, alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts[0][1], made(parts[0][0][None], causal=True)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts[1][1], made(parts[1][0][None], causal=False)[0], rtol=1e-9, atol=1e-9)
    # inside a prefix of 4, token 0 sees token 3 but not token 4
    changed = ids.clone()
    changed[18 + 4] = (ids[18 + 4] + 1) % 97
    assert torch.equal(packed(made, lengths, [0, FULL, 4, 2], changed)[18:22], mixed[18:22])
    changed[18 + 3] = (ids[18 + 3] + 1) % 97
    assert (packed(made, lengths, [0, FULL, 4, 2], changed)[18] - mixed[18]).abs().max() > 1e-4


def test_flipping_one_flag_in_place_changes_that_sequence_alone():
    made, ids = model(dtype=torch.float64), tokens(3, 10)
    causal = torch.tensor([True, True, True])
    before = made(ids, causal=causal)
    causal[1] = False
    after = made(ids, causal=causal)
    # not bit for bit: a library's product may depend on how many sequences are multiplied at once
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-12, atol=1e-12)
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_loss_sums_are_the_cross_entropy_of_the_labelled_logits():
    made, ids = model(dtype=torch.float64), tokens(12)
    labelled = {Objective.CLM: torch.tensor([0, 1, 2]), Objective.MLM: torch.tensor([6, 11])}
    targets = {Objective.CLM: torch.tensor([5, 6, 7]), Objective.MLM: torch.tensor([8, 9])}
    batch = PackedBatch(
        input_ids=ids,
        cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32),
        max_seqlen=7,
        prefix_len=torch.tensor([0, FULL], dtype=torch.int32),
        labelled=labelled,
        targets=targets,
    )
    logits = packed(made, [5, 7], [0, FULL], ids)
    sums = made.loss_sums(batch, z_loss=0.01, label_smoothing=0.1)
    for objective, positions in labelled.items():
        rows = logits[positions]
        expected = torch.nn.functional.cross_entropy(rows, targets[objective], reduction="sum", label_smoothing=0.1)
        expected = expected + 0.01 * rows.logsumexp(-1).square().sum()
        torch.testing.assert_close(sums[objective], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "causal and prefix_len must be given one at a time; got neither"),
        ({"causal": True, "prefix_len": torch.zeros(2, dtype=torch.int32)}, "got both"),
        (
            {"causal": True, "cu_seqlens": torch.tensor([0, 4])},
            r"cu_seqlens must be None for input_ids \(batch, seqlen\)",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        model()(tokens(2, 4), **arguments)


def test_packed_input_needs_its_boundaries_and_a_sequence_must_fit():
    with pytest.raises(ValueError, match=r"input_ids must be .*; got shape \(4,\) and cu_seqlens None"):
        model()(tokens(4), causal=True)
    with pytest.raises(ValueError, match=r"max_seqlen must be at most max_position_embeddings \(8\); got 9"):
        model(max_position_embeddings=8)(tokens(1, 9), causal=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 44}, "hidden_size must be a multiple of 2 [*] num_attention_heads"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads \(4\); got 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1; got 0"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
