"""Models on disk: Hugging Face reads ours, we read theirs, and damage is one clear line."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from antlm_fast.models import BabyLlama, BabyLlamaConfig, load_pretrained, save_pretrained
from antlm_fast.models.pretrained import write_safetensors
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
    masked = transformers.AutoModelForMaskedLM.from_pretrained(folder / "masked")
    assert type(masked) is transformers.EuroBertForMaskedLM
    torch.testing.assert_close(masked(IDS).logits, model(IDS, causal=False), rtol=1e-5, atol=1e-6)
    assert (causal(IDS).logits - masked(IDS).logits).abs().max() > 0.01
    padded = masked(torch.cat((IDS, IDS), dim=1), attention_mask=torch.tensor([[1] * 6 + [0] * 6])).logits[:, :6]
    torch.testing.assert_close(padded, model(IDS, causal=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["grouped", "tied"])
def test_stock_classes_take_every_setting_from_the_folder(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings = {"rope_theta": 700.0, "rms_norm_eps": 0.01, "initializer_range": 0.5, "num_attention_heads": 4}
    other = {"num_key_value_heads": 2} if kind == "grouped" else {"tie_word_embeddings": True}
    model = BabyLlama(BabyLlamaConfig(**sizes, **settings, **other)).eval()
    save_pretrained(model, tmp_path)  # no token has a role
    for auto, inner, causal in (("AutoModelForCausalLM", "", True), ("AutoModelForMaskedLM", "masked", False)):
        theirs = getattr(transformers, auto).from_pretrained(tmp_path / inner)
        torch.testing.assert_close(theirs(IDS).logits, model(IDS, causal=causal), rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "again")
        assert torch.equal(load_pretrained(tmp_path / "again")(IDS, causal=True), model(IDS, causal=True))


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


def test_a_loaded_model_drops_nothing_as_in_transformers(saved):
    assert not load_pretrained(saved[1]).training


def sharded(folder, tensors):
    """The folder's weights in two files, as Hugging Face cuts large ones."""
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_model_cut_into_several_files_is_read(saved):
    model, folder = saved
    path = folder / "model.safetensors"
    index = sharded(folder, load_file(path))
    path.unlink()
    assert all(torch.equal(load_pretrained(folder).state_dict()[name], t) for name, t in model.state_dict().items())
    part, place = folder / "model-00002-of-00002.safetensors", folder / "model.safetensors.index.json"
    part.rename(folder / "elsewhere")
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors does not exist; the model's weights"):
        load_pretrained(folder)
    for file in ("../model.safetensors", "", 3, "model.safetensors.index.json"):
        place.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(InputError, match=r"index.json: weight_map must name a .safetensors file of its folder for"):
            load_pretrained(folder)
    first = "model-00001-of-00002.safetensors"
    place.write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], first)}))
    with pytest.raises(InputError, match=r"index.json: .* must be in model-00001-of-00002.safetensors; it is not"):
        load_pretrained(folder)
    place.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(InputError, match=r"index.json: weight_map must name a .safetensors file .*; got None"):
        load_pretrained(folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for _ in range(2):  # also over a file that is there
            write_safetensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))


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
