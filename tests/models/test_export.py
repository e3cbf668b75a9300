"""LtgBert and GptBert as a Hugging Face folder: classes that know nothing of antlm_fast give our logits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from antlm_fast.models import GptBertConfig, LtgBertConfig, build_model, load_pretrained, save_pretrained
from antlm_fast.models.pretrained import read_model_config
from antlm_fast.types import InputError

transformers = pytest.importorskip("transformers")
exported = pytest.importorskip("antlm_fast.models.modeling_antlm_bert")

CONFIGS = (LtgBertConfig, GptBertConfig)
IDS = torch.randint(40, (3, 50), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([50, 17, 33])
MASKS = {  # padding behind and before
    "right": (torch.arange(50) < LENGTHS[:, None]).long(),
    "left": (torch.arange(50) >= 50 - LENGTHS[:, None]).long(),
}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mask_token_id": 3}


def new_model(kind, **changes):
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "position_bucket_size": 8,
    }
    model = build_model(kind(**(sizes | changes))).eval()
    with torch.no_grad():  # biases, norms and sums are trivial at init
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda kind: kind.architecture)
def saved(request, tmp_path_factory):
    model = new_model(request.param)
    folder = tmp_path_factory.mktemp(request.param.architecture) / "model"
    save_pretrained(model, folder, token_ids=TOKEN_IDS)
    return model, folder


def our_logits(model, mask, *, causal):
    """Logits of the tokens that are none of the padding, packed."""
    cu_seqlens = F.pad(LENGTHS.cumsum(0), (1, 0)).int()
    return model(IDS[mask.bool()], cu_seqlens=cu_seqlens, causal=causal)


STRANGER = """
import json, sys
sys.modules["antlm_fast"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification
inputs, folders, out = torch.load(sys.argv[1])
logits = {}
for folder in folders:
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).mask_token_id == 3
    inner = {"subfolder": "masked", "trust_remote_code": True}
    body = AutoModel.from_pretrained(folder, **inner)
    for side, (ids, mask) in inputs.items():
        logits[folder, "AutoModel", side] = body(ids, attention_mask=mask).last_hidden_state.detach()
    try:
        AutoModelForCausalLM.from_pretrained(folder, **inner)
    except ValueError as error:
        assert "Unrecognized configuration class" in str(error), error
    else:
        raise AssertionError("the masked folder was read causally")
    new_head, found = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True, **inner
    )
    assert {name.split(".")[0] for name in found["missing_keys"]} == {"classifier"}, found
    assert not found["unexpected_keys"], found
    new_head.save_pretrained(f"{folder}-new-head")
    again = AutoModelForSequenceClassification.from_pretrained(f"{folder}-new-head", trust_remote_code=True)
    ids, mask = inputs["left"]
    assert torch.equal(again(ids, attention_mask=mask).logits, new_head(ids, attention_mask=mask).logits)
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model, found = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(found.values()), found
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert all(torch.equal(a, b) for a, b in zip(body.parameters(), model.model.parameters(), strict=True))
        for side, (ids, mask) in inputs.items():
            logits[folder, auto.__name__, side] = model(ids, attention_mask=mask).logits.detach()
        model.save_pretrained(f"{folder}-{auto.__name__}")
