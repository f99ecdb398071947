"""Recipes: an experiment in one YAML file, read into checked dataclasses and changed by `key=value`."""

from .load import load_recipe
from .schema import Recipe, TaskRecipe

__all__ = ["Recipe", "TaskRecipe", "load_recipe"]
