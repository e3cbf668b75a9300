"""A model folder with its tokenizer: pipelines of transformers give what `antlm-fast fill` and `generate` give."""

import json
import stat

import pytest
import torch

from antlm_fast.cli import main
from antlm_fast.data.tokenizer import KINDS, TokenizerConfig, train_tokenizer
from antlm_fast.evaluation.sentence_scores import READ_OUTS, score_sentences
from antlm_fast.models import BabyLlamaConfig, GptBertConfig, LtgBertConfig, build_model
from antlm_fast.models.decoding import generate
from antlm_fast.pipeline import open_model, save_model
from antlm_fast.types import InputError

transformers = pytest.importorskip("transformers")
exported = pytest.importorskip("antlm_fast.models.modeling_antlm_bert")

ARCHITECTURES = (BabyLlamaConfig, LtgBertConfig, GptBertConfig)
SENTENCES = ["The old man stands.", "the cats sat", "The cat sat on the mat, and nobody waited."]
STOCK = {"causal": transformers.LlamaForCausalLM, "masked": transformers.EuroBertForMaskedLM}
OWN = {"causal": exported.AntlmBertForCausalLM, "masked": exported.AntlmBertForMaskedLM}


@pytest.fixture(
    scope="module",
    params=[(kind, tokens) for kind in ARCHITECTURES for tokens in KINDS],
    ids=lambda param: f"{param[0].architecture}-{param[1]}",
)
def saved(request, tmp_path_factory):
    """(model, tokenizer, folder, {read-out: transformers' model and tokenizer})"""
    kind, tokens = request.param
    tokenizer = train_tokenizer(SENTENCES * 20, TokenizerConfig(kind=tokens, vocab_size=600))
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind is BabyLlamaConfig:
        sizes |= {"num_key_value_heads": 2, "rope_theta": 700.0}
    model = build_model(kind(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, **sizes)).eval()
    with torch.no_grad():  # large enough for clear favourites
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("run") / "model"
    save_model(model, tokenizer, folder)
    theirs = {}
    for name, their_class in (STOCK if kind is BabyLlamaConfig else OWN).items():
        its = folder if name == "causal" else folder / "masked"
        theirs[name] = their_class.from_pretrained(its), transformers.PreTrainedTokenizerFast.from_pretrained(its)
    return model, tokenizer, folder, theirs


@pytest.mark.parametrize("text", ["The old <mask> stands.", "<mask>.", "the <mask>s sat, and"])
def test_the_fill_mask_pipeline_gives_what_fill_prints(saved, text, capsys):
    _, tokenizer, folder, theirs = saved
    model, their_tokenizer = theirs["masked"]
    text = text.replace("<mask>", tokenizer.mask_token)
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode_with_masks(text)
    found = transformers.pipeline("fill-mask", model=model, tokenizer=their_tokenizer)(text, top_k=tokenizer.vocab_size)
    allowed = [answer for answer in found if answer["token"] not in tokenizer.special_id_set]
    total = sum(answer["score"] for answer in allowed)
    expected = [(tokenizer.decode([answer["token"]]).strip(), answer["score"] / total) for answer in allowed[:5]]
    assert main(["fill", str(folder), text]) == 0
    assert capsys.readouterr().out == f"mask 1: {'  '.join(f'{word} {share:.3f}' for word, share in expected)}\n"


def test_generation_goes_on_where_the_prompt_ends(saved):
    model, tokenizer, _, theirs = saved
    their_model, their_tokenizer = theirs["causal"]
    prompt = their_tokenizer("The old man", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == tokenizer.encode("The old man")[:-1]
    expected = generate(model, prompt["input_ids"][0], 8, temperature=0, eos_id=tokenizer.role_ids["eos_token_id"])
    assert their_model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist() == expected
    pipeline = transformers.pipeline("text-generation", model=their_model, tokenizer=their_tokenizer)
    (answer,) = pipeline("The old man", max_new_tokens=8, do_sample=False, return_tensors=True)
    assert answer["generated_token_ids"] == expected


def test_sentences_of_an_opened_folder_score_what_they_scored_in_training(saved):
    """Its tokenizer ends a sentence as training did, though the exported one does not."""
    model, tokenizer, folder, _ = saved
    again, own = open_model(folder)
    assert own.encode_batch(SENTENCES) == tokenizer.encode_batch(SENTENCES)
    for read_out in READ_OUTS:
        before, after = (score_sentences(*who, SENTENCES, read_out) for who in ((model, tokenizer), (again, own)))
        assert before.sums.tolist() == after.sums.tolist()
        assert before.num_tokens.tolist() == after.num_tokens.tolist()


def test_what_transformers_saved_in_several_files_is_opened_and_scores_the_same(saved, tmp_path):
    model, tokenizer, _, theirs = saved
    for part in theirs["masked"]:
        part.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if part is theirs["masked"][0] else {}))
    assert not (tmp_path / "model.safetensors").exists()
    again, own = open_model(tmp_path)
    for read_out in READ_OUTS:
        before, after = (score_sentences(*who, SENTENCES, read_out) for who in ((model, tokenizer), (again, own)))
        assert before.sums.tolist() == after.sums.tolist()


def test_what_a_folder_lacks_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no model in .*: it holds no config.json and no model.safetensors$"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no model in .*: it holds no model.safetensors$"):
        open_model(tmp_path)


def test_a_text_that_is_too_long_is_cut_to_what_the_model_takes(saved):
    for model, tokenizer in saved[3].values():
        ids = tokenizer("the cat sat " * 1000, truncation=True, return_tensors="pt")
        assert model(**ids).logits.shape[:2] == (1, 32)


def test_each_read_out_refuses_the_folder_of_the_other(saved):
    model, tokenizer, folder, theirs = saved
    with pytest.raises(transformers.pipelines.PipelineException, match="does not define a `mask_token`"):
        transformers.pipeline("fill-mask", model=theirs["causal"][0], tokenizer=theirs["causal"][1])
    again, own = open_model(folder / "masked")
    assert again.config == model.config
    assert own.fingerprint == tokenizer.fingerprint
    masked = json.loads((folder / "masked" / "config.json").read_text())
    assert "AutoModelForCausalLM" not in masked.get("auto_map", {})
    assert masked["architectures"] == [OWN["masked"].__name__ if "auto_map" in masked else "EuroBertForMaskedLM"]


def test_everything_written_may_be_read_by_whom_the_umask_lets(saved):
    fresh = saved[2].parent / "fresh"
    fresh.touch()
    files = [path for path in saved[2].rglob("*") if path.is_file()]
    assert {stat.filemode(path.stat().st_mode) for path in files} == {stat.filemode(fresh.stat().st_mode)}
