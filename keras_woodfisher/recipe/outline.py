"""What a recipe says, before anyone asks what it means: stages, and modifiers with their fields."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.recipe.entries import Entry, read_entries
from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.plain_tree import plain_tree
from keras_woodfisher.recipe.sections import read_sections
from keras_woodfisher.recipe.source import TEXT, read_source
from keras_woodfisher.recipe.tree import Node
from keras_woodfisher.recipe.yaml_tree import yaml_tree

__all__ = ["Entry", "Outline", "Stage", "read_outline"]


@dataclass(frozen=True)
class Stage:
    """The modifiers of one stage; its name is empty when the recipe isn't staged."""

    name: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Outline:
    """A recipe's stages in their order, and the name of its file (`recipe` for a text or a mapping)."""

    stages: tuple[Stage, ...]
    source: str


def read_outline(
    source: str | os.PathLike[str] | Mapping[str, Any], variables: Mapping[str, Any] | None = None
) -> Outline:
    """Reads a recipe.

    Args:
        source: A path (`.yaml`, `.yml`, `.md`), the text itself, or plain data such as a JSON configuration.
        variables: Values to use instead of the recipe's own variables.

    Raises:
        RecipeError: Whatever is wrong, with the line and field where they are known.
    """
    name = TEXT
    try:
        if isinstance(source, Mapping):
            root: Node | None = plain_tree(source)
        else:
            name, text = read_source(source)
            root = yaml_tree(text)
        sections = read_sections(root, variables)
        stages = tuple(
            Stage(section.name, entries) for section, entries in zip(sections, read_entries(sections), strict=True)
        )
    except RecipeError as error:
        error.source = error.source or name
        raise
    return Outline(stages, name)
