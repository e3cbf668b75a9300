"""Minimal pairs of form: agreement of verbs, determiners and reflexives, and irregular participles.

See pairs.py for what every function here returns.
"""

from __future__ import annotations

from antlm_fast.data.builtin import lexicon, verbs
from antlm_fast.data.builtin.grammar import Phrase
from antlm_fast.data.builtin.sentences import Storyteller

Pair = tuple[str, str]

_PERSON_OR_ANIMAL = ("person", "person", "animal")
_STRICT_FRAMES = tuple(
    (verb, kind) for verb, kind in verbs.FRAMES["any"]["person"] if verb in verbs.STRICTLY_TRANSITIVE
)
_THING_FRAMES = tuple((verb, kind) for verb, kind in _STRICT_FRAMES if kind in ("thing", "food", "text"))
_IRREGULAR = tuple(
    (verb, kind)
    for verb, kind in verbs.FRAMES["any"]["person"]
    if verb.base in ("see", "wake", "draw", "throw", "take", "break", "eat", "write", "steal", "give", "forget")
)


def both(start: str, good: str, bad: str, end: str) -> Pair:
    return f"{start}{good}{end}", f"{start}{bad}{end}"


# --- agreement of subject and verb ---


def _agreeing(teller: Storyteller, subject: Phrase) -> tuple[str, str, str]:
    """A finite verb that shows number, the same in the other number, and the rest of the clause."""
    plural, chance = subject.plural, teller.random()
    if chance < 0.25:
        good = teller.be(plural)
        return good, verbs.OTHER_NUMBER[good], f" {teller.predicate(subject.kind)}."
    verb, kind = teller.frame(subject.kind)
    rest = f" {teller.noun_phrase(kind).text}."
    if chance < 0.5:
        verb, manners = teller.pick(verbs.INTRANSITIVE_FRAMES[subject.kind])
        rest = f" {teller.pick(manners)}." if teller.random() < 0.5 else "."
    if chance < 0.7 and verb.aspect == "event":
        good = teller.be(plural)
        return good, verbs.OTHER_NUMBER[good], f" {verb.ing}{rest}"
    if chance < 0.82 and verb.aspect != "state":
        good = "have" if plural else "has"
        return good, verbs.OTHER_NUMBER[good], f" {verb.participle}{rest}"
    if chance < 0.9:
        good = "do" if plural else "does"
        good = good if teller.random() < 0.5 else verbs.NEGATED[good]
        middle = "" if good in verbs.NEGATED.values() else " not"
        return good, verbs.OTHER_NUMBER[good], f"{middle} {verb.base}{rest}"
    return (verb.base, verb.third, rest) if plural else (verb.third, verb.base, rest)


def agreement_simple(teller: Storyteller) -> Pair:
    subject = teller.noun_phrase(teller.pick(_PERSON_OR_ANIMAL))
    good, bad, rest = _agreeing(teller, subject)
    return both(f"{subject.text} ", good, bad, rest)


def agreement_pp(teller: Storyteller) -> Pair:
    """The noun before the verb has the other number than the subject."""
    subject = teller.noun_phrase(teller.pick(_PERSON_OR_ANIMAL), countable=True)
    attractor = teller.place_modifier(subject.kind, plural=not subject.plural)
    good, bad, rest = _agreeing(teller, subject)
    return both(f"{subject.text} {attractor} ", good, bad, rest)


def agreement_relative(teller: Storyteller) -> Pair:
    """The noun in the relative clause has the other number than the subject."""
    subject = teller.noun_phrase(teller.pick(_PERSON_OR_ANIMAL), countable=True)
    relative = teller.relative_clause(subject, plural=not subject.plural)
    good, bad, rest = _agreeing(teller, subject)
    return both(f"{subject.text} {relative} ", good, bad, rest)


def agreement_coordination(teller: Storyteller) -> Pair:
    """Two singulars joined by "and" take a plural verb."""
    kind = teller.pick(_PERSON_OR_ANIMAL)
    first = teller.noun_phrase(kind, plural=False, determiner="the")
    second = teller.noun_phrase(kind, plural=False, determiner="the")
    subject = Phrase(f"{first.text} and {second.text}", True, lexicon.PRONOUNS["p"], kind, None, True)
    good, bad, rest = _agreeing(teller, subject)
    return both(f"{subject.text} ", good, bad, rest)


