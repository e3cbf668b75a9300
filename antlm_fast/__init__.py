"""antlm_fast: one transformer trained under causal and masked language modelling; switching costs a flag.

Names are loaded when they are first used, so importing the package loads neither torch nor any optional package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antlm_fast import models
    from antlm_fast.kernels.attention import attention, attention_varlen
    from antlm_fast.kernels.disentangled_attention import disentangled_attention, disentangled_attention_varlen
    from antlm_fast.kernels.dispatch import UnsupportedError
    from antlm_fast.kernels.linear_cross_entropy import compact_labelled, linear_cross_entropy
    from antlm_fast.pipeline import train
    from antlm_fast.recipes import get_recipe
    from antlm_fast.schedule import Schedule
    from antlm_fast.types import InputError, Objective, PackedBatch

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Objective",
    "PackedBatch",
    "Schedule",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "compact_labelled",
    "disentangled_attention",
    "disentangled_attention_varlen",
    "get_recipe",
    "linear_cross_entropy",
    "models",
    "train",
]

_HOMES = {
    "attention": "kernels.attention",
    "attention_varlen": "kernels.attention",
    "compact_labelled": "kernels.linear_cross_entropy",
    "disentangled_attention": "kernels.disentangled_attention",
    "disentangled_attention_varlen": "kernels.disentangled_attention",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "UnsupportedError": "kernels.dispatch",
    "Schedule": "schedule",
    "InputError": "types",
    "Objective": "types",
    "PackedBatch": "types",
    "get_recipe": "recipes",
    "train": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module("antlm_fast.models")
    if name in _HOMES:
        value = getattr(import_module(f"antlm_fast.{_HOMES[name]}"), name)
        globals()[name] = value  # found once
        return value
    raise AttributeError(f"module 'antlm_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
