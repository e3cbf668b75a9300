"""Models on disk: Hugging Face reads ours, we read theirs, and damage is one clear line."""

import json

import pytest
import torch

from antlm_fast.models import BabyLlama, BabyLlamaConfig, load_pretrained, save_pretrained
from antlm_fast.types import InputError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = BabyLlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = BabyLlama(config)
    save_pretrained(model, tmp_path / "model", token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return model, tmp_path / "model"


def test_a_saved_model_is_read_back_equal(saved):
    model, folder = saved
    again = load_pretrained(folder)
    assert again.config.kv_heads == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_stock_hugging_face_classes_read_it_in_both_directions(saved):
    transformers = pytest.importorskip("transformers")
    model, folder = saved
    causal = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(causal(IDS).logits, model(IDS, causal=True), rtol=1e-5, atol=1e-6)
    # EuroBERT is a bidirectional Llama with the same parameter names
    values = json.loads((folder / "config.json").read_text())
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    config = transformers.EuroBertConfig(
        **{name: values[name] for name in [*names, "num_key_value_heads", "rms_norm_eps"]},
        rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
        **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "mask")},
    )
    masked = transformers.EuroBertForMaskedLM(config)
    masked.load_state_dict(model.state_dict())
    torch.testing.assert_close(masked(IDS).logits, model(IDS, causal=False), rtol=1e-5, atol=1e-6)


def test_a_model_saved_by_hugging_face_is_read(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, folder = saved
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again = load_pretrained(tmp_path / "theirs")
    assert torch.equal(again(IDS, causal=True), model(IDS, causal=True))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    config = BabyLlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    save_pretrained(BabyLlama(config), tmp_path)
    again = load_pretrained(tmp_path)
    assert again.head_weight is again.model.embed_tokens.weight


def test_a_truncated_file_is_one_line(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model.safetensors is damaged or cut short"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'llama', 'eurobert' or 'antlm_bert'; got 'gpt2'"),
        ({"vocab_size": 51}, "does not fit .*size mismatch"),
        ({"attention_bias": True}, "attention_bias must be false; got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'; got 'gelu'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type must be 'default'; got 'linear'"),
        ({"head_dim": 64}, r"head_dim must be hidden_size / num_attention_heads \(8\); got 64"),
        ({"hidden_size": 30}, "hidden_size must be a multiple"),
        ({"vocab_size": "50"}, "config.json: vocab_size must be a whole number; got '50'"),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps must be a number; got None"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(saved, change, message):
    _, folder = saved
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_missing_files_are_named(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors does not exist"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json does not exist"):
        load_pretrained(folder)
