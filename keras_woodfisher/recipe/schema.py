"""The JSON Schema of recipes, by which editors complete and check them."""

from typing import Any

from pydantic.json_schema import models_json_schema

from keras_woodfisher.recipe.reading import TAGS

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
    items = [
        {"type": "object", "properties": {tag: kinds[kind, "validation"]}, "required": [tag]}
        | {"additionalProperties": False}
        for tag, kind in TAGS.items()
    ]
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
