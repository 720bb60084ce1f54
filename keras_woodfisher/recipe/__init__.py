"""Recipes: the YAML files that SparseML users have, read, checked, and run on Keras models."""

from keras_woodfisher.recipe.check import check_recipe
from keras_woodfisher.recipe.check_report import CheckedModifier, Problem, RecipeCheck
from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.recipe import Recipe, load_recipe
from keras_woodfisher.recipe.schema import recipe_schema

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
