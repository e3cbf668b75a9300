"""Public LTG-BERT and GPT-BERT checkpoints as our models: names, shapes and the few differences in what they compute.

Three layouts, told apart by names. Sources of the names and shapes (facts; no code is taken from them):
* LTG-BERT: github.com/ltgoslo/ltg-bert, babylm/train/model.py and modeling_ltgbert.py (for ltg/ltg-bert-babylm).
* GPT-BERT: the training code's model with gate and sums (copies of ltgoslo/gpt-bert, model_extra.py) and the modelling
  files of ltg/gpt-bert-babylm-* and BabyLM-community/babylm-baseline-*-gpt-bert-*. They differ in prefixes alone.
* GPT-BERT without gate and sums (the same code's model.py): our gate is then held at gelu(G) = 1, our sums at the last.

What the public classes do beyond logits is not imported: ltg-bert-babylm's class puts special tokens at minus infinity,
GPT-BERT's classes move labels by one. In training theirs draw a new dropout of the relative table for each layer, ours
one for all. The first LTG-BERT code (ltg-bert, training/model.py) splits the projected relative table head by head into
queries and keys, where later code splits it into all queries and all keys: our model cannot compute that, and the names
do not tell; what tells is a next-sentence head, which no other code has.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antlm_fast.kernels.disentangled_attention import relative_bucket
from antlm_fast.models.baby_llama import BabyLlamaConfig
from antlm_fast.models.gpt_bert import GptBert, GptBertConfig
from antlm_fast.models.ltg_bert import LtgBert, LtgBertConfig
from antlm_fast.models.pretrained import INDEX, checked_config, read_safetensors, read_settings
from antlm_fast.types import InputError

WRAPPERS = ("module.", "_orig_mod.", "model.")  # data parallelism, torch.compile, a Hugging Face class around the body
STATES = ("ema_model", "model")  # where a training state keeps weights
ROOT = "embedding.word_embedding.weight"
UNGATED = (
    1.14445071835  # gelu(UNGATED) = 1; the layer normalisation after the gate takes away what rounding leaves of it
)

SHARED = {
    "embedding.table.weight": ROOT,
    "relative.table.weight": "embedding.relative_embedding",
    "relative.norm.weight": "embedding.relative_layer_norm.weight",
    "relative.norm.bias": "embedding.relative_layer_norm.bias",
    "head.dense.weight": "classifier.nonlinearity.1.weight",
    "head.dense.bias": "classifier.nonlinearity.1.bias",
    "head.bias": "classifier.nonlinearity.5.bias",
}
DECODER = "classifier.nonlinearity.5.weight"  # the word embedding once more
# our name in a layer -> theirs, after the name of their part
ATTENTION = {
    "attention.heads.query_key.weight": "in_proj_qk.weight",
    "attention.heads.query_key.bias": "in_proj_qk.bias",
    "attention.out.weight": "out_proj.weight",
    "attention.out.bias": "out_proj.bias",
}
LTG_ATTENTION = ATTENTION | {
    "attention.value.weight": "in_proj_v.weight",
    "attention.value.bias": "in_proj_v.bias",
    "attention.out_norm.weight": "post_layer_norm.weight",
    "attention.out_norm.bias": "post_layer_norm.bias",
}
GATED_ATTENTION = ATTENTION | {
    "attention.value_gate.weight": "in_proj_vg.weight",
    "attention.value_gate.bias": "in_proj_vg.bias",
}
UNGATED_ATTENTION = ATTENTION | {
    "attention.value_gate.weight": "in_proj_v.weight",
    "attention.value_gate.bias": "in_proj_v.bias",
}
FEED_FORWARD = {"feed_forward.wide.weight": "mlp.1.weight", "feed_forward.narrow.weight": "mlp.4.weight"}


def load_public_checkpoint(
    path: Path, *, num_attention_heads: int | None = None, config: Path | None = None, ema: bool = True
) -> LtgBert | GptBert:
    """The model of a public checkpoint, in evaluation mode; its logits are the public model's.

    Args:
        path: a .safetensors, .bin or .pt file, or a folder with model.safetensors (or its parts, and their index) or
            pytorch_model.bin. A training state is taken apart. Nothing but tensors and plain values is ever unpickled.
        num_attention_heads: None reads it from the config.
        config: the checkpoint's settings as JSON; None takes config.json beside the weights if it is there.
        ema: of a training state that holds weights and their moving average, take the average.

    Raises:
        InputError: there is no file, it is damaged, or it holds what our models cannot compute; the reason is named.
    """
    weights = _weights_file(path)
    if config is None and (weights.parent / "config.json").exists():
        config = weights.parent / "config.json"
    settings = {} if config is None else read_settings(config)
    state_dict = _read_weights(weights, ema=ema)
    try:
        own, tensors = convert_state_dict(state_dict, settings=settings, num_attention_heads=num_attention_heads)
    except InputError as error:
        raise InputError(f"{weights}: {error}") from None
    model: LtgBert | GptBert = LtgBert(own) if isinstance(own, LtgBertConfig) else GptBert(own)
    model.load_state_dict(tensors)
    return model.eval()


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    settings: Mapping[str, Any] | None = None,
    num_attention_heads: int | None = None,
) -> tuple[LtgBertConfig | GptBertConfig, dict[str, Tensor]]:
    """A public state dict as the config and state dict of our model that computes the same logits.

    Args:
        state_dict: names as in the public code, with or without a wrapper's prefix.
        settings: the checkpoint's config.json. Sizes are read off the shapes and must agree with it.
        num_attention_heads: None reads it from the settings; no shape tells it.

    Returns:
        (config, tensors): `LtgBert(config)` or `GptBert(config)` takes tensors in load_state_dict. Tensors that stay as
        they are are not copied.

    Raises:
        InputError: an unknown layout, missing or further names, shapes that do not fit, no number of heads.
    """
    settings = settings or {}
    found = _plain_names(state_dict)
    kind, names = _layout(found)
    buckets = {name: found.pop(name) for name in list(found) if name.endswith(".position_indices")}
    decoder = found.pop(DECODER, None)
    _check_names(found, names.values())
    config = _config(kind, found, settings, num_attention_heads, buckets)
    tensors = {own: found[theirs] for own, theirs in names.items()}
    if decoder is not None and not torch.equal(decoder, found[ROOT]):
        raise InputError(f"{DECODER} must be the word embedding, to which our head is tied; got another matrix")
    _check_buckets(buckets, config)
    if kind is GptBertConfig:
        _complete_gpt_bert(tensors, config)
    _check_shapes(tensors, names, config)
    return config, tensors


def _plain_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without wrappers, as the training code has them."""
    found: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"state_dict must map names to tensors; got {name!r}: {type(tensor).__name__}")
        plain = name
        while plain.startswith(WRAPPERS):
            plain = plain.partition(".")[2]
        plain = re.sub(r"^transformer\.", "", re.sub(r"^lm_head\.", "classifier.", plain))
        if plain in found:
            raise InputError(f"state_dict must hold each parameter once; got {plain} under two prefixes ({name})")
        found[plain] = tensor
    return found


