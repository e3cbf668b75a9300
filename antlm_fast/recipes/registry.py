"""Recipes by name, as the command line knows them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from antlm_fast.recipes.baby_llama import antlm_babyllama, antlm_babyllama_8_8_8, babyllama, babyllama_mlm
from antlm_fast.recipes.demo import demo
from antlm_fast.training.config import TrainConfig
from antlm_fast.types import InputError

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "babyllama": babyllama,
    "babyllama-mlm": babyllama_mlm,
    "antlm-babyllama": antlm_babyllama,
    "antlm-babyllama-8-8-8": antlm_babyllama_8_8_8,
}


def get_recipe(name: str) -> TrainConfig:
    """The recipe's config.

    Raises:
        InputError: there is no recipe of that name; the message lists the nearest, or all.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3) or list(RECIPES)
        raise InputError(f"recipe must be a known name; got {name!r}, the nearest are {', '.join(near)}")
    return RECIPES[name]()
