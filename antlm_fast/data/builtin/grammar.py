"""The grammar of the built-in corpus: phrases and clauses over the words of lexicon.py.

Speaker draws phrases at random. Its sentences are right by construction: whatever must agree (verb, reflexive,
determiner, pronoun) is chosen from the features of the phrase that governs it, never from the word beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from antlm_fast.data.builtin import lexicon, verbs
from antlm_fast.data.builtin.lexicon import Noun, Pronouns
from antlm_fast.data.builtin.verbs import Verb

T = TypeVar("T")

_PERSON_OR_ANIMAL = ("person", "person", "person", "animal")
_ITEMS = ("thing", "food", "text", "container")
_NEAR = ("near", "behind", "beside", "next to")


class Phrase(NamedTuple):
    """A noun phrase and what agrees with it; definite phrases may be taken up by a pronoun later."""

    text: str
    plural: bool
    pronouns: Pronouns
    kind: str
    noun: Noun | None
    definite: bool


class VerbGroup(NamedTuple):
    """A finite verb: auxiliary ("" for a simple tense), main verb, and the key of the adverbials that suit it."""

    auxiliary: str
    word: str
    when: str


def with_article(words: str) -> str:
    """Puts "a" or "an" before words; the lexicon holds no word whose first letter misleads."""
    return ("an " if words[0] in "aeiou" else "a ") + words


class Speaker:
    """Draws phrases and clauses; deterministic in the seed, and only random() is drawn from the generator.

    Args:
        seed: seed of the generator.
        cast_share: how often a noun is drawn from the cast of the current document rather than from all nouns.
    """

    def __init__(self, seed: int, cast_share: float = 0.7) -> None:
        self.random = random.Random(seed).random
        self.cast_share = cast_share
        self.subject: Phrase | None = None  # main subject of the sentence being made
        self.item: Phrase | None = None  # last thing named as an object of the sentence being made
        self.last: Phrase | None = None  # main subject of the sentence before, if a pronoun may take it up
        self.last_item: Phrase | None = None  # the same for the thing
        self.numbers: dict[Noun, bool] = {}  # whether a noun of the cast is plural in this document
        self.used: list[Noun] = []  # nouns of this sentence: none is named twice
        self.new_document()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def new_document(self) -> None:
        """Draws tense, cast and places of the next document."""
        pick = self.pick
        self.past = self.random() < 0.45
        self.either_gender = lexicon.PRONOUNS["m" if self.random() < 0.5 else "f"]
        self.cast = {
            "person": (pick(lexicon.NAMES), pick(lexicon.PEOPLE), pick(lexicon.PEOPLE)),
            "animal": (pick(lexicon.ANIMALS),),
            "thing": (pick(lexicon.THINGS), pick(lexicon.THINGS)),
            "place": (pick(lexicon.PLACES),),
        }
        self.numbers = {noun: self.random() < 0.42 for nouns in self.cast.values() for noun in nouns}
        self.last = self.last_item = None
        self.new_sentence()

    def new_sentence(self) -> None:
        self.used.clear()
        self.subject = self.item = None

    # --- noun phrases ---

    def noun(self, kind: str, *, countable: bool = False) -> Noun:
        """A noun of the kind that this sentence has not named; countable leaves names out."""
        while True:
            if kind in self.cast and self.random() < self.cast_share:
                noun = self.pick(self.cast[kind])
            elif kind == "person" and not countable and self.random() < 0.4:
                noun = self.pick(lexicon.NAMES)
            else:
                noun = self.pick(lexicon.NOUNS[kind])
            if noun not in self.used and (noun.plural or not countable):
                self.used.append(noun)
                return noun

    def pronouns(self, noun: Noun, plural: bool) -> Pronouns:
        if plural:
            return lexicon.PRONOUNS["p"]
        return self.either_gender if noun.gender == "c" else lexicon.PRONOUNS[noun.gender]

    def bare(self, noun: Noun, plural: bool, adjective: float = 0.25) -> str:
        """The noun with or without an adjective, without determiner."""
        word = noun.plural if plural else noun.singular
        if self.random() < adjective:
            return self.pick(lexicon.ADJECTIVES[noun.kind]) + " " + word
        return word

    def noun_phrase(
        self,
        kind: str,
        *,
        plural: bool | None = None,
        countable: bool = False,
        determiner: str = "",
        modified: float = 0.0,
    ) -> Phrase:
        """A noun phrase of the kind; modified is the share with a prepositional phrase or a relative clause."""
        noun = self.noun(kind, countable=countable or plural is True)
        if not noun.plural:
            if kind == "person":
                return Phrase(noun.singular, False, lexicon.PRONOUNS[noun.gender], kind, noun, True)
            determiner = determiner or self.pick(("the", "the", "some", "this"))
            text = f"{determiner} {self.bare(noun, False)}"
            return Phrase(text, False, lexicon.PRONOUNS["n"], kind, noun, determiner == "the")
        known = bool(self.cast_share) and noun in self.numbers
        if plural is None:
            plural = self.numbers[noun] if known else self.random() < (0.2 if kind == "place" else 0.42)
        if not determiner and known and self.random() < 0.5:
            determiner = "the"
        elif not determiner:
            determiner = self.pick(lexicon.PLURAL_DETERMINERS if plural else lexicon.SINGULAR_DETERMINERS)
        words = self.bare(noun, plural, 0.0 if determiner == "most" else 0.25)  # not "most old"
        text = with_article(words) if determiner == "a" else f"{determiner} {words}"
        phrase = Phrase(text, plural, self.pronouns(noun, plural), kind, noun, determiner == "the")
        if modified and self.random() < modified:
            modifier = self.place_modifier(kind) if self.random() < 0.5 else self.relative_clause(phrase)
            return phrase._replace(text=f"{text} {modifier}")
        return phrase

    def place_modifier(self, kind: str, plural: bool | None = None) -> str:
        """A prepositional phrase that says which one is meant; plural is the number of the noun inside it."""
        if kind in _PERSON_OR_ANIMAL:
            inner = self.pick(("person", "animal", "landmark", "furniture"))
            preposition = self.pick(_NEAR)
        elif kind in ("place", "furniture", "container"):
            inner, preposition = "landmark", self.pick(_NEAR)
        else:
            inner = self.pick(("furniture", "container"))
            preposition = self.pick(("on", "under", "near")) if inner == "furniture" else self.pick(("in", "near"))
        phrase = self.noun_phrase(
            inner, plural=plural, countable=plural is not None, determiner="" if plural else "the"
        )
        return f"{preposition} {phrase.text}"

    def relative_clause(self, head: Phrase, plural: bool | None = None) -> str:
        """A relative clause on head, with a gap at its subject or object; plural is the number of the noun inside."""
        person = head.kind == "person"
        relative = "who" if person and self.random() < 0.8 else "that"
        frames = verbs.TRANSITIVE["person"].get(head.kind)
        if frames and (head.kind not in _PERSON_OR_ANIMAL or self.random() < 0.4):
            verb = self.pick(frames)
            inner = self.noun_phrase("person", plural=plural, countable=plural is not None)
            return f"{relative} {inner.text} {self.finite(verb, inner.plural)[0]}"
        if head.kind in _PERSON_OR_ANIMAL and (plural is not None or self.random() < 0.6):
            verb, kind = self.frame(head.kind, countable=plural is not None)
            inner = self.noun_phrase(kind, plural=plural)
            return f"{relative} {self.finite(verb, head.plural)[0]} {inner.text}"
        return f"{relative} {self.be(head.plural)} {self.predicate(head.kind)}"

    def coordinated(self, kind: str) -> Phrase:
        """Two phrases joined by "and": plural."""
        first, second = self.noun_phrase(kind), self.noun_phrase(kind)
        return Phrase(f"{first.text} and {second.text}", True, lexicon.PRONOUNS["p"], kind, None, True)

    def main_subject(self, kind: str = "", *, plain: bool = False) -> Phrase:
        """A subject (a person or an animal if no kind is asked for), remembered as the subject of the sentence.

        It is a pronoun for the subject of the sentence before, a coordination or a noun phrase; plain: no coordination,
        no modifier.
        """
        chance, last = self.random(), self.last
        wanted = (kind,) if kind else _PERSON_OR_ANIMAL
        kind = kind or self.pick(_PERSON_OR_ANIMAL)
        if last is not None and last.kind in wanted and chance < 0.5:
            if last.noun is not None:
                self.used.append(last.noun)
            phrase = last._replace(text=last.pronouns.subject)
        elif chance < 0.12 and not plain and kind in _PERSON_OR_ANIMAL:
            phrase = self.coordinated(kind)
        else:
            phrase = self.noun_phrase(kind, modified=0.0 if plain else 0.28)
        if self.subject is None:
            self.subject = phrase
        return phrase

    def object_phrase(self, kind: str, subject: Phrase) -> str:
        chance = self.random()
        if chance < 0.12 and kind in _ITEMS and subject.definite:
            noun = self.noun(kind)
            return f"{subject.pronouns.possessive} {self.bare(noun, self.random() < 0.4)}"
        last = self.last if kind in _PERSON_OR_ANIMAL else self.last_item
        if last is not None and last.kind == kind and chance > 0.75 and last.noun not in self.used:
            if last.noun is not None:
                self.used.append(last.noun)
            return last.pronouns.object
        phrase = self.noun_phrase(kind, modified=0.1)
        if kind in _ITEMS and phrase.text.startswith(("the ", "a ", "an ", "some ")):
            self.item = phrase
        return phrase.text

    # --- verbs ---

    def frame(self, kind: str, use: str = "any", *, countable: bool = False) -> tuple[Verb, str]:
        """A verb that a subject of the kind may have, and the kind of its object; use is a key of verbs.FRAMES."""
        while True:
            frame = self.pick(verbs.FRAMES[use][kind])
            if not (countable and frame[1] in ("mass", "drink")):
                return frame

    def be(self, plural: bool) -> str:
        if self.past:
            return "were" if plural else "was"
        return "are" if plural else "is"

    def verb_group(self, verb: Verb, plural: bool, *, auxiliary: bool = False) -> VerbGroup:
        """A finite form of verb; with auxiliary, simple tenses take a form of "do"."""
        chance = self.random()
        if verb.aspect in ("perception", "state"):
            return self._stative_group(verb, plural, auxiliary, chance)
        if self.past:
            if chance < 0.62 or (verb.aspect == "instant" and chance < 0.82):
                return VerbGroup("did", verb.base, "past") if auxiliary else VerbGroup("", verb.past, "past")
            if chance < 0.82:
                return VerbGroup("were" if plural else "was", verb.ing, "past_progressive")
            if chance < 0.92:
                return VerbGroup("had", verb.participle, "perfect")
            return VerbGroup("could", verb.base, "can")
        if chance < 0.36 or (verb.aspect == "instant" and chance < 0.62):
            if auxiliary:
                return VerbGroup("do" if plural else "does", verb.base, "present")
            return VerbGroup("", verb.base if plural else verb.third, "present")
        if chance < 0.62:
            return VerbGroup("are" if plural else "is", verb.ing, "progressive")
        if chance < 0.85:
            return VerbGroup("have" if plural else "has", verb.participle, "perfect")
        if chance < 0.93:
            return VerbGroup("will", verb.base, "will")
        return VerbGroup("can", verb.base, "can")

    def _stative_group(self, verb: Verb, plural: bool, auxiliary: bool, chance: float) -> VerbGroup:
        if chance < 0.15 and verb.aspect == "perception":
            have = "had" if self.past else "have" if plural else "has"
            return VerbGroup(have, verb.participle, "stative")
        if self.past:
            return VerbGroup("did", verb.base, "stative") if auxiliary else VerbGroup("", verb.past, "stative")
        if chance < 0.25 and verb.aspect == "perception":
            return VerbGroup("will", verb.base, "stative")
        if auxiliary:
            return VerbGroup("do" if plural else "does", verb.base, "stative")
        return VerbGroup("", verb.base if plural else verb.third, "stative")

    def negated(self, auxiliary: str) -> str:
        if self.random() < 0.5:
            return verbs.NEGATED[auxiliary]
        return "cannot" if auxiliary == "can" else auxiliary + " not"

    def finite(self, verb: Verb, plural: bool, *, negative: float = 0.06) -> tuple[str, str]:
        """The finite verb as text, and the key of the adverbials that suit it."""
        if self.random() < negative:
            group = self.verb_group(verb, plural, auxiliary=True)
            return f"{self.negated(group.auxiliary)} {group.word}", group.when
        group = self.verb_group(verb, plural)
        if group.auxiliary:
            return f"{group.auxiliary} {group.word}", group.when
        return group.word, group.when

    def predicate(self, kind: str) -> str:
        return self.pick(lexicon.PREDICATES[kind])

    # --- adverbials ---

    def location(self) -> str:
        noun = self.noun("place")
        return f"{lexicon.PLACE_PREPOSITION[noun.singular]} the {self.bare(noun, False, 0.15)}"

    def adverbial(self, when: str, share: float = 0.4, *, place: bool = True) -> str:
        """Nothing, or a time or (if place) a place, with a space before it."""
        chance = self.random()
        if chance >= share or when == "stative":
            return ""
        return " " + (self.location() if place and chance < 0.55 * share else self.pick(verbs.WHEN[when]))
