"""Recipes: the YAML files that SparseML users have, read, checked, and run on Keras models."""

from keras_woodfisher.recipe.dry_run.check import check_recipe
from keras_woodfisher.recipe.dry_run.report import CheckedModifier, Problem, RecipeCheck
from keras_woodfisher.recipe.modifiers.writing import recipe_schema
from keras_woodfisher.recipe.recipe import Recipe, load_recipe
from keras_woodfisher.recipe.syntax.errors import RecipeError

__all__ = [
    "CheckedModifier",
    "Problem",
    "Recipe",
    "RecipeCheck",
    "RecipeError",
    "check_recipe",
    "load_recipe",
    "recipe_schema",
]
