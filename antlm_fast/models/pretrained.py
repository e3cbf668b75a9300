"""Models on disk, in Hugging Face's layout: model.safetensors and a config.json.

A folder is read causally, the folder `masked` in it, which holds the same weights, as a masked model; so each can have
the tokenizer of its read-out. A BabyLlama is read by stock classes, LlamaForCausalLM and EuroBertForMaskedLM. LtgBert
and GptBert have none: their folders bring modelling files, which transformers takes with trust_remote_code=True.
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
# a Llama in which every token sees the whole sequence, with the same parameter names; its ids are another vocabulary's
EURO_BERT = LLAMA | {
    "architectures": ["EuroBertForMaskedLM"],
    "model_type": "eurobert",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
MASKED_FOLDER = "masked"
CODE_FILES = ("configuration_antlm_bert.py", "layers_antlm_bert.py", "modeling_antlm_bert.py")
BERT = {"model_type": "antlm_bert", "tie_word_embeddings": True}
AUTO_CLASSES = {
    "AutoConfig": "configuration_antlm_bert.AntlmBertConfig",
    "AutoModel": "modeling_antlm_bert.AntlmBertModel",
    "AutoModelForMaskedLM": "modeling_antlm_bert.AntlmBertForMaskedLM",
    "AutoModelForCausalLM": "modeling_antlm_bert.AntlmBertForCausalLM",
    "AutoModelForSequenceClassification": "modeling_antlm_bert.AntlmBertForSequenceClassification",
}
INDEX = "model.safetensors.index.json"


def save_pretrained(model: LanguageModel, folder: Path, *, token_ids: dict[str, int] | None = None) -> None:
    """Write model.safetensors (float32 or as held), config.json and, for LtgBert and GptBert, their modelling files.

    The folder is for `AutoModelForCausalLM`, its folder MASKED_FOLDER for `AutoModelForMaskedLM`, `AutoModel` and
    `AutoModelForSequenceClassification`; LtgBert's and GptBert's take all four, but for the masked one, which refuses
    the first. What these save again, `load_pretrained` reads, unless it has another head.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id, mask_token_id, as far as the tokenizer has them.

    Raises:
        OSError: a file cannot be written.
        TypeError: the model's config is none of MODEL_CONFIGS.
    """
    config = _known_config(model)
    values: dict[str, Any] = asdict(config)
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    values |= token_ids or {}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    masked = folder / MASKED_FOLDER
    if isinstance(config, BabyLlamaConfig):
        del values["architecture"]
        values["num_key_value_heads"] = config.kv_heads
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
        _write_folder(folder, LLAMA | values, tensors)
        _write_folder(masked, EURO_BERT | values | rotary, tensors)
        return
    tensors = {_exported_name(name): tensor for name, tensor in tensors.items()}
    not_causal = {auto: own for auto, own in AUTO_CLASSES.items() if auto != "AutoModelForCausalLM"}
    for each, own, auto_map in (
        (folder, "AntlmBertForCausalLM", AUTO_CLASSES),
        (masked, "AntlmBertForMaskedLM", not_causal),
    ):
        _write_folder(each, BERT | values | {"architectures": [own], "auto_map": auto_map}, tensors)
        for name in CODE_FILES:
            shutil.copyfile(Path(__file__).with_name(name), each / name)


def _write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_pretrained(folder: Path) -> LanguageModel:
    """The model of a folder written by `save_pretrained`, or by Hugging Face for one or for a Llama without biases.

    It is in evaluation mode, without dropout: `model.train()` before it is trained on.

    Raises:
        InputError: a file is missing or damaged, or the folder holds another kind of model.
    """
    config = read_model_config(folder / "config.json")
    path = weights_file(folder)
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
    return model.eval()


def read_model_config(path: Path) -> ModelConfig:
    """The config of a Hugging Face config.json; keys that shape the computation and are unknown are refused.

    Raises:
        InputError: the file is missing or damaged, or is that of a model that is none of ours.
    """
    values = read_settings(path)
    kind = values.get("model_type")
    if kind == BERT["model_type"]:
        return _bert_config(values, path)
    if kind in (LLAMA["model_type"], EURO_BERT["model_type"]):
        return _llama_config(values, path)
    public = "position_bucket_size" in values
    hint = " (a public LTG-BERT or GPT-BERT is read by load_public_checkpoint)" if public else ""
    raise InputError(f"{path}: model_type must be 'llama', 'eurobert' or 'antlm_bert'; got {kind!r}{hint}")


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


def weights_file(folder: Path) -> Path:
    """The folder's model.safetensors, or the index of the files into which it was cut; the first where neither is."""
    whole, index = folder / "model.safetensors", folder / INDEX
    return index if index.exists() and not whole.exists() else whole


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all files that an index names.

    Raises:
        InputError: there is no file, it is damaged, or an index and its files do not fit.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the model's weights must be there") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error})") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    names: Any = read_settings(index).get("weight_map")
    files = names.values() if isinstance(names, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors") for file in files):
        raise InputError(
            f"{index}: weight_map must name a .safetensors file of its folder for each tensor; got {str(names)[:60]}"
        )
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files)):
        tensors |= read_safetensors(index.with_name(file))
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise InputError(f"{index}: {missing[0]} must be in {names[missing[0]]}; it is not there")
    return tensors


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file that those may read whom the umask lets; safetensors' own would be its owner's alone.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # asking for the umask would mean to change it, in all threads
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OSError(f"{path} could not be written: {error}") from None
    path.chmod(mode)


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
