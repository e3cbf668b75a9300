"""Recipes: functions that return a TrainConfig; the source of each number stands on its line."""

from antlm_fast.recipes.registry import RECIPES, get_recipe

__all__ = ["RECIPES", "get_recipe"]
