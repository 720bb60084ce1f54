"""The canonical form of a recipe: YAML that JSON-minded editors can check, with no tags and one key a modifier."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from keras_woodfisher.options.checks import as_json
from keras_woodfisher.recipe.modifiers.pruning import Modifier
from keras_woodfisher.recipe.modifiers.validation import TAGS


def canonical_text(modifiers: Sequence[Modifier]) -> str:
    """The text of a recipe; what has its default value is left out."""
    lines = ["modifiers:"]
    for modifier in modifiers:
        fields = changed_fields(modifier)
        lines.append(f"  - {modifier.tag}:" + ("" if fields else " {}"))
        lines += [line for name, value in fields.items() for line in _lines_of(name, value)]
    return "\n".join(lines) + "\n"


def changed_fields(modifier: Modifier) -> dict[str, Any]:
    """The fields that aren't at their default, as plain data."""
    return {
        name: as_json(getattr(modifier, name))
        for name, field in type(modifier).model_fields.items()
        if field.is_required() or getattr(modifier, name) != field.default
    }


def _lines_of(name: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping) or not value:
        return [f"      {name}: {_inline(value)}"]
    return [f"      {name}:", *(f"        {_inline(key)}: {_inline(item)}" for key, item in value.items())]


def _inline(value: Any) -> str:
    """JSON is YAML 1.2, whose floats may lack a point as `1e-05` does."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return json.dumps(value)


_EXPRESSION = {"type": "string", "pattern": r"^eval\(.*\)$"}
_SCALARS = ["string", "number", "boolean", "null", "array"]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe that writes modifiers as mappings, `- Tag: {...}`.

    That is the form of `Recipe.save`, `Recipe.as_dict` and JSON configurations; a schema can't see YAML's tags. Any
    value may be an `eval(...)`. What spans several fields is checked by `load_recipe` only.

        >>> recipe_schema()["$schema"]
        'https://json-schema.org/draft/2020-12/schema'
    """
    kinds, collected = models_json_schema(
        [(kind, "validation") for kind in TAGS.values()], ref_template="#/$defs/{model}"
    )
    definitions = collected["$defs"]
    for definition in definitions.values():
        properties = definition.get("properties", {})
        definition["properties"] = {name: _or_expression(field) for name, field in properties.items()}
    closed = {"type": "object", "additionalProperties": False}
    items = [closed | {"properties": {tag: kinds[kind, "validation"]}, "required": [tag]} for tag, kind in TAGS.items()]
    group = {"type": ["array", "null"], "items": {"anyOf": items}}
    stage = {"type": "object", "patternProperties": {"modifiers": group}, "additionalProperties": {"type": _SCALARS}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A keras_woodfisher recipe",
        "description": "Groups of modifiers, variables, or stages of them.",
        "type": "object",
        "patternProperties": {"modifiers": group},
        "additionalProperties": {"anyOf": [{"type": _SCALARS}, stage]},
        "$defs": definitions,
    }


def _or_expression(field: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {key: field[key] for key in ("title", "description", "default") if key in field}
    rest = {key: value for key, value in field.items() if key not in kept}
    return kept if not rest else kept | {"anyOf": [rest, _EXPRESSION]}
