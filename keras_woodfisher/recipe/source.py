"""From a file or a text to the YAML in it."""

import os
import stat
from pathlib import Path
from typing import Any

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.front_matter import yaml_part
from keras_woodfisher.recipe.wording import shown

ENDINGS = (".yaml", ".yml", ".md", ".json")
"""JSON is YAML."""
MOST_BYTES = 256 * 1024
TEXT = "recipe"


def read_source(source: Any) -> tuple[str, str]:
    """The name and the YAML text of a recipe, every line where it was.

    Args:
        source: A path that ends in `.yaml`, `.yml`, `.md` or `.json`, or the text of a recipe.

    Raises:
        RecipeError: If it can't be read, is too large, or is Markdown without front matter.
    """
    if isinstance(source, os.PathLike):
        return _read_file(os.fspath(source))
    if not isinstance(source, str):
        raise RecipeError(f"A recipe is a path, the text itself or a mapping, got {type(source).__name__}.")
    _check_size(len(source))
    if _is_path(source):
        return _read_file(source.strip())
    _check_size(len(source.encode(errors="surrogatepass")))
    return TEXT, yaml_part(_with_one_line_end(source))


def _is_path(source: str) -> bool:
    if set("\n\r\0") & set(source):
        return False
    return source.strip().lower().endswith(ENDINGS) or os.path.isfile(source)


def _read_file(path: str | bytes) -> tuple[str, str]:
    if not isinstance(path, str):
        raise RecipeError(f"A path must be a text, got {type(path).__name__}. Decode it with os.fsdecode.")
    name, ending = Path(path).name, Path(path).suffix.lower()
    try:
        content = _content(path, ending)
        text = _with_one_line_end(_decoded(content))
        # Between the tokens of JSON a tab is a blank; within them there is none.
        return name, yaml_part(text.replace("\t", " ") if ending == ".json" else text, ending)
    except RecipeError as error:
        error.source = name
        raise
    except FileNotFoundError:
        problem = "isn't found. Check the path, which counts from the working directory."
    except (OSError, ValueError) as error:  # a ValueError for a path with a null character
        problem = f"can't be read: {error}."
    raise RecipeError(f"The file {shown(path)} {problem}", source=name)


def _content(path: str, ending: str) -> bytes:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        # A pipe or device might never end.
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise RecipeError(f"A recipe must be a file, but {shown(path)} is {kind}.")
    if ending not in ENDINGS:
        raise RecipeError(f"A recipe's file ends in {', '.join(ENDINGS)}, got {shown(path)}. Rename it.")
    with open(path, "rb") as file:
        _check_size(os.fstat(file.fileno()).st_size)
        content = file.read(MOST_BYTES + 1)
    _check_size(len(content))
    return content


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The file isn't UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.",
            line=content.count(b"\n", 0, error.start) + 1,
        ) from None


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise RecipeError(
            f"A recipe may have up to {MOST_BYTES} bytes, got {size}. Recipes have a few thousand: is this the right "
            "file?"
        )


def _with_one_line_end(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