def there_agreement(teller: Storyteller) -> Pair:
    kind = teller.pick(("animal", "person", "thing", "food"))
    plural = teller.random() < 0.5
    determiner = teller.pick(("some", "many", "two", "three", "several") if plural else ("a", "a", "one", "another"))
    thing = teller.noun_phrase(kind, plural=plural, countable=True, determiner=determiner)
    good = teller.be(plural)
    return both("there ", good, verbs.OTHER_NUMBER[good], f" {thing.text} {teller.place_modifier(kind)}.")


# --- determiners ---


def _determiner_pair(teller: Storyteller, adjective: float) -> Pair:
    verb, kind = teller.pick(_THING_FRAMES)
    subject = teller.noun_phrase("person")
    start = f"{subject.text} {teller.finite(verb, subject.plural)[0]} "
    noun = teller.noun(kind)
    words = teller.bare(noun, False, adjective)
    adjectives = words[: len(words) - len(noun.singular)]
    one = teller.pick(("this", "that"))
    many = "these" if one == "this" else "those"
    tail = _tail(teller)
    chance = teller.random()
    if chance < 0.25:
        return both(start + one, f" {adjectives}{noun.singular}", f" {adjectives}{noun.plural}", tail)
    if chance < 0.5:
        return both(start + many, f" {adjectives}{noun.plural}", f" {adjectives}{noun.singular}", tail)
    if chance < 0.65:
        return both(start, one, many, f" {adjectives}{noun.singular}{tail}")
    if chance < 0.8:
        return both(start, many, one, f" {adjectives}{noun.plural}{tail}")
    if chance < 0.9:
        every, several = teller.pick(("every", "each")), teller.pick(("many", "several", "two", "three"))
        return both(start, every, several, f" {adjectives}{noun.singular}{tail}")
    every, several = teller.pick(("every", "each")), teller.pick(("many", "several", "two", "three"))
    return both(start, several, every, f" {adjectives}{noun.plural}{tail}")


def determiner_noun(teller: Storyteller) -> Pair:
    return _determiner_pair(teller, 0.0)


def determiner_noun_adjective(teller: Storyteller) -> Pair:
    return _determiner_pair(teller, 1.0)


# --- reflexives ---


def _reflexive_start(teller: Storyteller, subject: Phrase) -> str:
    verb = teller.pick(verbs.REFLEXIVE[subject.kind])
    return f"{subject.text} {teller.finite(verb, subject.plural)[0]} "


def _tail(teller: Storyteller) -> str:
    return f" {teller.location()}." if teller.random() < 0.5 else "."


def anaphor_number(teller: Storyteller) -> Pair:
    if teller.random() < 0.3:
        subject = _gendered(teller)
    else:
        subject = teller.noun_phrase("animal") if teller.random() < 0.4 else teller.noun_phrase("person", plural=True)
    if subject.plural:
        bad = teller.pick(("himself", "herself")) if subject.kind == "person" else "itself"
    else:
        bad = "themselves"
    return both(_reflexive_start(teller, subject), subject.pronouns.reflexive, bad, _tail(teller))


def _gendered(teller: Storyteller) -> Phrase:
    """A singular whose noun tells the gender; not "every" or "each", nor a noun of either gender, which take "they"."""
    while True:
        teller.new_sentence()
        subject = teller.noun_phrase("person", plural=False, determiner=teller.pick(("the", "the", "this", "that")))
        if subject.noun is not None and subject.noun.gender in ("m", "f"):
            return subject


def anaphor_gender(teller: Storyteller) -> Pair:
    subject = _gendered(teller)
    good = subject.pronouns.reflexive
    bad = {"himself": "herself", "herself": "himself"}[good]
    return both(_reflexive_start(teller, subject), good, bad, _tail(teller))


def anaphor_domain(teller: Storyteller) -> Pair:
    """The reflexive belongs to the subject of its own clause, not to that of the clause above."""
    inner = _gendered(teller)
    outer = teller.noun_phrase("person", plural=True)
    if teller.random() < 0.5:
        inner, outer = outer, inner
    words = teller.finite(teller.pick(verbs.THAT_CLAUSE), outer.plural)[0]
    start = f"{outer.text} {words} that {_reflexive_start(teller, inner)}"
    return both(start, inner.pronouns.reflexive, outer.pronouns.reflexive, _tail(teller))


# --- participles ---


def irregular_participle(teller: Storyteller) -> Pair:
    """After "have" stands the participle, alone the past form."""
    subject = teller.noun_phrase("person")
    verb, kind = teller.pick(_IRREGULAR)
    end = f" {teller.noun_phrase(kind).text}."
    if teller.random() < 0.5:
        return both(f"{subject.text} ", verb.past, verb.participle, end)
    have = "have" if subject.plural else "has"
    return both(f"{subject.text} {have} ", verb.participle, verb.past, end)
