"""Models on disk, in Hugging Face's layout: model.safetensors and a config.json that stock classes read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.types import InputError

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False}


def save_pretrained(model: BabyLlama, folder: Path, *, token_ids: dict[str, int] | None = None) -> None:
    """Write model.safetensors (float32 or as held) and config.json; `LlamaForCausalLM.from_pretrained` reads them.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id, mask_token_id, as far as the tokenizer has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config) | {"num_key_value_heads": model.config.kv_heads}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    text = json.dumps(LLAMA | {"dtype": dtype} | config | (token_ids or {}), indent=2)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OSError(f"{folder / 'model.safetensors'} could not be written: {error}") from None
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_pretrained(folder: Path) -> BabyLlama:
    """The model of a folder written by `save_pretrained` or by Hugging Face for a Llama without biases.

    Raises:
        InputError: a file is missing or damaged, or the folder holds another kind of model.
    """
    config = read_model_config(folder / "config.json")
    model = BabyLlama(config)
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the model's weights must be there") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error})") from None
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[1 if "\n\t" in str(error) else 0]
        raise InputError(f"{path} does not fit {folder / 'config.json'}: {reason}") from None
    return model


def read_model_config(path: Path) -> BabyLlamaConfig:
    """BabyLlamaConfig from a Hugging Face config.json; keys that shape the computation and are unknown are refused."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a model folder holds config.json and model.safetensors") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a table of settings; got {type(values).__name__}")
    if values.get("model_type") != "llama":
        raise InputError(f"{path}: model_type must be 'llama'; got {values.get('model_type')!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{path}: rope_type must be 'default'; got {rope['rope_type']!r}")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise InputError(f"{path}: {name} must be false; got {values[name]}")
    if values.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act must be 'silu'; got {values['hidden_act']!r}")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    known = {field.name for field in fields(BabyLlamaConfig)}
    try:
        config = BabyLlamaConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise InputError(
            f"{path}: head_dim must be hidden_size / num_attention_heads ({config.head_dim}); got {values['head_dim']}"
        )
    return config
