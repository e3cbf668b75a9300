"""Recipes by name, as the command line knows them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from antlm_fast.recipes.baby_llama import antlm_babyllama, antlm_babyllama_8_8_8, babyllama, babyllama_mlm
from antlm_fast.recipes.demo import demo
from antlm_fast.recipes.gpt_bert import antlm_gptbert, demo_gptbert, gptbert
from antlm_fast.recipes.ltg_bert import antlm_ltgbert, antlm_ltgbert_xs, demo_ltgbert, ltgbert, ltgbert_clm
from antlm_fast.training.config import TrainConfig
from antlm_fast.types import InputError

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-ltgbert": demo_ltgbert,
    "demo-gptbert": demo_gptbert,
    "babyllama": babyllama,
    "babyllama-mlm": babyllama_mlm,
    "antlm-babyllama": antlm_babyllama,
    "antlm-babyllama-8-8-8": antlm_babyllama_8_8_8,
    "ltgbert": ltgbert,
    "ltgbert-clm": ltgbert_clm,
    "antlm-ltgbert": antlm_ltgbert,
    "antlm-ltgbert-xs": antlm_ltgbert_xs,
    "gptbert": gptbert,
    "antlm-gptbert": antlm_gptbert,
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
