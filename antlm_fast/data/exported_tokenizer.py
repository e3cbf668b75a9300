"""The form in which transformers gets a tokenizer: a written mask hides a token, and a text need not end.

Training ends every document (`<s> text </s>`), and so does who fills gaps; who continues a text must not begin behind
its end. Plain text has the same ids in every form, but for that end. The functions take and give tokenizer.json's
content.
"""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

# what the two forms differ in, beside the mask token's entry
PARTS = ("normalizer", "pre_tokenizer", "post_processor")


def exported_form(
    description: dict[str, Any], mask_token: str, mask_id: int, *, ends: bool, special: bool = True
) -> dict[str, Any]:
    """The tokenizer that finds masks where they are written.

    A blank before a written mask belongs to the hidden token, as it would to a word. A blank that the tokenizer puts
    before the first word is put there alone, not behind each mask too.

    Args:
        special: whether the mask is a special token, as transformers wants it.
        ends: False leaves out what the template puts behind one text; two texts are always whole.
    """
    form = deepcopy(description)
    mask = re.escape(mask_token)
    normalizers = [_without(rf"\s+(?={mask})")]
    begins_with_mask = f"(?i:{mask})"  # lowercased, perhaps, by then
    for part in _sequence(form["normalizer"], "normalizers"):
        normalizers.append(part)
        if part["type"] == "Prepend":
            normalizers.append(_without(rf"\A{re.escape(part['prepend'])}(?={begins_with_mask})"))
    pre_tokenizers = _sequence(form["pre_tokenizer"], "pretokenizers")
    opening: dict[str, Any] = pre_tokenizers[0] if pre_tokenizers else {"type": None}
    if opening["type"] == "ByteLevel" and opening["add_prefix_space"]:
        opening["add_prefix_space"] = False
        normalizers += [{"type": "Prepend", "prepend": " "}, _without(rf"\A (?= |{begins_with_mask})")]
    if opening["type"] == "Metaspace" and opening["prepend_scheme"] == "always":
        opening["prepend_scheme"] = "first"
    form["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    if (entry := _mask_entry(form, mask_token)) is None:  # a word of the vocabulary until now
        form["added_tokens"].append(entry := {"id": mask_id, "content": mask_token, "single_word": False})
        entry |= {"lstrip": False, "rstrip": False}
    # a mask that is found in normalized text leaves one text around it, of which there is one beginning
    entry |= {"normalized": True, "special": special}
    if not ends:
        form["post_processor"] = _without_end(form["post_processor"])
    return form


def num_end_ids(processor: dict[str, Any] | None) -> int:
    """How many ids a post-processor puts behind one text."""
    if processor is None:
        return 0
    if processor["type"] == "Sequence":
        return sum(map(num_end_ids, processor["processors"]))
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return 1
    if processor["type"] != "TemplateProcessing":
        return 0
    tokens, single = processor["special_tokens"], processor["single"]
    return sum(len(tokens[part["SpecialToken"]["id"]]["ids"]) for part in single[_end_of(single) :])


def differences(description: dict[str, Any], mask_token: str) -> dict[str, Any]:
    """What `restored_form` needs to make the training form of the exported one again."""
    mask = {"mask_token": mask_token, "mask": _mask_entry(description, mask_token)}
    return mask | {part: description[part] for part in PARTS}


def restored_form(exported: dict[str, Any], differences: dict[str, Any]) -> dict[str, Any]:
    """The training form.

    Raises:
        KeyError, TypeError: the differences are not those of `differences`.
    """
    tokens = [
        differences["mask"] if entry["content"] == differences["mask_token"] else entry
        for entry in exported["added_tokens"]
    ]
    return exported | {part: differences[part] for part in PARTS} | {"added_tokens": [*filter(None, tokens)]}


def _mask_entry(description: dict[str, Any], mask_token: str) -> dict[str, Any] | None:
    """The mask token among the added tokens."""
    return next((entry for entry in description["added_tokens"] if entry["content"] == mask_token), None)


def _without(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}


def _sequence(component: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, one after the other."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for nested in component[inner] for part in _sequence(nested, inner)]


def _without_end(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The post-processor whose template of one text has no special token behind the text; pairs stay whole."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return processor | {"processors": [_without_end(part) for part in processor["processors"]]}
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return _without_end(_as_template(processor))
    if processor["type"] != "TemplateProcessing":
        return processor
    return processor | {"single": processor["single"][: _end_of(processor["single"])]}


def _end_of(template: list[dict[str, Any]]) -> int:
    """Where the special tokens begin that stand behind the text."""
    return max((place for place, part in enumerate(template, start=1) if "Sequence" in part), default=0)


def _as_template(processor: dict[str, Any]) -> dict[str, Any]:
    """BERT's or RoBERTa's post-processor, which knows no other template than its own, as one that has a template."""
    (begin, begin_id), (end, end_id) = processor["cls"], processor["sep"]
    roberta = processor["type"] == "RobertaProcessing"

    def special(token: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def text(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    second = 0 if roberta else 1
    single = [special(begin, 0), text("A", 0), special(end, 0)]
    ids = {begin: begin_id, end: end_id}
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *[special(end, 0)] * roberta, text("B", second), special(end, second)],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ids},
    }
    if not roberta:
        return template
    offsets = {name: processor[name] for name in ("trim_offsets", "add_prefix_space")}
    return {"type": "Sequence", "processors": [{"type": "ByteLevel", "use_regex": True} | offsets, template]}
