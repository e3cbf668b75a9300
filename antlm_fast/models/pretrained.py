"""Models on disk, in Hugging Face's layout: model.safetensors and a config.json.

A BabyLlama is read by stock LlamaForCausalLM. LtgBert and GptBert have no stock class: their folder holds one as well,
modeling_antlm_bert.py, which AutoModelForMaskedLM and AutoModelForCausalLM take with trust_remote_code=True.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from antlm_fast.models.baby_llama import BabyLlamaConfig
from antlm_fast.models.language_model import LanguageModel
from antlm_fast.models.registry import MODEL_CONFIGS, ModelConfig, build_model
from antlm_fast.types import InputError
from antlm_fast.user_text import read_text

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False}
MODELING_FILE = "modeling_antlm_bert.py"
BERT = {
    "architectures": ["AntlmBertForMaskedLM"],
    "model_type": "antlm_bert",
    "tie_word_embeddings": True,
    "auto_map": {
        auto: f"{Path(MODELING_FILE).stem}.{own}"
        for auto, own in {
            "AutoConfig": "AntlmBertConfig",
            "AutoModel": "AntlmBertModel",
            "AutoModelForMaskedLM": "AntlmBertForMaskedLM",
            "AutoModelForCausalLM": "AntlmBertForCausalLM",
        }.items()
    },
}


def save_pretrained(model: LanguageModel, folder: Path, *, token_ids: dict[str, int] | None = None) -> None:
    """Write model.safetensors (float32 or as held), config.json and, for LtgBert and GptBert, their modelling file.

    A BabyLlama is then read by `LlamaForCausalLM.from_pretrained`, the others by `AutoModelForMaskedLM` and
    `AutoModelForCausalLM` with trust_remote_code=True; what these save again, `load_pretrained` reads.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id, mask_token_id, as far as the tokenizer has them.

    Raises:
        OSError: a file cannot be written.
        TypeError: the model's config is none of MODEL_CONFIGS.
    """
    config = _known_config(model)
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = asdict(config)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(config, BabyLlamaConfig):
        del values["architecture"]
        values = LLAMA | values | {"num_key_value_heads": config.kv_heads}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        values = BERT | values
        tensors = {_exported_name(name): tensor for name, tensor in tensors.items()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    text = json.dumps({"dtype": dtype} | values | (token_ids or {}), indent=2)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OSError(f"{folder / 'model.safetensors'} could not be written: {error}") from None
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if not isinstance(config, BabyLlamaConfig):
        shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)


def load_pretrained(folder: Path) -> LanguageModel:
    """The model of a folder written by `save_pretrained`, or by Hugging Face for one or for a Llama without biases.

    Raises:
        InputError: a file is missing or damaged, or the folder holds another kind of model.
    """
    config = read_model_config(folder / "config.json")
    path = folder / "model.safetensors"
    tensors = read_safetensors(path)
    if not isinstance(config, BabyLlamaConfig):
        tensors = _own_tensors(tensors, path)
    elif config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model = build_model(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[1 if "\n\t" in str(error) else 0]
        raise InputError(f"{path} does not fit {folder / 'config.json'}: {reason}") from None
    return model


def read_model_config(path: Path) -> ModelConfig:
    """The config of a Hugging Face config.json; keys that shape the computation and are unknown are refused.

    Raises:
        InputError: the file is missing or damaged, or is that of a model that is none of ours.
    """
    values = read_settings(path)
    kind = values.get("model_type")
    if kind == BERT["model_type"]:
        return _bert_config(values, path)
    if kind == LLAMA["model_type"]:
        return _llama_config(values, path)
    public = "position_bucket_size" in values
    hint = " (a public LTG-BERT or GPT-BERT is read by load_public_checkpoint)" if public else ""
    raise InputError(f"{path}: model_type must be 'llama' or 'antlm_bert'; got {kind!r}{hint}")


def read_settings(path: Path) -> dict[str, Any]:
    """The table of a config.json.

    Raises:
        InputError: there is no file, or it holds no table.
    """
    try:
        values = json.loads(read_text(path, "config file"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a model folder holds config.json and model.safetensors") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a table of settings; got {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        InputError: there is no file, or it is damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the model's weights must be there") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error})") from None


def _llama_config(values: dict[str, Any], path: Path) -> BabyLlamaConfig:
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
    config = _config_of(BabyLlamaConfig, values, path)
    assert isinstance(config, BabyLlamaConfig)
    if values.get("head_dim") not in (None, config.head_dim):
        raise InputError(
            f"{path}: head_dim must be hidden_size / num_attention_heads ({config.head_dim}); got {values['head_dim']}"
        )
    return config


def _bert_config(values: dict[str, Any], path: Path) -> ModelConfig:
    kinds = {name: kind for name, kind in MODEL_CONFIGS.items() if kind is not BabyLlamaConfig}
    kind = kinds.get(str(values.get("architecture")))
    if kind is None:
        raise InputError(f"{path}: architecture must be one of {', '.join(kinds)}; got {values.get('architecture')!r}")
    if not values.get("tie_word_embeddings", True):
        raise InputError(f"{path}: tie_word_embeddings must be true; got {values['tie_word_embeddings']}")
    return _config_of(kind, values, path)


def _config_of(kind: type[ModelConfig], values: Mapping[str, Any], path: Path) -> ModelConfig:
    known = {field.name for field in fields(kind)}
    try:
        return checked_config(kind, {name: value for name, value in values.items() if name in known})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def checked_config(kind: type[ModelConfig], values: Mapping[str, Any]) -> ModelConfig:
    """The config of values that were read from a file, where a number may be a text.

    Raises:
        InputError: a value is no number where one is wanted, or the config refuses it.
    """
    for field in fields(kind):
        value = values.get(field.name, field.default)
        for wanted, accepted, words in ((int, int, "a whole number"), (float, int | float, "a number")):
            if type(field.default) is wanted and (not isinstance(value, accepted) or isinstance(value, bool)):
                raise InputError(f"{field.name} must be {words}; got {value!r}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def _known_config(model: LanguageModel) -> ModelConfig:
    for kind in MODEL_CONFIGS.values():
        if isinstance(model.config, kind):
            return model.config
    raise TypeError(
        f"model must have a config of {', '.join(kind.__name__ for kind in MODEL_CONFIGS.values())}; "
        f"got {type(model.config).__name__}"
    )


def _exported_name(name: str) -> str:
    """Our parameter's name in the modelling file: a body `model`, and a head whose projection is `decoder`."""
    if name == "head.bias":
        return "head.decoder.bias"
    return name if name.startswith("head.") else f"model.{name}"


def _own_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`_exported_name` undone; names that it never gives stay, for load_state_dict to refuse."""
    found = dict(tensors)
    decoder, table = found.pop("head.decoder.weight", None), found.get("model.embedding.table.weight")
    if decoder is not None and (table is None or not torch.equal(decoder, table)):
        raise InputError(f"{path}: head.decoder.weight must be the word embedding, which it is tied to; got another")
    names = {"head.decoder.bias": "head.bias"}
    return {names.get(name, name.removeprefix("model.")): tensor for name, tensor in found.items()}
