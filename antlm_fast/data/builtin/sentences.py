"""The sentences of the built-in corpus: clauses and sentence types over the phrases of grammar.py.

Every method named in SENTENCES returns one sentence in lower case (names aside) with its final mark attached.
"""

from __future__ import annotations

from antlm_fast.data.builtin import lexicon, verbs
from antlm_fast.data.builtin.grammar import Phrase, Speaker

_PERSON_OR_ANIMAL = ("person", "person", "person", "animal")
_INDEFINITE_PEOPLE = ("nobody", "somebody", "everybody")
# What can be counted or measured after "any" and "some", with the verbs of people that take it.
_ANY_FRAMES = tuple(
    (verb, kind)
    for verb, kind in verbs.FRAMES["any"]["person"]
    if kind in ("thing", "food", "mass", "drink", "text", "animal")
)
# "What" asks for things, "who" for people: an animal is asked for with "which".
_GAP_FRAMES = tuple((verb, kind) for verb, kind in verbs.FRAMES["any"]["person"] if kind != "animal")
_THERE_KINDS = ("animal", "animal", "person", "thing", "food", "mass", "drink", "text")


class Storyteller(Speaker):
    """A Speaker that makes whole sentences."""

    # --- clauses: no capital, no final mark ---

    def clause(self, subject: Phrase | None = None) -> str:
        """A clause of any kind; without subject one is drawn."""
        chance = self.random()
        if chance < 0.06 and subject is None:
            return self.thing_clause()
        subject = subject or self.main_subject()
        if chance < 0.24:
            return f"{subject.text} {self.intransitive(subject)}"
        if chance < 0.68:
            return f"{subject.text} {self.transitive(subject)}"
        if chance < 0.78:
            return f"{subject.text} {self.copula(subject)}"
        if chance < 0.86:
            return f"{subject.text} {self.reflexive(subject)}"
        if subject.kind == "animal":
            return f"{subject.text} {self.intransitive(subject)}"
        return f"{subject.text} {self.ditransitive(subject) if chance < 0.93 else self.infinitive(subject)}"

    def intransitive(self, subject: Phrase) -> str:
        verb, manners = self.pick(verbs.INTRANSITIVE_FRAMES[subject.kind])
        words, when = self.finite(verb, subject.plural)
        if self.random() < 0.3:
            return f"{words} {self.pick(manners)}"
        return words + self.adverbial(when)

    def transitive(self, subject: Phrase) -> str:
        verb, kind = self.frame(subject.kind)
        words, when = self.finite(verb, subject.plural)
        return f"{words} {self.object_phrase(kind, subject)}{self.adverbial(when, 0.25, place=kind != 'place')}"

    def copula(self, subject: Phrase) -> str:
        be = self.be(subject.plural)
        if self.random() < 0.12:
            be = self.negated(be)
        return f"{be} {self.predicate(subject.kind)}"

    def reflexive(self, subject: Phrase) -> str:
        verb = self.pick(verbs.REFLEXIVE[subject.kind])
        words, when = self.finite(verb, subject.plural)
        return f"{words} {subject.pronouns.reflexive}{self.adverbial(when, 0.3)}"

    def ditransitive(self, subject: Phrase) -> str:
        words, when = self.finite(self.pick(verbs.DITRANSITIVE), subject.plural)
        receiver = self.noun_phrase("person").text
        gift = self.noun_phrase(self.pick(("thing", "food", "text"))).text
        tail = self.adverbial(when, 0.1)
        return f"{words} {receiver} {gift}{tail}" if self.random() < 0.5 else f"{words} {gift} to {receiver}{tail}"

    def infinitive(self, subject: Phrase) -> str:
        words = self.finite(self.pick(verbs.INFINITIVE), subject.plural, negative=0.15)[0]
        if self.random() < 0.3:
            verb, manners = self.pick(verbs.INTRANSITIVE_FRAMES["person"][:7])
            return f"{words} to {verb.base} {self.pick(manners)}"
        verb, kind = self.frame("person", "active")
        return f"{words} to {verb.base} {self.object_phrase(kind, subject)}"

    def thing_clause(self) -> str:
        subject = self.main_subject(self.pick(("thing", "thing", "text", "food", "place")), plain=True)
        if subject.kind == "thing" and self.random() < 0.2:
            return f"{subject.text} {self.intransitive(subject)}"
        if subject.kind == "thing" and self.random() < 0.4:
            return f"{subject.text} {self.be(subject.plural)} {self.place_modifier('thing')}"
        return f"{subject.text} {self.copula(subject)}"

    # --- sentences ---

    def plain(self) -> str:
        return self.clause() + "."

    def dated(self) -> str:
        """A transitive or intransitive clause with its time in front."""
        subject = self.main_subject()
        if self.random() < 0.5:
            verb, kind = self.frame(subject.kind, "active")
            words, when = self.finite(verb, subject.plural)
            words = f"{words} {self.object_phrase(kind, subject)}"
        else:
            verb = self.pick(verbs.INTRANSITIVE_FRAMES[subject.kind])[0]
            words, when = self.finite(verb, subject.plural)
        if when in ("perfect", "can"):
            return f"{subject.text} {words} {self.pick(verbs.WHEN[when])}."
        return f"{self.pick(verbs.WHEN[when])}, {subject.text} {words}."

    def two_actions(self) -> str:
        """One subject, two verb phrases; both verbs agree with the subject."""
        subject = self.main_subject()
        first, first_kind = second, second_kind = self.frame(subject.kind, "active")
        while second is first:
            second, second_kind = self.frame(subject.kind, "active")
        if self.past:
            first_word, second_word = first.past, second.past
        elif subject.plural:
            first_word, second_word = first.base, second.base
        else:
            first_word, second_word = first.third, second.third
        start = f"{subject.text} {first_word} {self.object_phrase(first_kind, subject)}"
        return f"{start} and {second_word} {self.object_phrase(second_kind, subject)}."

    def reason(self) -> str:
        """A state or an action, and a subordinate clause."""
        subject = self.main_subject(plain=True)
        kind = self.pick(_PERSON_OR_ANIMAL)
        inner = self.noun_phrase(kind)
        if self.random() < 0.5:
            clause = f"{inner.text} {self.copula(inner)}"
            return f"{subject.text} {self.transitive(subject)} because {clause}."
        clause = f"{inner.text} {self.transitive(inner)}"
        return f"{subject.text} {self.copula(subject)} {self.pick(('because', 'because', 'when'))} {clause}."

    def that_clause(self) -> str:
        subject = self.main_subject("person", plain=self.random() < 0.5)
        words = self.finite(self.pick(verbs.THAT_CLAUSE), subject.plural)[0]
        if self.random() < 0.25:
            inner = self.noun_phrase("person")
            clause = f"{inner.text} {self.reflexive(inner)}"
        else:
            inner = self.noun_phrase(self.pick(_PERSON_OR_ANIMAL))
            clause = self.clause(inner)
        that = "that " if self.random() < 0.7 else ""
        return f"{subject.text} {words} {that}{clause}."

    def wh_clause(self) -> str:
        """An embedded question with a gap at its object or subject."""
        subject = self.main_subject("person", plain=self.random() < 0.5)
        words = self.finite(self.pick(verbs.WH_CLAUSE), subject.plural, negative=0.15)[0]
        verb, kind = self.pick(_GAP_FRAMES)
        wh = "who" if kind == "person" else "what"
        if self.random() < 0.3:
            return f"{subject.text} {words} who {self.finite(verb, False)[0]} {self.noun_phrase(kind).text}."
        inner = self.noun_phrase("person", modified=0.1)
        group, when = self.finite(verb, inner.plural)
        return f"{subject.text} {words} {wh} {inner.text} {group}{self.adverbial(when)}."

    def there(self) -> str:
        """Existential "there": the verb agrees with the phrase that follows it."""
        kind = self.pick(_THERE_KINDS)
        plural = kind not in ("mass", "drink") and self.random() < 0.5
        if kind in ("mass", "drink"):
            determiner = self.pick(("some", "some", "no"))
        elif plural:
            determiner = self.pick(("some", "many", "two", "three", "several", "four", "no"))
        else:
            determiner = self.pick(("a", "a", "a", "a", "one", "another", "no"))
        thing = self.noun_phrase(kind, plural=plural, countable=kind == "person", determiner=determiner)
        if kind in ("animal", "person"):
            place = self.location() if self.random() < 0.6 else self.place_modifier(kind)
        else:
            place = self.place_modifier(kind)
        return f"there {self.be(plural)} {thing.text} {place}."

    def passive(self) -> str:
        verb, kind = self.frame("person", "active")
        subject = self.noun_phrase(kind, modified=0.1)
        be = self.passive_auxiliary(subject.plural)
        self.subject = subject
        if self.random() < 0.25:
            return f"{subject.text} {be} {verb.participle}."
        return f"{subject.text} {be} {verb.participle} by {self.noun_phrase('person').text}."

    def passive_auxiliary(self, plural: bool) -> str:
        chance = self.random()
        if self.past:
            return self.negated(self.be(plural)) if chance < 0.2 else self.be(plural)
        if chance < 0.3:
            return self.negated(self.be(plural)) if chance < 0.1 else self.be(plural)
        if chance < 0.45:
            return "will be"
        have = "have" if plural else "has"
        return f"{self.negated(have) if chance < 0.6 else have} been"

    # --- negation, "any" and "ever" ---

    def any_phrase(self, kind: str, determiner: str = "any") -> str:
        noun = self.noun(kind, countable=kind not in ("mass", "drink"))
        return f"{determiner} {self.bare(noun, bool(noun.plural))}"

    def any_negated(self) -> str:
        subject = self.main_subject("person")
        verb, kind = self.pick(_ANY_FRAMES)
        words = self.finite(verb, subject.plural, negative=1.0)[0]
        return f"{subject.text} {words} {self.any_phrase(kind)}."

    def some_affirmed(self) -> str:
        subject = self.main_subject("person")
        verb, kind = self.pick(_ANY_FRAMES)
        words = self.finite(verb, subject.plural, negative=0.0)[0]
        return f"{subject.text} {words} {self.any_phrase(kind, 'some')}."

    def perfect(self, subject: Phrase, middle: str) -> str:
        """A perfect verb phrase with a word after its auxiliary: "has never seen the bear"."""
        verb, kind = self.frame(subject.kind, "perfect")
        have = "had" if self.past else "have" if subject.plural else "has"
        return f"{have} {middle}{verb.participle} {self.object_phrase(kind, subject)}"

    def never(self) -> str:
        subject = self.main_subject()
        return f"{subject.text} {self.perfect(subject, self.pick(('never ', 'never ', 'also ', 'often ', 'just ')))}."

    def ever(self) -> str:
        """ "ever" where something before it in the clause negates: not, no, nobody."""
        chance = self.random()
        if chance < 0.45:
            subject = self.main_subject()
            verb, kind = self.frame(subject.kind, "perfect")
            if self.random() < 0.25:
                words = f"{self.negated('will')} ever {verb.base}"
            else:
                have = "had" if self.past else "have" if subject.plural else "has"
                words = f"{self.negated(have)} ever {verb.participle}"
            return f"{subject.text} {words} {self.object_phrase(kind, subject)}."
        if chance < 0.8:
            subject = self.noun_phrase(self.pick(_PERSON_OR_ANIMAL), countable=True, determiner="no", modified=0.2)
        else:
            subject = Phrase("nobody", False, lexicon.PRONOUNS["p"], "person", None, False)
        return f"{subject.text} {self.perfect(subject, 'ever ')}."

    def indefinite(self) -> str:
        """Nobody, somebody or everybody as subject; "any" after nobody only."""
        who = self.pick(_INDEFINITE_PEOPLE)
        subject = Phrase(who, False, lexicon.PRONOUNS["p"], "person", None, False)
        if who == "nobody" and self.random() < 0.5:
            verb, kind = self.pick(_ANY_FRAMES)
            return f"{who} {self.finite(verb, False, negative=0.0)[0]} {self.any_phrase(kind)}."
        if self.random() < 0.3:
            return f"{who} {self.perfect(subject, '' if who == 'nobody' else self.pick(('', 'also ', 'just ')))}."
        verb, kind = self.frame("person")
        words, when = self.finite(verb, False, negative=0.0)
        return f"{who} {words} {self.noun_phrase(kind).text}{self.adverbial(when, 0.2, place=kind != 'place')}."

    def negation_scope(self) -> str:
        """A relative clause and a main clause, one of them negated: "any" only in the main clause, if that is."""
        head = self.noun_phrase("person", countable=True)
        self.subject = head
        inner_verb, inner_kind = self.frame("person")
        verb, kind = self.pick(_ANY_FRAMES)
        if self.random() < 0.5:
            inner, outer, determiner = 0.0, 1.0, "any"
        else:
            inner, outer, determiner = 1.0, 0.0, self.pick(("some", "the", "these", "two"))
        if kind in ("mass", "drink") and determiner not in ("any", "some"):
            determiner = "the"
        relative = f"who {self.finite(inner_verb, head.plural, negative=inner)[0]} {self.noun_phrase(inner_kind).text}"
        words = self.finite(verb, head.plural, negative=outer)[0]
        return f"{head.text} {relative} {words} {self.any_phrase(kind, determiner)}."

    # --- questions ---

    def yes_no(self) -> str:
        subject = self.noun_phrase(self.pick(_PERSON_OR_ANIMAL), modified=0.5)
        chance = self.random()
        if chance < 0.2:
            return f"{self.be(subject.plural)} {subject.text} {self.predicate(subject.kind)}?"
        if chance < 0.35:
            verb, _ = self.pick(verbs.INTRANSITIVE_FRAMES[subject.kind])
            group = self.verb_group(verb, subject.plural, auxiliary=True)
            return f"{group.auxiliary} {subject.text} {group.word}{self.adverbial(group.when)}?"
        if chance < 0.5:
            verb, kind = self.frame(subject.kind, "perfect")
            have = "had" if self.past else "have" if subject.plural else "has"
            return f"{have} {subject.text} ever {verb.participle} {self.object_phrase(kind, subject)}?"
        if chance < 0.65 and subject.kind == "person":
            verb, kind = self.pick(_ANY_FRAMES)
            group = self.verb_group(verb, subject.plural, auxiliary=True)
            return f"{group.auxiliary} {subject.text} {group.word} {self.any_phrase(kind)}?"
        verb, kind = self.frame(subject.kind)
        group = self.verb_group(verb, subject.plural, auxiliary=True)
        return f"{group.auxiliary} {subject.text} {group.word} {self.object_phrase(kind, subject)}?"

    def wh_object(self) -> str:
        """A question for the object, which leaves a gap behind the verb."""
        subject = self.noun_phrase("person", modified=0.2)
        verb, kind = self.frame("person")
        wh = "who" if kind == "person" else "what"
        if kind == "animal" or self.random() < 0.2:
            noun = self.noun(kind, countable=kind not in ("mass", "drink"))
            wh = f"which {self.bare(noun, bool(noun.plural) and self.random() < 0.5, 0.1)}"
        group = self.verb_group(verb, subject.plural, auxiliary=True)
        return f"{wh} {group.auxiliary} {subject.text} {group.word}{self.adverbial(group.when)}?"

    def wh_subject(self) -> str:
        verb, kind = self.frame("person")
        wh, plural = "who", False
        if self.random() < 0.4:
            noun, plural = self.noun("person", countable=True), self.random() < 0.5
            wh = f"which {self.bare(noun, plural, 0.1)}"
        words, when = self.finite(verb, plural)
        return f"{wh} {words} {self.noun_phrase(kind).text}{self.adverbial(when, 0.2, place=kind != 'place')}?"

    def wh_adjunct(self) -> str:
        subject = self.noun_phrase("person", modified=0.1)
        verb, kind = self.frame("person", "active")
        group = self.verb_group(verb, subject.plural, auxiliary=True)
        start = f"{self.pick(('where', 'when', 'why'))} {group.auxiliary} {subject.text} {group.word}"
        return f"{start} {self.object_phrase(kind, subject)}?"


# How many of a hundred sentences are of each type.
SENTENCES = {
    Storyteller.plain: 31,
    Storyteller.dated: 6,
    Storyteller.two_actions: 5,
    Storyteller.reason: 4,
    Storyteller.that_clause: 8,
    Storyteller.wh_clause: 6,
    Storyteller.there: 5,
    Storyteller.passive: 5,
    Storyteller.any_negated: 3,
    Storyteller.some_affirmed: 2,
    Storyteller.never: 2,
    Storyteller.ever: 3,
    Storyteller.indefinite: 3,
    Storyteller.negation_scope: 3,
    Storyteller.yes_no: 6,
    Storyteller.wh_object: 4,
    Storyteller.wh_subject: 2,
    Storyteller.wh_adjunct: 2,
}