def _layout(found: Mapping[str, Tensor]) -> tuple[type[LtgBertConfig | GptBertConfig], dict[str, str]]:
    """(our config's class, our name -> their plain name) of every parameter that is theirs to give."""
    if any(name.startswith("next_sentence_classifier.") for name in found):
        raise InputError(
            "state_dict must not be of LTG-BERT's first training code (it has a next-sentence head): its relative "
            "positions are split into queries and keys head by head, which our model does not compute"
        )
    numbers = {
        part: {int(match[1]) for name in found if (match := re.match(rf"{part}\.(\d+)\.", name))}
        for part in ("layers", "attention_layers")
    }
    if ROOT not in found or all(numbers.values()) or not any(numbers.values()):
        raise InputError(
            f"state_dict must be of LTG-BERT (with {ROOT} and transformer.layers.0) or of GPT-BERT (with "
            f"transformer.attention_layers.0); got {_listed(found)}"
        )
    if numbers["layers"]:
        return LtgBertConfig, SHARED | {
            f"layers.{i}.{own}": f"layers.{i}.{part}{theirs}"
            for i in range(max(numbers["layers"]) + 1)
            for part, table in (("attention.", LTG_ATTENTION), ("mlp.", FEED_FORWARD))
            for own, theirs in table.items()
        }
    plain = "attention_layers.0.in_proj_v.weight" in found and not any("dwa_modules." in name for name in found)
    names = dict(SHARED)
    for i in range(max(numbers["attention_layers"]) + 1):
        attention = UNGATED_ATTENTION if plain else GATED_ATTENTION
        names |= {f"layers.{i}.{own}": f"attention_layers.{i}.{theirs}" for own, theirs in attention.items()}
        names |= {f"layers.{i}.{own}": f"mlp_layers.{i}.{theirs}" for own, theirs in FEED_FORWARD.items()}
        if not plain:
            names[f"layers.{i}.attention_sum.weight"] = f"dwa_modules.alphas.{2 * i}"
            names[f"layers.{i}.feed_forward_sum.weight"] = f"dwa_modules.alphas.{2 * i + 1}"
    return GptBertConfig, names


