"""The canonical form of a recipe: YAML that JSON-minded editors can check, with no tags and one key a modifier."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from keras_woodfisher.recipe.modifiers import Modifier


def canonical(modifiers: Sequence[Modifier]) -> str:
    """The text of a recipe; what has its default value is left out."""
    lines = ["modifiers:"]
    for modifier in modifiers:
        fields = plain_fields(modifier)
        lines.append(f"  - {modifier.tag}:" + ("" if fields else " {}"))
        lines += [line for name, value in fields.items() for line in _field(name, value)]
    return "\n".join(lines) + "\n"


def plain_fields(modifier: Modifier) -> dict[str, Any]:
    """The fields that aren't at their default, as plain data."""
    return {
        name: _plain(getattr(modifier, name))
        for name, field in type(modifier).model_fields.items()
        if field.is_required() or getattr(modifier, name) != field.default
    }


def _field(name: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping) or not value:
        return [f"      {name}: {_inline(value)}"]
    return [f"      {name}:", *(f"        {_inline(key)}: {_inline(item)}" for key, item in value.items())]


def _inline(value: Any) -> str:
    """JSON is YAML 1.2, whose floats may lack a point as `1e-05` does."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
