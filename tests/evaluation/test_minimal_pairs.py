"""Sentence scores against a loop over single tokens; accuracy tables by hand; errors by their text."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antlm_fast.evaluation.minimal_pairs import (
    MinimalPair,
    accuracy_table,
    evaluate_pairs,
    format_table,
    load_pairs,
)
from antlm_fast.evaluation.sentence_scores import READ_OUTS, score_sentences
from antlm_fast.models import GptBert, GptBertConfig, LanguageModel, LtgBert, LtgBertConfig
from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.types import InputError, Vocabulary

BOS, EOS, MASK = 0, 1, 2
WORDS = ("the", "cat", "cats", "sees", "see", "a", "dog", "it", "sleeps")


@dataclass
class WordTokenizer:
    """One id per word, with or without <s> ... </s> around the text."""

    template: bool = True

    @property
    def vocabulary(self) -> Vocabulary:
        size = 3 + len(WORDS)
        return Vocabulary(size=size, mask_id=MASK, special_ids=(BOS, EOS, MASK), word_start=np.ones(size, dtype=bool))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = [[3 + WORDS.index(word) for word in text.split()] for text in texts]
        return [[BOS, *ids, EOS] for ids in encoded] if self.template else encoded


@pytest.fixture(scope="module")
def model() -> BabyLlama:
    torch.manual_seed(0)
    config = BabyLlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        initializer_range=0.5,  # wide, so that sentences differ by far more than rounding
    )
    return BabyLlama(config)


SENTENCES = [
    "the cat sees a dog",
    "the cats sees a dog",
    "it sleeps",
    "the cat sees a dog",  # a repeat
    "dog",
    "a dog sees it",
]


def naive_score(model: LanguageModel, ids: list[int], read_out: str) -> tuple[float, int]:
    """One forward per token, the full softmax, no batching."""
    total, count = 0.0, 0
    for k, token in enumerate(ids):
        if token in (BOS, EOS, MASK) or (k == 0 and read_out != "masked"):
            continue
        seen = list(ids)
        if read_out != "causal":
            seen[k] = MASK
        logits = model(torch.tensor([seen]), causal=read_out == "causal")[0]
        read_at = k if read_out == "masked" else k - 1
        total += float(torch.log_softmax(logits[read_at].double(), dim=-1)[token])
        count += 1
    return total, count


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
@pytest.mark.parametrize("read_out", list(READ_OUTS))
def test_scores_equal_a_loop_over_single_tokens(
    model: BabyLlama, read_out: str, batch_tokens: int, template: bool
) -> None:
    tokenizer = WordTokenizer(template)
    sentences = [text for text in SENTENCES if template or read_out == "masked" or text != "dog"]
    scores = score_sentences(model, tokenizer, sentences, read_out, batch_tokens=batch_tokens, progress=False)
    with torch.no_grad():
        expected = [naive_score(model, ids, read_out) for ids in tokenizer.encode_batch(sentences)]
    np.testing.assert_allclose(scores.sums, [total for total, _ in expected], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(scores.num_tokens, [count for _, count in expected])
    np.testing.assert_allclose(scores.means, [total / count for total, count in expected], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(LtgBert, LtgBertConfig), (GptBert, GptBertConfig)], ids=["ltg_bert", "gpt_bert"]
)
@pytest.mark.parametrize("read_out", list(READ_OUTS))
def test_scores_of_a_model_with_a_head_of_its_own(model_class: Any, config_class: Any, read_out: str) -> None:
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = model_class(config_class(vocab_size=3 + len(WORDS), max_position_embeddings=12, **sizes))
    with torch.no_grad():
        made.head.bias.copy_(torch.linspace(-2, 2, 3 + len(WORDS)))
    made.train()
    scores = score_sentences(made, WordTokenizer(), SENTENCES, read_out, batch_tokens=20, progress=False)
    assert made.training is True
    made.eval()
    with torch.no_grad():
        expected = [naive_score(made, ids, read_out) for ids in WordTokenizer().encode_batch(SENTENCES)]
    np.testing.assert_allclose(scores.sums, [total for total, _ in expected], atol=1e-5, rtol=1e-5)


def test_a_causal_score_is_the_chain_rule_of_the_text_given_the_template(model: BabyLlama) -> None:
    tokenizer = WordTokenizer()
    ids = tokenizer.encode_batch(["the cat sleeps"])[0]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids]), causal=True)[0].double(), dim=-1)
    expected = sum(float(log_p[t - 1, ids[t]]) for t in (1, 2, 3))  # </s> at 4 is not scored
    got = score_sentences(model, tokenizer, ["the cat sleeps"], "causal", progress=False)
    assert got.sums[0] == pytest.approx(expected, abs=1e-5)
    assert got.num_tokens[0] == 3


def test_bfloat16_is_close_and_the_training_mode_comes_back(model: BabyLlama) -> None:
    model.train()
    exact = score_sentences(model, WordTokenizer(), SENTENCES, "masked", progress=False)
    rounded = score_sentences(model, WordTokenizer(), SENTENCES, "masked", precision="bfloat16", progress=False)
    assert model.training is True
    assert rounded.sums.dtype == np.float64
    np.testing.assert_allclose(rounded.sums, exact.sums, rtol=0.1, atol=0.3)
    assert not np.array_equal(rounded.sums, exact.sums)


def test_progress_prints_a_plain_line_where_there_is_no_terminal(
    model: BabyLlama, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("antlm_fast.evaluation.sentence_scores.SECONDS_BETWEEN_LINES", 0.0)
    score_sentences(model, WordTokenizer(), ["it sleeps"], "masked")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == "masked scores: 2 of 2 tokens (100 %), 0 s left"


@pytest.mark.parametrize(
    ("sentences", "options", "fragment"),
    [
        (["it sleeps"], {"read_out": "left"}, "read_out must be one of 'causal', 'masked', 'mntp'; got 'left'"),
        (["it sleeps"], {"precision": "int4"}, "precision must be 'float32' or 'bfloat16'; got 'int4'"),
        (["it sleeps"], {"batch_tokens": 0}, "batch_tokens must be at least 1; got 0"),
        (["it " * 11], {}, "sentence must be at most 12 tokens long (the model's max_position_embeddings); got 13"),
        (["it sleeps", ""], {}, "sentence must have a token that 'causal' can score; got ''"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: BabyLlama, sentences: list[str], options: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(InputError) as error:
        score_sentences(model, WordTokenizer(), sentences, **{"read_out": "causal", "progress": False, **options})
    assert fragment in str(error.value)


def test_a_lone_first_token_has_no_causal_score(model: BabyLlama) -> None:
    with pytest.raises(InputError, match="token that 'mntp' can score; got 'dog'"):
        score_sentences(model, WordTokenizer(template=False), ["dog"], "mntp", progress=False)


def test_scores_that_are_not_finite_are_refused(model: BabyLlama) -> None:
    broken = BabyLlama(model.config)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="model must give finite log-probabilities; got 'causal' not finite"):
        score_sentences(broken, WordTokenizer(), ["it sleeps"], "causal", progress=False)


# tables


def pair(uid: str, field: str, good: str = "it sleeps", bad: str = "it see") -> MinimalPair:
    return MinimalPair(sentence_good=good, sentence_bad=bad, uid=uid, field=field)


def test_overall_is_the_mean_over_uids_not_over_pairs() -> None:
    pairs = [pair("a", "syntax")] * 4 + [pair("b", "syntax")] * 1 + [pair("c", "morphology")] * 2
    table = accuracy_table(pairs, [True, True, True, False, False, True, False])
    assert table == {
        "overall": pytest.approx((0.75 + 0.0 + 0.5) / 3),
        "by_uid": {
            "a": {"accuracy": 0.75, "num_pairs": 4, "field": "syntax"},
            "b": {"accuracy": 0.0, "num_pairs": 1, "field": "syntax"},
            "c": {"accuracy": 0.5, "num_pairs": 2, "field": "morphology"},
        },
        "by_field": {
            "morphology": {"accuracy": 0.5, "num_pairs": 2},
            "syntax": {"accuracy": 0.375, "num_pairs": 5},
        },
    }


def test_a_tie_is_wrong(model: BabyLlama) -> None:
    results = evaluate_pairs(
        model, WordTokenizer(), [pair("tie", "x", "it sleeps", "it sleeps")], ["causal", "masked"], progress=False
    )
    assert results["read_outs"]["causal"]["sum"]["overall"] == 0.0
    assert results["read_outs"]["masked"]["mean"]["overall"] == 0.0


def test_evaluate_pairs_counts_what_the_scores_say(model: BabyLlama) -> None:
    texts = [("the cat sees a dog", "the cats sees a dog"), ("it sleeps", "it see"), ("a dog sees it", "it dog a")]
    pairs = [pair(f"uid_{index}", "f", good, bad) for index, (good, bad) in enumerate(texts)]
    results = evaluate_pairs(model, WordTokenizer(), pairs, READ_OUTS, source="here.jsonl", progress=False)
    assert (results["source"], results["num_pairs"], results["chance"]) == ("here.jsonl", 3, 0.5)
    with torch.no_grad():
        for read_out in READ_OUTS:
            for index, both in enumerate(texts):
                (good, n_good), (bad, n_bad) = (
                    naive_score(model, ids, read_out) for ids in WordTokenizer().encode_batch(list(both))
                )
                tables = results["read_outs"][read_out]
                assert tables["sum"]["by_uid"][f"uid_{index}"]["accuracy"] == float(good > bad)
                assert tables["mean"]["by_uid"][f"uid_{index}"]["accuracy"] == float(good / n_good > bad / n_bad)
    assert json.loads(json.dumps(results)) == results


def test_swapping_good_and_bad_turns_the_accuracy_around(model: BabyLlama) -> None:
    pairs = [pair("u", "f", "the cat sees a dog", "the cats sees a dog"), pair("u", "f", "it sleeps", "it see")]
    swapped = [replace(p, sentence_good=p.sentence_bad, sentence_bad=p.sentence_good) for p in pairs]
    first, second = (
        evaluate_pairs(model, WordTokenizer(), these, ["masked"], progress=False)["read_outs"]["masked"]["sum"]
        for these in (pairs, swapped)
    )
    assert first["overall"] + second["overall"] == 1.0


def test_no_pairs_and_unknown_read_outs_are_refused(model: BabyLlama) -> None:
    with pytest.raises(InputError, match="pairs must hold at least one pair; got none"):
        evaluate_pairs(model, WordTokenizer(), [])
    with pytest.raises(InputError, match="read_outs must be among 'causal', 'masked', 'mntp'; got 'best'"):
        evaluate_pairs(model, WordTokenizer(), [pair("u", "f")], ["best"])


def test_the_printed_table_is_aligned() -> None:
    pairs = [pair("agreement", "syntax")] * 3 + [pair("plural", "morphology")]
    results = {
        "source": "builtin",
        "num_pairs": 4,
        "chance": 0.5,
        "read_outs": {
            "causal": {"sum": accuracy_table(pairs, [True] * 4), "mean": accuracy_table(pairs, [False] * 4)},
            "masked": {"sum": accuracy_table(pairs, [True, False, False, True]), "mean": {}},
        },
    }
    assert format_table(results).splitlines() == [
        "minimal pairs (builtin): accuracy in %, sum of log-probabilities, chance 50.0",
        "---------------------------------",
        "UID         pairs  causal  masked",
        "agreement       3   100.0    33.3",
        "plural          1   100.0   100.0",
        "---------------------------------",
        "field       pairs  causal  masked",
        "morphology      1   100.0   100.0",
        "syntax          3   100.0    33.3",
        "---------------------------------",
        "overall         4   100.0    66.7",
    ]
    with pytest.raises(InputError, match="aggregate must be 'sum' or 'mean'; got 'max'"):
        format_table(results, "max")


# files

GOOD_LINE = '{"sentence_good": "It sleeps.", "sentence_bad": "It sleep."}'


def test_a_blimp_line_and_a_supplement_line(tmp_path: Path) -> None:
    folder = tmp_path / "supplement_filtered"
    folder.mkdir()
    blimp = {
        "sentence_good": "Who can Ann see?",
        "sentence_bad": "Can Ann see who?",
        "field": "syntax",
        "linguistics_term": "island_effects",
        "UID": "wh_island",
        "pairID": "7",
    }
    (folder / "b.jsonl").write_text(json.dumps(blimp) + "\n\n", encoding="utf-8")
    (folder / "a_hypernym.jsonl").write_text(GOOD_LINE + "\n", encoding="utf-8")
    (folder / "notes.txt").write_text("not pairs")
    assert load_pairs(str(folder)) == [
        MinimalPair(
            sentence_good="It sleeps.", sentence_bad="It sleep.", uid="a_hypernym", field="supplement_filtered"
        ),
        MinimalPair(
            sentence_good="Who can Ann see?",
            sentence_bad="Can Ann see who?",
            uid="wh_island",
            field="syntax",
            linguistics_term="island_effects",
        ),
    ]
    assert load_pairs(str(folder / "b.jsonl")) == load_pairs(str(folder))[1:]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (GOOD_LINE + "\n{broken\n", "pairs.jsonl, line 2: not JSON: "),
        ("[1, 2]\n", "pairs.jsonl, line 1: a pair must be a JSON object; got [1, 2]"),
        ('\n{"sentence_good": "It."}\n', "pairs.jsonl, line 2: key 'sentence_bad' is missing"),
        (
            '{"sentence_good": 3, "sentence_bad": "It."}\n',
            "pairs.jsonl, line 1: sentence_good must be a text that is not empty; got 3",
        ),
        (
            '{"sentence_good": "It.", "sentence_bad": " "}\n',
            'pairs.jsonl, line 1: sentence_bad must be a text that is not empty; got " "',
        ),
        ("\n\n", "pairs.jsonl: holds no pair"),
        (b"\xff\xfe\n", "pairs.jsonl, byte 0 is 0xff"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: str | bytes, fragment: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        load_pairs(str(file))
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder of them or 'builtin'; no such path: .*nowhere"):
        load_pairs(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"no \.jsonl file in this folder"):
        load_pairs(str(tmp_path))


def test_the_builtin_pairs_load() -> None:
    pairs = load_pairs("builtin")
    counts = {uid: sum(p.uid == uid for p in pairs) for uid in {p.uid for p in pairs}}
    assert set(counts.values()) == {100}
    assert all(p.sentence_good != p.sentence_bad and p.field for p in pairs)
