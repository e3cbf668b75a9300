"""A corpus without files: simple English written by a grammar, and minimal pairs held out from it.

For demonstrations, tests and offline machines. What the language is: third-person English of a children's book, about
nine hundred word forms, with agreement over attractors, relative and embedded clauses, questions, negation,
reflexives, passives and argument structure. What it is not: natural text. It has no first or second person, little
idiom and no world knowledge beyond which kinds of nouns suit a verb; scores on its minimal pairs say how well a model
learnt this grammar, and are not comparable to scores on BLiMP.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from antlm_fast.data.builtin.pairs import PHENOMENA
from antlm_fast.data.builtin.sentences import SENTENCES, Storyteller
from antlm_fast.types import InputError

HELD_OUT_SHARE = 8  # one sentence in so many is never in the corpus
_SCHEDULE = tuple(sentence for sentence, share in SENTENCES.items() for _ in range(share))


def written(words: str) -> str:
    """The sentence with its first letter a capital."""
    return words[0].upper() + words[1:]


def is_held_out(sentence: str) -> bool:
    """Whether the written sentence is set aside for minimal pairs; a fixed property of its text."""
    return zlib.crc32(sentence.encode()) % HELD_OUT_SHARE == 0


def documents(num_words: int, seed: int = 0) -> Iterator[str]:
    """Writes documents of one to five related sentences until they hold num_words words.

    Args:
        num_words: words (split at spaces) to give at least; the last document is given whole.
        seed: seed of the text. A longer corpus of the same seed begins with the same documents.

    Returns:
        An iterator over documents, one line each; memory does not depend on num_words.

    Raises:
        InputError: num_words is negative.
    """
    if num_words < 0:
        raise InputError(f"num_words must not be negative; got {num_words}")
    return _documents(num_words, seed)


def _documents(num_words: int, seed: int) -> Iterator[str]:
    teller = Storyteller(seed)
    given = 0
    while given < num_words:
        teller.new_document()
        sentences = [_sentence(teller) for _ in range(1 + int(teller.random() * 5))]
        document = " ".join(sentences)
        given += document.count(" ") + 1
        yield document


def _sentence(teller: Storyteller) -> str:
    """The next sentence that is not held out."""
    while True:
        teller.new_sentence()
        sentence = written(teller.pick(_SCHEDULE)(teller))
        if not is_held_out(sentence):
            subject = teller.subject
            teller.last = subject if subject is not None and subject.definite else None
            teller.last_item = teller.item
            return sentence


def minimal_pairs(per_phenomenon: int = 100, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Draws minimal pairs whose two sentences are held out: documents() writes neither, whatever its seed and size.

    Args:
        per_phenomenon: pairs of each UID; no pair comes twice within one. A larger number begins with the same pairs.
        seed: seed of the pairs; every UID has a generator of its own.

    Returns:
        An iterator over dicts in BLiMP form: sentence_good, sentence_bad, field, linguistics_term, UID, pair_id.

    Raises:
        InputError: per_phenomenon is negative.
    """
    if per_phenomenon < 0:
        raise InputError(f"per_phenomenon must not be negative; got {per_phenomenon}")
    return _minimal_pairs(per_phenomenon, seed)


def _minimal_pairs(per_phenomenon: int, seed: int) -> Iterator[dict[str, Any]]:
    for uid, field, term, draw in PHENOMENA:
        teller = Storyteller(seed * 1_000_003 + zlib.crc32(uid.encode()), cast_share=0.0)
        seen: set[tuple[str, str]] = set()
        while len(seen) < per_phenomenon:
            teller.new_document()
            good, bad = map(written, draw(teller))
            if is_held_out(good) and is_held_out(bad) and (good, bad) not in seen:
                yield {
                    "sentence_good": good,
                    "sentence_bad": bad,
                    "field": field,
                    "linguistics_term": term,
                    "UID": uid,
                    "pair_id": len(seen),
                }
                seen.add((good, bad))
