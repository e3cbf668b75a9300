"""The built-in corpus: deterministic, sized, grammatical where it is easy to tell, and apart from its minimal pairs."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from typing import Any

import pytest

from antlm_fast.data.builtin import lexicon, sentences, verbs
from antlm_fast.data.builtin.corpus import documents, is_held_out, minimal_pairs, written
from antlm_fast.types import InputError

FIELDS = {"morphology", "syntax", "semantics", "syntax_semantics"}
# sha256 of the first 2,000 words of seed 0: a change of grammar or lexicon changes what every model was trained on
DIGEST = "c58a2a3f1d5c6eadcc1b37267ed3379493f11a39401e17d82c824cdc48b7fd6e"


def sentences_of(document: str) -> list[str]:
    return re.split(r"(?<=[.?]) ", document)


def words_of(sentence: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", sentence)


@pytest.fixture(scope="module")
def sample() -> list[str]:
    """The sentences of 250,000 words."""
    return [sentence for document in documents(250_000, seed=11) for sentence in sentences_of(document)]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return list(minimal_pairs(100))


def test_the_text_of_a_seed_never_changes() -> None:
    words = " ".join(documents(2_000)).split(" ")[:2_000]
    assert hashlib.sha256(" ".join(words).encode()).hexdigest() == DIGEST
    assert list(documents(500, seed=3)) == list(documents(500, seed=3))
    assert list(documents(500, seed=3)) != list(documents(500, seed=4))


def test_a_longer_corpus_begins_with_the_shorter_one() -> None:
    short, long = list(documents(1_000, seed=5)), list(documents(4_000, seed=5))
    assert long[: len(short)] == short
    assert len(long) > len(short)


@pytest.mark.parametrize("num_words", [1, 100, 20_000])
def test_the_size_is_reached_and_passed_by_one_document_at_most(num_words: int) -> None:
    sizes = [len(document.split(" ")) for document in documents(num_words)]
    assert sum(sizes) >= num_words
    assert sum(sizes[:-1]) < num_words
    assert max(sizes) < 200


def test_documents_are_streamed() -> None:
    first = list(itertools.islice(documents(10**15), 3))
    assert first == list(documents(200))[:3]


def test_an_empty_corpus_is_empty_and_negative_sizes_are_refused() -> None:
    assert list(documents(0)) == []
    assert list(minimal_pairs(0)) == []
    with pytest.raises(InputError, match="num_words must not be negative; got -1"):
        documents(-1)
    with pytest.raises(InputError, match="per_phenomenon must not be negative; got -1"):
        minimal_pairs(-1)


def test_documents_are_one_to_five_written_sentences() -> None:
    counts: Counter[int] = Counter()
    for document in documents(20_000):
        sentences = sentences_of(document)
        counts[len(sentences)] += 1
        for sentence in sentences:
            assert re.fullmatch(r"[A-Z][A-Za-z']*(,? [A-Za-z']+)*[.?]", sentence), sentence
    assert set(counts) == {1, 2, 3, 4, 5}


def test_the_lexicon_holds_several_hundred_word_forms(sample: list[str]) -> None:
    seen = Counter(word.lower() for sentence in sample for word in words_of(sentence))
    assert 600 <= len(seen) <= 950
    assert min(seen.values()) >= 5  # no form is too rare to be learnt
    nouns = {word for kind in lexicon.NOUNS.values() for noun in kind for word in (noun.singular, noun.plural) if word}
    assert nouns <= set(seen)
    assert {"children", "mice", "geese", "wolves", "men", "women", "calves", "knives"} <= set(seen)
    assert {"himself", "herself", "itself", "themselves", "ever", "any", "never", "nobody", "these"} <= set(seen)


def test_no_sentence_of_a_pair_is_ever_written(sample: list[str], pairs: list[dict[str, Any]]) -> None:
    held_out = {pair[key] for pair in pairs for key in ("sentence_good", "sentence_bad")}
    assert all(is_held_out(sentence) for sentence in held_out)
    assert not any(is_held_out(sentence) for sentence in sample)
    assert held_out.isdisjoint(sample)


def test_the_grammar_makes_no_bad_sentence_even_where_nothing_is_held_out(pairs: list[dict[str, Any]]) -> None:
    schedule = [kind for kind, share in sentences.SENTENCES.items() for _ in range(share)]
    teller = sentences.Storyteller(17)
    made = set()
    for count in range(60_000):
        if count % 4 == 0:
            teller.new_document()
        teller.new_sentence()
        made.add(written(teller.pick(schedule)(teller)))
    assert made.isdisjoint(pair["sentence_bad"] for pair in pairs)


def test_pairs_have_blimp_form(pairs: list[dict[str, Any]]) -> None:
    keys = ["sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "pair_id"]
    by_uid: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        assert list(pair) == keys
        assert pair["field"] in FIELDS
        by_uid.setdefault(pair["UID"], []).append(pair)
    assert len(by_uid) >= 20
    assert {pair["field"] for pair in pairs} == FIELDS
    for rows in by_uid.values():
        assert [row["pair_id"] for row in rows] == list(range(100))
        assert len({(row["sentence_good"], row["sentence_bad"]) for row in rows}) == 100
        assert len({(row["field"], row["linguistics_term"]) for row in rows}) == 1


def test_pairs_differ_in_one_word_or_in_order(pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        good, bad = words_of(pair["sentence_good"]), words_of(pair["sentence_bad"])
        assert len(good) == len(bad), pair
        assert good != bad
        assert pair["sentence_good"][-1] == pair["sentence_bad"][-1]
        one_word = sum(a != b for a, b in zip(good, bad, strict=True)) == 1
        same_words = Counter(map(str.lower, good)) == Counter(map(str.lower, bad))
        assert one_word or same_words, pair


def test_more_pairs_begin_with_the_same_pairs(pairs: list[dict[str, Any]]) -> None:
    few = list(minimal_pairs(3))
    assert few == [pair for pair in pairs if pair["pair_id"] < 3]
    assert few != list(minimal_pairs(3, seed=2))


def test_every_word_of_a_pair_is_in_a_training_sample(pairs: list[dict[str, Any]]) -> None:
    known = {word for document in documents(100_000) for word in document.replace(".", "").replace("?", "").split(" ")}
    known |= {word.lower() for word in known}
    for pair in pairs:
        for sentence in (pair["sentence_good"], pair["sentence_bad"]):
            unknown = {word for word in words_of(sentence) if word not in known and word.lower() not in known}
            assert not unknown, (unknown, sentence)


SINGULAR = {noun.singular for kind in lexicon.NOUNS.values() for noun in kind if noun.plural}
PLURAL = {noun.plural for kind in lexicon.NOUNS.values() for noun in kind if noun.plural}
ADJECTIVES = {word for kind in lexicon.ADJECTIVES.values() for word in kind}
SINGULAR_VERBS = {"is", "was", "has", "does", "isn't", "wasn't", "hasn't", "doesn't"}
PLURAL_VERBS = {"are", "were", "have", "do", "aren't", "weren't", "haven't", "don't"}
SINGULAR_VERBS |= {verb.third for verb in verbs.VERBS.values()}
UNAMBIGUOUS_BASES = {verb.base for verb in verbs.VERBS.values() if verb.base not in (verb.past, verb.participle)}


def test_determiners_agree_with_their_nouns(sample: list[str]) -> None:
    """A determiner, at most one adjective, a noun."""
    takes_singular = {"this", "that", "a", "an", "every", "each", "another", "one"}
    takes_plural = {"these", "those", "many", "several", "two", "three", "four", "most", "all"}
    checked = 0
    for sentence in sample[:15_000]:
        words = [word.lower() for word in words_of(sentence)]
        for index, word in enumerate(words[:-1]):
            place = index + 1
            if word in takes_singular | takes_plural and words[place] in ADJECTIVES and place + 1 < len(words):
                place += 1
            noun = words[place]
            if noun in SINGULAR | PLURAL and word in takes_singular and (word != "that" or place == len(words) - 1):
                assert noun in SINGULAR, sentence
                checked += 1
            if noun in SINGULAR | PLURAL and word in takes_plural:
                assert noun in PLURAL, sentence
                checked += 1
    assert checked > 3_000


def test_articles_fit_the_next_letter(sample: list[str]) -> None:
    followers = [match for sentence in sample for match in re.findall(r"\b([Aa]n?) (\w)", sentence)]
    assert len(followers) > 3_000
    assert all((article.lower() == "an") == (letter in "aeiou") for article, letter in followers)


def test_verbs_agree_with_the_noun_that_opens_the_sentence(sample: list[str]) -> None:
    """The ... noun verb: only where the noun opens the sentence, so that the noun is the head of the subject."""
    checked = 0
    for sentence in sample:
        match = re.match(r"The (?:(\w+) )?(\w+) ([\w']+)", sentence)
        if not match or (match[1] and match[1] not in ADJECTIVES):
            continue
        noun, verb = match[2], match[3]
        if noun in SINGULAR and verb in SINGULAR_VERBS | PLURAL_VERBS | UNAMBIGUOUS_BASES:
            assert verb in SINGULAR_VERBS, sentence
            checked += 1
        elif noun in PLURAL and verb in SINGULAR_VERBS | PLURAL_VERBS | UNAMBIGUOUS_BASES:
            assert verb not in SINGULAR_VERBS, sentence
            checked += 1
    assert checked > 1_000


def test_reflexives_agree_with_names(sample: list[str]) -> None:
    """Name ... reflexive: sentences whose only noun is a name at their beginning."""
    gender = {name.singular: {"m": "himself", "f": "herself"}[name.gender] for name in lexicon.NAMES}
    checked = 0
    for sentence in sample:
        words = words_of(sentence)
        if words[0] in gender and len(words) < 5 and words[-1].endswith(("self", "selves")):
            assert words[-1] == gender[words[0]], sentence
            checked += 1
    assert checked > 50


def test_ever_and_any_stand_behind_a_licensor(sample: list[str]) -> None:
    licensors = {"no", "not", "nobody", "cannot"}
    checked = 0
    for sentence in sample:
        words = [word.lower() for word in words_of(sentence)]
        for word in {"ever", "any"} & set(words):
            before = words[: words.index(word)]
            licensed = any(item in licensors or item.endswith("n't") for item in before)
            assert licensed or sentence.endswith("?"), sentence
            checked += 1
    assert checked > 1_000


def test_bad_sentences_break_the_rule_they_name(pairs: list[dict[str, Any]]) -> None:
    """Three paradigms whose rule a few lines can check."""
    for pair in pairs:
        good, bad = words_of(pair["sentence_good"]), words_of(pair["sentence_bad"])
        changed = [(a, b) for a, b in zip(good, bad, strict=True) if a != b]
        if pair["UID"] == "anaphor_gender_agreement":
            assert {*changed[0]} == {"himself", "herself"}
        elif pair["UID"] == "coordination_agreement":
            assert changed[0][1] in SINGULAR_VERBS
            assert changed[0][0] not in SINGULAR_VERBS
        elif pair["UID"].startswith("wh_that"):
            assert {*changed[0]} in ({"that", "who"}, {"that", "what"})