torch.save(logits, out)
"""


def test_a_process_without_our_package_gives_our_logits_and_what_it_saves_we_read(tmp_path):
    models = {}
    for kind in CONFIGS:
        models[str(tmp_path / kind.architecture)] = model = new_model(kind)
        save_pretrained(model, tmp_path / kind.architecture, token_ids=TOKEN_IDS)
    asked, given = tmp_path / "asked.pt", tmp_path / "given.pt"
    torch.save(({side: (IDS, mask) for side, mask in MASKS.items()}, list(models), str(given)), asked)
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(asked)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits = torch.load(given)
    for folder, model in models.items():
        for row, length in enumerate(LENGTHS.tolist()):  # without padding
            theirs = logits[folder, "AutoModel", "right"][row, :length]
            alone = model.hidden_states(IDS[row : row + 1, :length], causal=False)[0]
            torch.testing.assert_close(theirs, alone, rtol=0, atol=2e-5)
        for auto, causal in (("AutoModelForMaskedLM", False), ("AutoModelForCausalLM", True)):
            for side, mask in MASKS.items():
                theirs = logits[folder, auto, side][mask.bool()]
                torch.testing.assert_close(theirs, our_logits(model, mask, causal=causal), rtol=0, atol=2e-5)
            again = load_pretrained(tmp_path / f"{folder}-{auto}")
            assert again.config == model.config
            assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())


def test_a_saved_model_is_read_back_equal(saved):
    model, folder = saved
    again = load_pretrained(folder)
    assert type(again) is type(model)
    assert again.config == model.config == read_model_config(folder / "config.json")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_last_buckets_are_ours_at_every_size():
    for buckets, longest in ((2, 9), (5, 30), (8, 5), (16, 40), (32, 64)):
        model = new_model(LtgBertConfig, position_bucket_size=buckets, max_position_embeddings=longest)
        theirs = of_our_weights(model, exported.AntlmBertForMaskedLM)
        ids = IDS[:1, :longest] if longest <= 50 else IDS.flatten()[None, :longest]
        torch.testing.assert_close(theirs(ids).logits, model(ids, causal=False), rtol=0, atol=2e-5)


def of_our_weights(model, kind, **changes):
    """The exported class with our weights, through no file."""
    values = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    theirs = kind(exported.AntlmBertConfig(**(values | changes))).eval()
    names = {"head.bias": "head.decoder.bias"}
    state = {names.get(n, n if n.startswith("head.") else f"model.{n}"): t for n, t in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["head.decoder.weight"], [])
    return theirs


@pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])
def test_labels_give_the_mean_loss_and_our_gradients(saved, causal):
    model, folder = saved
    kind = exported.AntlmBertForCausalLM if causal else exported.AntlmBertForMaskedLM
    theirs = kind.from_pretrained(folder)
    mask = MASKS["right"]
    labels = IDS.masked_fill(mask == 0, -100) if causal else torch.where((IDS % 5 == 0) & (mask == 1), IDS, -100)
    loss = theirs(IDS, attention_mask=mask, labels=labels).loss
    targets = torch.cat((labels[:, 1:], torch.full((3, 1), -100)), dim=1) if causal else labels
    expected = F.cross_entropy(our_logits(model, mask, causal=causal), targets[mask.bool()])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    halved = theirs(IDS, attention_mask=mask, labels=labels, num_items_in_batch=2 * (targets != -100).sum()).loss
    torch.testing.assert_close(halved, expected / 2, rtol=1e-5, atol=1e-6)
    loss.backward()
    names, parameters = zip(*model.named_parameters(), strict=True)
    names = [{"head.bias": "head.decoder.bias"}.get(n, n if n.startswith("head.") else f"model.{n}") for n in names]
    for name, gradient in zip(names, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(theirs.get_parameter(name).grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("side", MASKS)
def test_a_new_head_classifies_the_first_token_that_is_no_padding(saved, side):
    model, folder = saved
    theirs = exported.AntlmBertForSequenceClassification.from_pretrained(folder, num_labels=3)
    kept = dict(theirs.model.named_parameters())
    for name, value in model.named_parameters():
        assert name.startswith("head.") or torch.equal(kept[name], value), name
    mask = MASKS[side]
    first = our_hidden(model, mask)
    torch.testing.assert_close(theirs(IDS, attention_mask=mask).logits, theirs.classifier(first), rtol=0, atol=2e-5)
    torch.testing.assert_close(theirs(IDS).logits, theirs.classifier(model.hidden_states(IDS, causal=False)[:, 0]))


def our_hidden(model, mask):
    """(batch, hidden_size): our first token of each padded row, packed."""
    cu_seqlens = F.pad(LENGTHS.cumsum(0), (1, 0)).int()
    return model.hidden_states(IDS[mask.bool()], cu_seqlens=cu_seqlens, causal=False)[cu_seqlens[:-1]]


def test_the_loss_of_a_new_head_goes_by_its_labels(saved):
    _, folder = saved
    kind = exported.AntlmBertForSequenceClassification
    for num_labels, labels, expected in (
        (3, torch.tensor([2, 0, 1]), lambda logits, labels: F.cross_entropy(logits, labels)),
        (1, torch.tensor([0.5, 2.0, 1.0]), lambda logits, labels: (logits[:, 0] - labels).square().mean()),
        (2, torch.tensor([[0.0, 1.0]] * 3), lambda x, y: -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x)).mean()),
    ):
        theirs = kind.from_pretrained(folder, num_labels=num_labels)
        result = theirs(IDS, labels=labels)
        torch.testing.assert_close(result.loss, expected(result.logits, labels))
        summed = theirs(IDS, labels=labels, num_items_in_batch=2 * labels.numel()).loss
        torch.testing.assert_close(summed, result.loss / 2)
        result.loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in theirs.classifier.parameters())
    theirs.config.problem_type = "regression"
    torch.testing.assert_close(theirs(IDS, labels=labels).loss, (theirs(IDS).logits - labels).square().mean())
    with pytest.raises(ValueError, match="is_causal must be False or None: the first token is what is classified; got"):
        theirs(IDS, is_causal=True)
    with pytest.raises(TypeError, match="got position_ids"):
        theirs(IDS, position_ids=IDS)


def test_is_causal_overrules_the_class_and_never_moves_labels(saved):
    _, folder = saved
    masked, causal = (
        kind.from_pretrained(folder) for kind in (exported.AntlmBertForMaskedLM, exported.AntlmBertForCausalLM)
    )
    torch.testing.assert_close(masked(IDS, is_causal=True).logits, causal(IDS).logits, rtol=0, atol=0)
    torch.testing.assert_close(causal(IDS, is_causal=False).logits, masked(IDS).logits, rtol=0, atol=0)
    past = causal(IDS[:, :20]).logits
    torch.testing.assert_close(causal(IDS).logits[:, :20], past, rtol=0, atol=2e-5)
    unmoved = masked(IDS, is_causal=True, labels=IDS).loss
    torch.testing.assert_close(unmoved, F.cross_entropy(causal(IDS).logits.flatten(0, 1), IDS.flatten()))


def test_bfloat16_stays_close(saved):
    model, folder = saved
    theirs = exported.AntlmBertForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = model(IDS, causal=False)
    assert (theirs(IDS).logits.float() - exact).std() < 0.1 * exact.std()


def test_a_token_that_sees_nothing_depends_on_itself_alone(saved):
    _, folder = saved
    theirs = exported.AntlmBertForMaskedLM.from_pretrained(folder)
    others = torch.cat((IDS[:, :1], (IDS[:, 1:] + 1) % 40), dim=1)
    given, changed = (theirs(ids, attention_mask=torch.zeros_like(ids)).logits[:, 0] for ids in (IDS, others))
    assert torch.equal(given, changed)
    assert given.isfinite().all()


def test_generate_goes_on_from_left_padded_text_as_our_model_does(saved):
    model, folder = saved
    theirs = exported.AntlmBertForCausalLM.from_pretrained(folder)
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    arguments = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": 39}
    given = theirs.generate(ids, **arguments)
    for prompt, row in zip(prompts, given.tolist(), strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6 and tokens[-1] != 39:
            tokens.append(int(model(torch.tensor([tokens]), causal=True)[0, -1].argmax()))
        assert row[5 - len(prompt) :][: len(tokens)] == tokens


def test_hidden_states_tuples_and_a_larger_vocabulary(saved):
    _, folder = saved
    theirs = exported.AntlmBertForMaskedLM.from_pretrained(folder)
    whole = theirs(IDS, output_hidden_states=True)
    assert len(whole.hidden_states) == 4
    assert torch.equal(theirs.head(whole.hidden_states[-1]), whole.logits)
    (logits,) = theirs(IDS, return_dict=False)
    assert torch.equal(logits, whole.logits)
    theirs.resize_token_embeddings(48, mean_resizing=False)
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    torch.testing.assert_close(theirs(IDS).logits[..., :40], logits, rtol=0, atol=0)


def test_a_new_model_is_initialised_as_ours(saved):
    model, _ = saved
    torch.manual_seed(0)
    ours = build_model(model.config)
    theirs = exported.AntlmBertForMaskedLM(exported.AntlmBertConfig(**vars(model.config)))
    for name, parameter in theirs.named_parameters():
        own = name.removeprefix("model.").replace("head.decoder.bias", "head.bias")
        reference = ours.get_parameter(own)
        if parameter.numel() < 200:  # norms, biases, sums
            assert torch.equal(parameter, reference), name
        else:
            torch.testing.assert_close(parameter.std(), reference.std(), rtol=0.2, atol=0, msg=name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS.repeat(1, 2)}, ValueError, "at most 64 tokens a sequence; got 100"),
        ({"attention_mask": torch.ones(3, 1, 50, 50)}, ValueError, r"attention_mask must have input_ids' shape"),
        ({"token_type_ids": torch.ones_like(IDS)}, ValueError, "token_type_ids must be all 0"),
        ({"position_ids": IDS}, TypeError, "got position_ids"),
        ({"output_attentions": True, "softcap": 3.0}, TypeError, "got output_attentions, softcap"),
    ],
)
def test_what_would_be_ignored_is_refused(saved, arguments, error, message):
    _, folder = saved
    theirs = exported.AntlmBertForMaskedLM.from_pretrained(folder)
    theirs(IDS, token_type_ids=torch.zeros_like(IDS), use_cache=True, output_attentions=False)
    with pytest.raises(error, match=message):
        theirs(**({"input_ids": IDS} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "bert"}, "architecture must be 'ltg_bert' or 'gpt_bert'; got 'bert'"),
        ({"is_causal": False}, "is_causal and is_decoder must not be in the config"),
        ({"is_decoder": True}, "is_causal and is_decoder must not be in the config"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple"),
    ],
)
def test_a_config_that_the_classes_do_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        exported.AntlmBertConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "baby_llama"}, "architecture must be one of ltg_bert, gpt_bert; got 'baby_llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true; got False"),
        ({"hidden_size": 30}, "hidden_size must be a multiple"),
        ({"vocab_size": 41}, "does not fit .*size mismatch"),
        ({"num_hidden_layers": 2}, "does not fit .*Unexpected key"),
        ({"model_type": "bert"}, "or GPT-BERT is read by load_public_checkpoint"),
    ],
)
def test_a_damaged_folder_is_one_line(saved, tmp_path, change, message):
    _, folder = saved
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message):
        load_pretrained(tmp_path)


def test_an_untied_decoder_is_refused(saved, tmp_path):
    _, folder = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embedding.table.weight"]
    for decoder in (table.clone(), table + 1):
        save_file(tensors | {"head.decoder.weight": decoder}, tmp_path / "model.safetensors")
        if torch.equal(decoder, table):
            assert torch.equal(load_pretrained(tmp_path).head_weight, table)
        else:
            with pytest.raises(InputError, match="head.decoder.weight must be the word embedding"):
                load_pretrained(tmp_path)
