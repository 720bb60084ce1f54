"""Front matter: the YAML of a recipe that is Markdown, every line where it was."""

import re

from keras_woodfisher.recipe.errors import RecipeError
from keras_woodfisher.recipe.wording import shown

DELIMITER = "---"
MARKDOWN = ".md"
_RECIPE_LINE = re.compile(r" {0,3}([\"']?\w*modifiers\w*[\"']?\s*:\s*([\[{&!#].*)?|-\s+!\w+Modifier\b.*)")
"""A group, whatever its list looks like, or an item of one; four spaces make it a code block."""


def yaml_part(text: str, ending: str | None = None) -> str:
    r"""The YAML of a text: its front matter where it has some, the whole otherwise.

    What stands before the front matter is left as empty lines, so that line numbers are the file's own.

    Args:
        text: The text, with line ends `\n`.
        ending: The file's ending, if it is a file. Markdown must have front matter; after YAML's, nothing may follow.

    Raises:
        RecipeError: If Markdown has no front matter, or modifiers stand after it.
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
        raise RecipeError(_no_front_matter(lines, first, opened), line=(first or 0) + 1)
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


def _refuse_second_recipe(lines: list[str], start: int) -> None:
    """Refuses modifiers after the front matter, which would be lost in silence. Code blocks are Markdown's."""
    fenced = False
    for index in range(start, len(lines)):
        fenced ^= lines[index].lstrip().startswith(("```", "~~~"))
        if not fenced and _RECIPE_LINE.fullmatch(lines[index]):
            raise RecipeError(
                f"{shown(lines[index].strip())} stands after the line {DELIMITER!r} that ends the recipe. Move it "
                "before that line, or into a code block if it is an example.",
                line=index + 1,
            )


def _no_front_matter(lines: list[str], first: int | None, opened: bool) -> str:
    if opened:
        found = "its front matter isn't closed"
    else:
        found = "it is empty" if first is None else f"it begins with {shown(lines[first].strip())}"
    return (
        f"A Markdown recipe has its YAML between two lines that are exactly {DELIMITER!r}, but {found}. "
        "Only comments may stand before the first."
    )