def _check_names(found: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    wanted = set(expected)
    missing, further = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or further:
        faults = [f"{_listed(names)} {what}" for names, what in ((missing, "missing"), (further, "unknown")) if names]
        raise InputError(f"state_dict must hold the parameters of its layout and no others; got {'; '.join(faults)}")


def _config(
    kind: type[LtgBertConfig | GptBertConfig],
    found: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    num_attention_heads: int | None,
    buckets: Mapping[str, Tensor],
) -> LtgBertConfig | GptBertConfig:
    part = "layers.0.mlp." if kind is LtgBertConfig else "mlp_layers.0."
    for name in (ROOT, "embedding.relative_embedding", f"{part}mlp.4.weight"):
        if found[name].ndim != 2:
            raise InputError(f"{name} must be a matrix; got shape {tuple(found[name].shape)}")
    rows = found["embedding.relative_embedding"].shape[0]
    if rows % 2 == 0:
        raise InputError(f"embedding.relative_embedding must have 2 * buckets - 1 rows; got {rows}")
    layers = {int(match[1]) for name in found if (match := re.match(r"(?:attention_)?layers\.(\d+)\.", name))}
    sizes: dict[str, Any] = {
        "vocab_size": found[ROOT].shape[0],
        "hidden_size": found[ROOT].shape[1],
        "intermediate_size": found[f"{part}mlp.4.weight"].shape[1],
        "num_hidden_layers": len(layers),
        "position_bucket_size": (rows + 1) // 2,
    }
    for name, size in sizes.items():
        if settings.get(name, size) != size:
            raise InputError(f"{name} must be {size}, by the shapes of the weights; the config has {settings[name]}")
    heads = settings.get("num_attention_heads") if num_attention_heads is None else num_attention_heads
    if heads is None:
        raise InputError("num_attention_heads must be given where no config tells it: no shape does; got None")
    drawn = next(iter(buckets.values()), torch.empty(512, 0)).shape[0]
    optional = {
        "max_position_embeddings": settings.get("max_position_embeddings", drawn),
        "hidden_dropout": settings.get("hidden_dropout_prob"),
        "attention_dropout": settings.get("attention_probs_dropout_prob"),
        "layer_norm_eps": settings.get("layer_norm_eps"),
    }
    given: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    own = checked_config(kind, {"num_attention_heads": heads} | sizes | given)
    assert not isinstance(own, BabyLlamaConfig)
    return own


def _check_buckets(buckets: Mapping[str, Tensor], config: LtgBertConfig | GptBertConfig) -> None:
    """The stored rows of query i and key j are those that our model computes; they may go on past its longest."""
    longest, size = config.max_position_embeddings, config.position_bucket_size
    place = torch.arange(longest)
    own = relative_bucket(place[:, None] - place, bucket_size=size, max_position=longest) + size - 1
    for name, stored in buckets.items():
        if stored.ndim != 2 or min(stored.shape) < longest:
            raise InputError(
                f"{name} must be at least ({longest}, {longest}), by max_position_embeddings; got {tuple(stored.shape)}"
            )
        if not torch.equal(stored[:longest, :longest].long(), own):
            raise InputError(f"{name} must hold LTG-BERT's logarithmic buckets of query minus key; got another rule")


def _complete_gpt_bert(tensors: dict[str, Tensor], config: LtgBertConfig | GptBertConfig) -> None:
    """Gate and sums of a checkpoint without them: gelu(G) = 1, and each sum the last output."""
    size = config.hidden_size
    for i in range(config.num_hidden_layers):
        if f"layers.{i}.attention_sum.weight" in tensors:
            continue
        weight, bias = (tensors[f"layers.{i}.attention.value_gate.{kind}"] for kind in ("weight", "bias"))
        if weight.shape == (size, size) and bias.shape == (size,):  # another shape is refused by name, later
            tensors[f"layers.{i}.attention.value_gate.weight"] = torch.cat((weight, torch.zeros_like(weight)))
            tensors[f"layers.{i}.attention.value_gate.bias"] = torch.cat((bias, torch.full_like(bias, UNGATED)))
        for number, name in enumerate(("attention_sum", "feed_forward_sum"), start=2 * i + 2):
            last = torch.zeros(number, dtype=weight.dtype)
            last[-1] = 1
            tensors[f"layers.{i}.{name}.weight"] = last


def _check_shapes(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], config: LtgBertConfig | GptBertConfig
) -> None:
    with torch.device("meta"):
        model = LtgBert(config) if isinstance(config, LtgBertConfig) else GptBert(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert set(expected) == set(tensors)
    faults = [
        f"{names.get(name, name)} {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != expected[name]
    ]
    if faults:
        raise InputError(f"state_dict must have the shapes of its layout; got {_listed(faults)}")
    kinds = {str(tensor.dtype) for tensor in tensors.values() if not tensor.is_floating_point()}
    if kinds:
        raise InputError(f"state_dict must hold floating-point parameters; got {', '.join(sorted(kinds))}")


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("model.safetensors", INDEX, "pytorch_model.bin"):
        if (path / name).exists():
            return path / name
    cut = "; its pytorch_model.bin.index.json names parts, which are read as .safetensors alone"
    also = cut if (path / "pytorch_model.bin.index.json").exists() else ""
    raise InputError(f"{path} must hold model.safetensors or pytorch_model.bin; got neither{also}")


def _read_weights(path: Path, *, ema: bool) -> Mapping[str, Any]:
    if path.suffix == ".safetensors" or path.name == INDEX:
        return read_safetensors(path)
    if path.suffix not in (".bin", ".pt", ".pth"):
        raise InputError(f"the file of weights must end in .safetensors, .bin, .pt or .pth; got {path.name}")
    try:
        # LTG-BERT's training state holds the command line, which is a Namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the model's weights must be there") from None
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "see torch.load")
        raise InputError(
            f"{path} must hold tensors and plain values alone, and is not opened otherwise ({reason})"
        ) from None
    except Exception as error:  # what a damaged pickle raises is almost anything
        if isinstance(error, OSError) and error.filename:  # a cut archive's has no file's name
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} is damaged or no file of torch.save ({reason})") from None
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path} must hold a table of tensors; got {type(loaded).__name__}")
    for name in STATES if ema else reversed(STATES):
        if isinstance(loaded.get(name), Mapping):
            return loaded[name]
    return loaded


def _listed(names: Iterable[str], *, most: int = 8) -> str:
    some = list(names)
    more = f" and {len(some) - most} more" if len(some) > most else ""
    return (", ".join(some[:most]) or "none") + more
