"""Minimal pairs of structure: argument structure, questions and gaps, negation and quantifiers.

See pairs.py for what every function here returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from antlm_fast.data.builtin import verbs
from antlm_fast.data.builtin.pairs_of_form import Pair, both
from antlm_fast.data.builtin.sentences import Storyteller
from antlm_fast.data.builtin.verbs import Verb

_STRICT_FRAMES = tuple(
    (verb, kind) for verb, kind in verbs.FRAMES["any"]["person"] if verb in verbs.STRICTLY_TRANSITIVE
)
# "What" asks for things, "who" for people: a gap never stands for an animal.
_GAP_FRAMES = tuple((verb, kind) for verb, kind in verbs.FRAMES["any"]["person"] if kind != "animal")
_FILLED_FRAMES = tuple(
    (verb, kind) for verb, kind in verbs.FRAMES["active"]["person"] if kind != "animal" and verb in verbs.NOT_DATIVE
)
_ANY_FRAMES = tuple(
    (verb, kind)
    for verb, kind in verbs.FRAMES["perfect"]["person"]
    if kind in ("thing", "food", "mass", "drink", "text", "animal")
)
_ADVERB_OF_QUESTION = {
    "past": "yesterday",
    "past_progressive": "yesterday",
    "perfect": "today",
    "progressive": "today",
    "will": "tomorrow",
    "can": "today",
}
_BOTH_CLAUSES = tuple(verb for verb in verbs.WH_CLAUSE if verb in verbs.THAT_CLAUSE)


def _gap_frame(teller: Storyteller, frames: Sequence[tuple[Verb, str]]) -> tuple[Verb, str, str]:
    verb, kind = teller.pick(frames)
    return verb, kind, "who" if kind == "person" else "what"


# --- argument structure ---


def _same_form(teller: Storyteller, good: Verb, bad: Verb, plural: bool) -> Pair:
    """Two verbs in the same finite form."""
    chance = teller.random()
    aspects = {good.aspect, bad.aspect}
    if chance < 0.4 or not aspects <= {"event", "instant"}:
        if teller.past:
            return good.past, bad.past
        return (good.base, bad.base) if plural else (good.third, bad.third)
    if chance < 0.7 and aspects == {"event"}:
        be = teller.be(plural)
        return f"{be} {good.ing}", f"{be} {bad.ing}"
    have = "had" if teller.past else "have" if plural else "has"
    return f"{have} {good.participle}", f"{have} {bad.participle}"


def intransitive(teller: Storyteller) -> Pair:
    """Good: a verb without object. Bad: a verb that needs one and lacks it."""
    subject = teller.noun_phrase("person", modified=0.2)
    verb = teller.pick(verbs.STRICTLY_INTRANSITIVE["person"])
    good, bad = _same_form(teller, verb, teller.pick(_STRICT_FRAMES)[0], subject.plural)
    tail = "." if teller.random() < 0.4 else f" {teller.location()}."
    return both(f"{subject.text} ", good, bad, tail)


def transitive(teller: Storyteller) -> Pair:
    """Good: a verb with its object. Bad: a verb that takes none."""
    subject = teller.noun_phrase("person", modified=0.2)
    verb, kind = teller.frame("person")
    other = teller.pick(verbs.STRICTLY_INTRANSITIVE["person"])
    good, bad = _same_form(teller, verb, other, subject.plural)
    return both(f"{subject.text} ", good, bad, f" {teller.noun_phrase(kind).text}.")


def passive(teller: Storyteller) -> Pair:
    """A verb without object has no passive."""
    verb, kind = teller.frame("person", "active")
    other = teller.pick(verbs.STRICTLY_INTRANSITIVE["person"])
    subject = teller.noun_phrase(kind)
    be = teller.passive_auxiliary(subject.plural)
    end = f" by {teller.noun_phrase('person').text}."
    return both(f"{subject.text} {be} ", verb.participle, other.participle, end)


# --- questions and gaps ---


def wh_object_gap(teller: Storyteller) -> Pair:
    """The place of the questioned object stays empty."""
    subject = teller.noun_phrase("person", modified=0.15)
    verb, kind, wh = _gap_frame(teller, _FILLED_FRAMES)
    group = teller.verb_group(verb, subject.plural, auxiliary=True)
    while group.when not in _ADVERB_OF_QUESTION:
        group = teller.verb_group(verb, subject.plural, auxiliary=True)
    adverb = _ADVERB_OF_QUESTION[group.when]
    filler = teller.pick(("him", "her", "them") if kind == "person" else ("it",))
    return both(f"{wh} {group.auxiliary} {subject.text} {group.word} ", adverb, filler, "?")


def _embedding(teller: Storyteller) -> str:
    subject = teller.noun_phrase("person")
    return f"{subject.text} {teller.finite(teller.pick(_BOTH_CLAUSES), subject.plural)[0]} "


def wh_that_with_gap(teller: Storyteller) -> Pair:
    """A clause that lacks its object begins with "who" or "what", not with "that"."""
    start = _embedding(teller)
    inner = teller.noun_phrase("person", modified=0.1)
    verb, _, wh = _gap_frame(teller, _STRICT_FRAMES)
    return both(start, wh, "that", f" {inner.text} {teller.finite(verb, inner.plural)[0]}.")


def wh_that_without_gap(teller: Storyteller) -> Pair:
    """A clause that has its object begins with "that"."""
    start = _embedding(teller)
    inner = teller.noun_phrase("person", modified=0.1)
    verb, kind, wh = _gap_frame(teller, _STRICT_FRAMES)
    words = teller.finite(verb, inner.plural)[0]
    return both(start, "that", wh, f" {inner.text} {words} {teller.noun_phrase(kind).text}.")


def auxiliary_inversion(teller: Storyteller) -> Pair:
    """A question fronts the auxiliary of the main clause, not that of the relative clause."""
    subject = teller.noun_phrase("person", countable=True)
    inner = teller.be(subject.plural)
    if teller.random() < 0.5:
        relative = teller.predicate("person")
    else:
        verb, kind = teller.frame("person", "progressive")
        relative = f"{verb.ing} {teller.noun_phrase(kind).text}"
    verb = teller.pick(verbs.INTRANSITIVE_FRAMES["person"])[0]
    chance = teller.random()
    if chance < 0.5:
        outer, rest = ("could" if teller.past else teller.pick(("can", "will"))), verb.base
    else:
        outer = "had" if teller.past else "have" if subject.plural else "has"
        verb, kind = teller.frame("person", "perfect")
        rest = f"{verb.participle} {teller.noun_phrase(kind).text}"
    good = f"{outer} {subject.text} who {inner} {relative} {rest}?"
    return good, f"{inner} {subject.text} who {relative} {outer} {rest}?"


def wh_word_order(teller: Storyteller) -> Pair:
    """A question with a wh word has its auxiliary before the subject."""
    subject = teller.noun_phrase("person", modified=0.15)
    verb, _, wh = _gap_frame(teller, _GAP_FRAMES)
    group = teller.verb_group(verb, subject.plural, auxiliary=True)
    end = f" {group.word}{teller.adverbial(group.when, 0.3)}?"
    return both(f"{wh} ", f"{group.auxiliary} {subject.text}", f"{subject.text} {group.auxiliary}", end)


# --- negation, "ever" and "any", quantifiers ---


def npi_ever(teller: Storyteller) -> Pair:
    """ "ever" needs a negation before it."""
    if teller.random() < 0.5:
        subject = teller.noun_phrase("person")
        verb, kind = teller.frame("person", "perfect")
        have = "had" if teller.past else "have" if subject.plural else "has"
        rest = f" ever {verb.participle} {teller.object_phrase(kind, subject)}."
        return both(f"{subject.text} ", verbs.NEGATED[have], have, rest)
    subject = teller.noun_phrase("person", plural=False, countable=True, determiner="the")
    words = subject.text.removeprefix("the ")
    rest = f"{teller.perfect(subject, 'ever ')}."
    return both("", "no", teller.pick(("the", "this", "that", "every", "each")), f" {words} {rest}")


def npi_any(teller: Storyteller) -> Pair:
    """ "any" needs a negation before it."""
    verb, kind = teller.pick(_ANY_FRAMES)
    if teller.random() < 0.3:
        words = verb.past if teller.past else f"has {verb.participle}"
        return both("", "nobody", teller.pick(("somebody", "everybody")), f" {words} {teller.any_phrase(kind)}.")
    subject = teller.noun_phrase("person", modified=0.1)
    plural = subject.plural
    have = "had" if teller.past else "have" if plural else "has"
    auxiliary, word = teller.pick(((teller.be(plural), verb.ing), (have, verb.participle)))
    if verb.aspect != "event":
        auxiliary, word = have, verb.participle
    return both(f"{subject.text} ", verbs.NEGATED[auxiliary], auxiliary, f" {word} {teller.any_phrase(kind)}.")


def npi_scope(teller: Storyteller) -> Pair:
    """A negation inside a relative clause does not reach "any" in the main clause."""
    head = teller.noun_phrase("person", countable=True)
    have = "had" if teller.past else "have" if head.plural else "has"
    (verb, kind), (inner_verb, inner_kind) = teller.pick(_ANY_FRAMES), teller.frame("person", "perfect")
    inner = f"{inner_verb.participle} {teller.noun_phrase(inner_kind).text}"
    end = f"{verb.participle} {teller.any_phrase(kind)}."
    no = f"{have} not" if teller.random() < 0.5 else verbs.NEGATED[have]
    return f"{head.text} who {have} {inner} {no} {end}", f"{head.text} who {no} {inner} {have} {end}"


def there_quantifier(teller: Storyteller) -> Pair:
    """ "There is" introduces: "a", "one" and "two" go, "every" and "most" do not."""
    kind = teller.pick(("animal", "person", "thing", "food"))
    plural = teller.random() < 0.4
    words = teller.bare(teller.noun(kind, countable=True), plural, 0.0 if plural else 0.25)
    if plural:
        good, bad = teller.pick(("many", "some", "two", "three", "several")), "most"
    else:
        good, bad = teller.pick(("one", "another", "no")), teller.pick(("every", "each"))
    return both(f"there {teller.be(plural)} ", good, bad, f" {words} {teller.place_modifier(kind)}.")
