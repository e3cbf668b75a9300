"""README.md of a model folder: what the model is, how it was trained, what it scores, how to load it."""

from __future__ import annotations

import json
import re

from antlm_fast.report import numbers
from antlm_fast.report.run_record import PhaseRecord, RunRecord

OBJECTIVES = {
    "CLM": "causal language modelling",
    "MLM": "masked language modelling",
    "MNTP": "masked next-token prediction",
}
SIGHT = {"causal": " under the causal mask", "full": " with the whole text in sight"}

SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "feed-forward size",
    "num_attention_heads": "attention heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest sequence",
}


def model_card(record: RunRecord) -> str:
    """The model card as Markdown with YAML front matter; what is not known is left out."""
    parts = [_front_matter(record), _about(record), _training(record), _results(record), _loading(record)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _is_llama(record: RunRecord) -> bool:
    return record.model_config.get("model_type") == "llama" or "LlamaForCausalLM" in (
        record.model_config.get("architectures") or ()
    )


def _is_exported_bert(record: RunRecord) -> bool:
    return record.model_config.get("model_type") == "antlm_bert"


def _reads_one_before(record: RunRecord) -> bool:
    """Whether the masked objective, the last one where there are several, is MNTP, alone or in a mix."""
    masked = [phase.objective for phase in record.phases if not phase.objective.startswith("CLM")]
    return bool(masked) and "MNTP" in masked[-1]


def _objectives(phase: PhaseRecord) -> list[str]:
    """The objectives of a phase, as its batches have them: a mix has two, unless one has no share."""
    name = phase.objective.partition("@")[0]
    mix = re.fullmatch(r"MIX\(([0-9.]+)(?:,(\w+))?\)", name)
    if mix is None:
        return [name]
    share, masked = float(mix[1]), mix[2] or "MLM"
    return ["CLM"] * (share < 1) + [masked] * (share > 0)


def _trained(record: RunRecord) -> dict[str, bool]:
    """Which read-outs were trained."""
    names = {name for phase in record.phases for name in _objectives(phase)}
    return {"causal": "CLM" in names, "masked": bool(names - {"CLM"})}


def _front_matter(record: RunRecord) -> str:
    name = "".join(sign if sign.isprintable() else " " for sign in record.name)
    # what is left of a JSON text is a YAML text, quotes included
    lines = ["---", f"model_name: {json.dumps(name, ensure_ascii=False)}"]
    trained = _trained(record)
    if _is_llama(record) or _is_exported_bert(record):
        task = "text-generation" if trained["causal"] else "fill-mask"
        lines += ["library_name: transformers", f"pipeline_tag: {task}"]
    tags = ["antlm"] * all(trained.values()) + [f"{read_out}-lm" for read_out in trained if trained[read_out]]
    return "\n".join([*lines, "tags:", *(f"  - {tag}" for tag in tags or ["antlm"]), "---"])


def _about(record: RunRecord) -> str:
    sizes = {**_model_settings(record), **record.model_config}
    rows = [f"| parameters | {numbers.count(record.num_parameters)} |"] if record.num_parameters else []
    rows += [f"| {label} | {_cell(sizes[key])} |" for key, label in SIZES.items() if sizes.get(key) is not None]
    layout = " Its weights have the layout of `LlamaForCausalLM`." if _is_llama(record) else ""
    about = (
        f"# {_cell(record.name)}\n\nOne transformer trained {_how(record)} with `antlm_fast`{_purpose(record)}.{layout}"
    )
    return about + ("\n\n| size | |\n|---|---|\n" + "\n".join(rows) if rows else "")


def _how(record: RunRecord) -> str:
    """The objectives of the phases, each once: "by causal language modelling and by ..., in turns,"."""
    phrases = []
    for phase in record.phases:
        names = _objectives(phase)
        phrase = " and ".join(f"by {OBJECTIVES.get(name, _cell(name))}" for name in names)
        sight = SIGHT.get(phase.objective.partition("@")[2], "")
        phrases.append(phrase + sight + (", both in every batch" if len(names) > 1 else ""))
    distinct = list(dict.fromkeys(phrases))
    how = " and ".join(distinct) + (", in turns" if len(distinct) > 1 else "")
    return how + "," * ("," in how)


def _purpose(record: RunRecord) -> str:
    trained = _trained(record)
    if all(trained.values()):
        return ": the same weights continue a text and fill its gaps (AntLM, arXiv 2412.03275)"
    return ": it was never trained to " + ("fill gaps" if trained["causal"] else "continue a text")


def _model_settings(record: RunRecord) -> dict[str, object]:
    settings = record.config.get("model")
    return settings if isinstance(settings, dict) else {}


def _training(record: RunRecord) -> str:
    progress = f"{record.steps_done:,} of {record.total_steps:,} steps"
    if record.tokens_seen is not None:
        progress += f", {numbers.count(record.tokens_seen)} tokens seen"
    lines = [f"## Training\n\nSchedule: {_code(record.schedule)}. Trained for {progress}."]
    data = record.config.get("data")
    facts = record.data.get("train")
    if isinstance(data, dict) and data.get("train"):
        tokens = facts.get("num_tokens") if isinstance(facts, dict) else None
        size = f", {numbers.count(tokens)} tokens" if tokens else ""
        lines.append(f"Training data: {_code(data['train'])}{size}.")
    return "\n\n".join(lines)


def _results(record: RunRecord) -> str:
    lines = []
    if record.final_losses:
        lines += ["| held-out text | loss (nats per token) | perplexity |", "|---|---|---|"]
        lines += [
            f"| {_cell(objective)} | {numbers.loss(value)} | {numbers.perplexity(value)} |"
            for objective, value in record.final_losses.items()
        ]
    read_outs = (record.pairs or {}).get("read_outs") or {}
    if record.pairs and read_outs:
        lines += [""] if lines else []
        lines += [
            f"| minimal pairs ({_cell(record.pairs.get('source', ''))}, {record.pairs.get('num_pairs', 0):,} pairs, "
            "chance 50 %) | sum | mean |",
            "|---|---|---|",
        ]
        lines += [
            f"| {_cell(name)} | {' | '.join(numbers.percent(tables[key]['overall']) for key in ('sum', 'mean'))} |"
            for name, tables in read_outs.items()
        ]
        lines += ["", "Unweighted mean over UIDs; sum and mean are of a sentence's log-probabilities."]
    return "## Results\n\n" + "\n".join(lines) if lines else ""


def _loading(record: RunRecord) -> str:
    blocks = ["## Use"]
    if _is_llama(record) or _is_exported_bert(record):
        code = "" if _is_llama(record) else ", trust_remote_code=True"
        options = 'subfolder="masked"' + code
        fill = (
            ""
            if _reads_one_before(record)
            # the pipeline reads a mask at its own position
            else (
                'fill_mask = pipeline("fill-mask", model=masked, tokenizer=tokenizer)\n'
                'print(fill_mask(f"The {tokenizer.mask_token} sleeps."))\n'
            )
        )
        whose = "stock classes" if _is_llama(record) else "its modelling code lies beside the weights"
        blocks.append(
            f"With transformers ({whose}). A read-out has a folder, with the same weights and the tokenizer that goes "
            "with it: this one begins a text and leaves it open, the one in `masked` also ends it, as training did.\n\n"
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline\n\n"
            'folder = "."  # of this file; or its name on the Hub\n'
            f"causal = AutoModelForCausalLM.from_pretrained(folder{code})  # sees the past\n"
            f"tokenizer = AutoTokenizer.from_pretrained(folder{code})\n"
            'print(pipeline("text-generation", model=causal, tokenizer=tokenizer)("The cat", max_new_tokens=20))\n\n'
            f"masked = AutoModelForMaskedLM.from_pretrained(folder, {options})  # sees the whole text\n"
            f"tokenizer = AutoTokenizer.from_pretrained(folder, {options})\n{fill}"
            "```\n\n"
            "AutoModel (hidden states) and AutoModelForSequenceClassification (a new head) load from `masked` alike."
        )
    if _reads_one_before(record):
        blocks.append("It was trained by MNTP: a hidden token's logits are those of the position before it.")
    shift = ", shift=1" if _reads_one_before(record) else ""
    blocks.append(
        "With antlm_fast, in the folder of this file, continuing a text and filling a gap:\n\n"
        "```python\n"
        "from pathlib import Path\n\n"
        "from antlm_fast.data.tokenizer import Tokenizer\n"
        "from antlm_fast.models.decoding import fill, generate\n"
        "from antlm_fast.models.pretrained import load_pretrained\n\n"
        'model = load_pretrained(Path("."))\n'
        'tokenizer = Tokenizer.load(".")\n'
        "special = tokenizer.special_id_set\n\n"
        'prompt = tokenizer.encode_beginning("The cat")\n'
        "print(tokenizer.decode(generate(model, prompt, 20, banned_ids=special)))\n\n"
        'gap = tokenizer.encode_with_masks(f"The {tokenizer.mask_token} sleeps.")\n'
        f"for candidates in fill(model, gap, tokenizer.mask_id{shift}, banned_ids=special).values():\n"
        "    print([(tokenizer.decode([token]), share) for token, share in candidates])\n"
        "```"
    )
    return "\n\n".join(blocks)


def _cell(value: object) -> str:
    """A value as text of a Markdown table: nothing in it may end the cell or start markup."""
    text = " ".join(str(value).split())
    for special in "\\`*_[]<>|":
        text = text.replace(special, "\\" + special)
    return text


def _code(value: object) -> str:
    """A value as Markdown code; a backtick within would end it."""
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"
