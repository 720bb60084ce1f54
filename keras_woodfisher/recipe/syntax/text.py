"""From a file or a text to the YAML in it, which in Markdown is the front matter."""

import os
import re
import stat
from pathlib import Path
from typing import Any

from keras_woodfisher.recipe.syntax.errors import RecipeError, short_repr

ENDINGS = (".yaml", ".yml", ".md", ".json")
"""JSON is YAML."""
MOST_BYTES = 256 * 1024
TEXT = "recipe"
DELIMITER = "---"
MARKDOWN = ".md"


def read_source(source: Any) -> tuple[str, str]:
    """The name and the YAML text of a recipe (a path with one of the `ENDINGS`, or a text), every line where it was."""
    if isinstance(source, os.PathLike):
        return _read_file(os.fspath(source))
    if not isinstance(source, str):
        raise RecipeError(f"A recipe is a path, the text itself or a mapping, got {type(source).__name__}.")
    _check_size(len(source))
    if not set("\n\r\0") & set(source) and (source.strip().lower().endswith(ENDINGS) or os.path.isfile(source)):
        return _read_file(source.strip())
    _check_size(len(source.encode(errors="surrogatepass")))
    return TEXT, yaml_part(_with_one_line_end(source))


def _read_file(path: str | bytes) -> tuple[str, str]:
    if not isinstance(path, str):
        raise RecipeError(f"A path must be a text, got {type(path).__name__}. Decode it with os.fsdecode.")
    name, ending = Path(path).name, Path(path).suffix.lower()
    try:
        text = _with_one_line_end(_content(path, ending).decode())
        # Between the tokens of JSON a tab is a blank; within them there is none.
        return name, yaml_part(text.replace("\t", " ") if ending == ".json" else text, ending)
    except RecipeError as error:
        error.source = name
        raise
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The file isn't UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.",
            line=error.object.count(b"\n", 0, error.start) + 1,
            source=name,
        ) from None
    except FileNotFoundError:
        problem = "isn't found. Check the path, which counts from the working directory."
    except (OSError, ValueError) as error:  # a ValueError for a path with a null character
        problem = f"can't be read: {error}."
    raise RecipeError(f"The file {short_repr(path)} {problem}", source=name)


def _content(path: str, ending: str) -> bytes:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        # A pipe or device might never end.
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise RecipeError(f"A recipe must be a file, but {short_repr(path)} is {kind}.")
    if ending not in ENDINGS:
        raise RecipeError(f"A recipe's file ends in {', '.join(ENDINGS)}, got {short_repr(path)}. Rename it.")
    with open(path, "rb") as file:
        _check_size(os.fstat(file.fileno()).st_size)
        content = file.read(MOST_BYTES + 1)
    _check_size(len(content))
    return content


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise RecipeError(
            f"A recipe may have up to {MOST_BYTES} bytes, got {size}. Recipes have a few thousand: is this the right "
            "file?"
        )


def _with_one_line_end(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def yaml_part(text: str, ending: str | None = None) -> str:
    r"""The YAML of a text: its front matter where it has some, the whole otherwise.

    What stands before the front matter is left as empty lines, so that line numbers are the file's own. Markdown (by
    `ending`) must have front matter, after which no modifier may stand; after that of YAML nothing may follow.
    """
    lines = text.split("\n")
    first = _first_line_of_content(lines)
    opened = first is not None and lines[first].rstrip() == DELIMITER
    start = 0 if first is None else first + 1
    end = next((i for i in range(start, len(lines)) if opened and lines[i].rstrip() == DELIMITER), None)
    if end is not None and (ending in (None, MARKDOWN) or _first_line_of_content(lines[end + 1 :]) is None):
        _refuse_second_recipe(lines, end + 1)
        return "\n".join([""] * start + lines[start:end] + [""])
    if ending == MARKDOWN:
        found = "it is empty" if first is None else f"it begins with {short_repr(lines[first].strip())}"
        found = "its front matter isn't closed" if opened else found
        raise RecipeError(
            f"A Markdown recipe has its YAML between two lines that are exactly {DELIMITER!r}, but {found}. "
            "Only comments may stand before the first.",
            line=(first or 0) + 1,
        )
    return text


def _first_line_of_content(lines: list[str]) -> int | None:
    """The first line that isn't empty, a `#` comment or within an HTML comment."""
    within = False
    for index, line in enumerate(lines):
        stripped = line.strip()
        if within or stripped.startswith("<!--"):
            within = "-->" not in stripped
            if within or stripped.endswith("-->"):
                continue
            return index
        if stripped and not stripped.startswith("#"):
            return index
    return None


_RECIPE_LINE = re.compile(r" {0,3}([\"']?\w*modifiers\w*[\"']?\s*:\s*([\[{&!#].*)?|-\s+!\w+Modifier\b.*)")
"""A group, whatever its list looks like, or an item of one; four spaces make it a code block."""


def _refuse_second_recipe(lines: list[str], start: int) -> None:
    """Refuses modifiers after the front matter, which would be lost in silence. Code blocks are Markdown's."""
    fenced = False
    for index in range(start, len(lines)):
        fenced ^= lines[index].lstrip().startswith(("```", "~~~"))
        if not fenced and _RECIPE_LINE.fullmatch(lines[index]):
            raise RecipeError(
                f"{short_repr(lines[index].strip())} stands after the line {DELIMITER!r} that ends the recipe. Move it "
                "before that line, or into a code block if it is an example.",
                line=index + 1,
            )
