"""README.md of a run: what the model is, how it was trained, what it scores, how to load it."""

from __future__ import annotations

import json

from antlm_fast.report import numbers
from antlm_fast.report.run_record import RunRecord

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


def _front_matter(record: RunRecord) -> str:
    lines = ["---", f"model_name: {json.dumps(record.name)}"]  # a JSON text is a YAML text, quotes included
    if _is_llama(record):
        lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    if _is_exported_bert(record):
        # a fill-mask pipeline reads a mask at its own position
        task = "text-generation" if _reads_one_before(record) else "fill-mask"
        lines += ["library_name: transformers", f"pipeline_tag: {task}"]
    return "\n".join([*lines, "tags:", "  - antlm", "  - causal-lm", "  - masked-lm", "---"])


def _about(record: RunRecord) -> str:
    sizes = {**_model_settings(record), **record.model_config}
    rows = [f"| parameters | {numbers.count(record.num_parameters)} |"] if record.num_parameters else []
    rows += [f"| {label} | {_cell(sizes[key])} |" for key, label in SIZES.items() if sizes.get(key) is not None]
    layout = " Its weights have the layout of `LlamaForCausalLM`." if _is_llama(record) else ""
    mixed = any(phase.objective.startswith("MIX") for phase in record.phases)
    how = "both in every batch" if mixed else "in turns"
    about = (
        f"# {_cell(record.name)}\n\nOne transformer trained by causal and by masked language modelling, {how}, with "
        f"`antlm_fast`: the same weights continue a text and fill its gaps (AntLM, arXiv 2412.03275).{layout}"
    )
    return about + ("\n\n| size | |\n|---|---|\n" + "\n".join(rows) if rows else "")


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
    if not record.model_config:
        return ""
    blocks = ["## Use"]
    if _is_llama(record):
        blocks.append(
            "With transformers, in the folder of this file (causal read-out):\n\n"
            "```python\n"
            "from transformers import AutoTokenizer, LlamaForCausalLM\n\n"
            'model = LlamaForCausalLM.from_pretrained("model")\n'
            'tokenizer = AutoTokenizer.from_pretrained("model")\n'
            "```"
        )
    if _is_exported_bert(record):
        blocks.append(
            "With transformers, in the folder of this file; the modelling code lies beside the weights:\n\n"
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer\n\n"
            'masked = AutoModelForMaskedLM.from_pretrained("model", trust_remote_code=True)  # sees the whole text\n'
            'causal = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)  # sees the past alone\n'
            'tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)\n'
            "```"
        )
    if _reads_one_before(record):
        blocks.append("It was trained by MNTP: a hidden token's logits are those of the position before it.")
    shift = ", shift=1" if _reads_one_before(record) else ""
    blocks.append(
        "With antlm_fast, continuing a text (causal read-out) and filling a gap (masked read-out):\n\n"
        "```python\n"
        "from pathlib import Path\n\n"
        "from antlm_fast.data.tokenizer import Tokenizer\n"
        "from antlm_fast.models.decoding import fill, generate\n"
        "from antlm_fast.models.pretrained import load_pretrained\n\n"
        'model = load_pretrained(Path("model"))\n'
        'tokenizer = Tokenizer.load("model")\n'
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
