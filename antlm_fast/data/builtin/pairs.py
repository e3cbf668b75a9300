"""The paradigms of the built-in minimal pairs.

A paradigm draws pairs (good, bad): a sentence of the grammar and its nearest ungrammatical twin, both in lower case
with the final mark. The two have the same number of words and differ in one word or in word order. The good sentence
has a form that sentences.py makes too; the bad one breaks exactly the rule that names the paradigm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from antlm_fast.data.builtin import pairs_of_form as form
from antlm_fast.data.builtin import pairs_of_structure as structure
from antlm_fast.data.builtin.sentences import Storyteller


class Phenomenon(NamedTuple):
    """One paradigm: its UID, field and term as in BLiMP, and the function that draws a pair."""

    uid: str
    field: str
    term: str
    draw: Callable[[Storyteller], tuple[str, str]]


PHENOMENA = (
    Phenomenon("subject_verb_agreement_simple", "morphology", "subject_verb_agreement", form.agreement_simple),
    Phenomenon("subject_verb_agreement_pp_attractor", "morphology", "subject_verb_agreement", form.agreement_pp),
    Phenomenon(
        "subject_verb_agreement_relative_clause", "morphology", "subject_verb_agreement", form.agreement_relative
    ),
    Phenomenon("coordination_agreement", "morphology", "subject_verb_agreement", form.agreement_coordination),
    Phenomenon("existential_there_agreement", "morphology", "subject_verb_agreement", form.there_agreement),
    Phenomenon("determiner_noun_agreement", "morphology", "determiner_noun_agreement", form.determiner_noun),
    Phenomenon(
        "determiner_noun_agreement_adjective", "morphology", "determiner_noun_agreement", form.determiner_noun_adjective
    ),
    Phenomenon("anaphor_number_agreement", "morphology", "anaphor_agreement", form.anaphor_number),
    Phenomenon("anaphor_gender_agreement", "morphology", "anaphor_agreement", form.anaphor_gender),
    Phenomenon("irregular_participle", "morphology", "irregular_forms", form.irregular_participle),
    Phenomenon("anaphor_binding_domain", "syntax_semantics", "binding", form.anaphor_domain),
    Phenomenon("argument_structure_intransitive", "syntax", "argument_structure", structure.intransitive),
    Phenomenon("argument_structure_transitive", "syntax", "argument_structure", structure.transitive),
    Phenomenon("argument_structure_passive", "syntax", "argument_structure", structure.passive),
    Phenomenon("wh_object_gap", "syntax", "filler_gap_dependency", structure.wh_object_gap),
    Phenomenon("wh_that_with_gap", "syntax", "filler_gap_dependency", structure.wh_that_with_gap),
    Phenomenon("wh_that_without_gap", "syntax", "filler_gap_dependency", structure.wh_that_without_gap),
    Phenomenon("wh_word_order", "syntax", "auxiliary_inversion", structure.wh_word_order),
    Phenomenon("auxiliary_inversion", "syntax", "auxiliary_inversion", structure.auxiliary_inversion),
    Phenomenon("npi_licensing_ever", "semantics", "npi_licensing", structure.npi_ever),
    Phenomenon("npi_licensing_any", "semantics", "npi_licensing", structure.npi_any),
    Phenomenon("npi_negation_scope", "semantics", "npi_licensing", structure.npi_scope),
    Phenomenon("existential_there_quantifier", "semantics", "quantifiers", structure.there_quantifier),
)
