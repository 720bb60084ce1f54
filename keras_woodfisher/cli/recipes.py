"""What the commands have in common that read recipes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras_woodfisher as kw


def read_recipe(path: str, variables: Sequence[tuple[str, str]] | None) -> Any:
    """Loads a recipe file.

    Args:
        path: The file.
        variables: Names and texts of `--var`; a text that is JSON (a number, true, a list) counts as that.

    Raises:
        FileNotFoundError: If there is no such file (a text that names none would count as the recipe itself).
        RecipeError: If the recipe is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no recipe file {path}.")
    return kw.load_recipe(path, variables={name: _value(text) for name, text in variables or ()} or None)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
