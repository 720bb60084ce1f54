"""The kinds of values that fields of modifiers hold, in every form that recipes write them in."""

import math
import re
from collections.abc import Mapping
from re import _parser  # type: ignore[attr-defined]  # what `re` itself parses with
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, create_model

from keras_woodfisher.model.targets import ALL, ALL_PRUNABLE
from keras_woodfisher.options import kinds
from keras_woodfisher.options.checks import PATTERN, by_number
from keras_woodfisher.options.option import RECIPE, Option
from keras_woodfisher.options.pruning_options import BLOCK_SIZE, DAMP, GRADIENTS
from keras_woodfisher.options.table import in_group


class Fixed(dict[Any, Any]):
    """A dictionary that refuses changes, and can be hashed."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("A recipe can't be changed. Load it again with other values.")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Fixed, (dict(self),)


def fixed(value: Any) -> Any:
    """The same value as tuples and `Fixed` dictionaries, whatever is nested in it."""
    if isinstance(value, Mapping):
        return Fixed({key: fixed(item) for key, item in value.items()})
    return tuple(map(fixed, value)) if isinstance(value, (list, tuple)) else value


MOST_REPEATS = 5
"""So many parts of a pattern may be of varying length; each multiplies the time by about the length of a name."""


_NAME = 64
"""Characters of a long name."""


_CHOICE = math.log(2.0, _NAME)
"""A choice between two, as a part of a part of varying length."""


def checked_pattern(item: str) -> str:
    """A name, or a pattern that can't take long on any name.

    A pattern that doesn't match is tried in every way that its parts may share the name. Repetitions within a
    repetition make those ways exponential in the length of the name (`(.+)+`), and several after each other a power
    of it.

    Raises:
        ValueError: If it could take long, or isn't a regular expression.
    """
    if not item.startswith(PATTERN):
        return item
    try:
        repeats = _repeats(_parser.parse(item.removeprefix(PATTERN)))
    except re.error as error:
        raise ValueError(f"The pattern {item[:60]!r} isn't a regular expression: {error}.") from None
    except (RecursionError, OverflowError):
        repeats = math.inf
    if repeats > MOST_REPEATS:
        raise ValueError(
            f"The pattern {item[:60]!r} could take very long: repetitions (*, +, {{n,}}) must not contain repetitions "
            f"or alternatives, and there may be {MOST_REPEATS} of them. Write it with fewer, or list the names."
        )
    return item


def _repeats(parsed: Any) -> float:
    """Parts of varying length, what is repeated as often as a name has room for it; alternatives count a little."""
    found = 0.0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            times = min(int(most), _NAME // max(1, body.getwidth()[0]))
            found += min(1.0, _CHOICE * (int(most) - least)) + times * _repeats(body)
        elif name == "BRANCH":
            branches = argument[1]
            found += math.log(max(1, len(branches)), _NAME) + max(map(_repeats, branches), default=0.0)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP", "GROUPREF_EXISTS"):
            parts = argument if isinstance(argument, tuple) else (argument,)
            found += sum(_repeats(part) for part in parts if isinstance(part, _parser.SubPattern))
    return found


_LARGEST_WHOLE = 2.0**53
"""Beyond it floats aren't exact."""


_COUNTS = ("step_size", "milestones", "T_0", "T_mult")
"""Arguments of schedules that are whole numbers, or lists of them."""


def whole(value: Any) -> Any:
    """A whole number that arithmetic made a float."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_WHOLE else value


def whole_counts(value: Any) -> Any:
    """`lr_kwargs` with whole numbers where they belong."""
    if not isinstance(value, Mapping):
        return value
    counts = {name: value[name] for name in _COUNTS if name in value}
    made = {n: [whole(item) for item in v] if isinstance(v, (list, tuple)) else whole(v) for n, v in counts.items()}
    return {**value, **made}


def listed(value: Any) -> Any:
    """A tuple of a list, or of a single name."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def numbered(value: Any) -> Any:
    """A mapping with numbers as keys, which JSON writes as strings."""
    return by_number(value) if isinstance(value, Mapping) else value


def token(value: Any) -> Any:
    """`__ALL__` and `__ALL_PRUNABLE__` in either case, alone or as the only item of a list."""
    alone = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if isinstance(alone, str) and alone.upper() in (ALL, ALL_PRUNABLE):
        return alone.upper()
    return listed(value)


def everything_logged(value: Any) -> Any:
    """None for what asks for no more than every logger of `fit` gets anyway."""
    if token(value) in (None, ALL, ()):
        return None
    raise ValueError(
        "must be __ALL__ or be left out: what is logged goes to `logs`, where every callback of fit finds it"
    )


def off(value: Any) -> Any:
    """None for what is switched off."""
    if value is None or value is False:
        return None
    raise ValueError("must be false or be left out: the rate is logged at the end of each epoch, as Keras does")


def unphased(value: Any) -> Any:
    """None for pruning without phases."""
    if value is None or value is False:
        return None
    raise ValueError("must be false or be left out: phases, in which pruned weights grow back, aren't there")


def pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def bounded(value: Any) -> Any:
    """The names, if no pattern among them could take long to match."""
    for item in (value,) if isinstance(value, str) else value:
        checked_pattern(item)
    return value


Whole = Annotated[int, BeforeValidator(whole)]


Names = Annotated[
    tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), AfterValidator(bounded)
]


Params = Annotated[
    str | tuple[str, ...], BeforeValidator(token, json_schema_input_type=str | list[str]), AfterValidator(bounded)
]


Gradients = Annotated[Whole | dict[float, Whole], BeforeValidator(numbered), AfterValidator(fixed)]


Sparsities = Annotated[float | dict[float, Names], BeforeValidator(numbered), AfterValidator(fixed)]


Sampler = Annotated[dict[Literal["batch_size"], Whole], AfterValidator(fixed)]


Settings = Annotated[dict[str, Any], BeforeValidator(whole_counts), AfterValidator(fixed)]


LAST_POSITION = 1e6


Position = Annotated[float, Field(le=LAST_POSITION, description="In epochs, fractions allowed.")]


LogTypes = Annotated[None, BeforeValidator(everything_logged, json_schema_input_type=str | list[str] | None)]


Off = Annotated[None, BeforeValidator(off, json_schema_input_type=Literal[False] | None)]


Unphased = Annotated[None, BeforeValidator(unphased, json_schema_input_type=Literal[False] | None)]


Mask = Annotated[str | tuple[Whole, Whole], BeforeValidator(pair)]


_OF_KIND: dict[kinds.Kind, Any] = {
    kinds.COUNT: Whole,
    kinds.COUNT_OR_ZERO: Whole,
    kinds.DEVICE: str,
    kinds.EPOCHS: Position,
    kinds.FINAL_SPARSITY: Sparsities,
    kinds.FLAG: bool,
    kinds.INIT_SPARSITY: float | Literal["__FROM_PARAM__"],
    kinds.MASK: Mask,
    kinds.NAMES: Names,
    kinds.PARAMS: Params,
    kinds.SIZE: Whole | str,
    BLOCK_SIZE: Whole,
    DAMP: float | Literal["auto"],
    GRADIENTS: Gradients,
}
"""How recipes write each kind of values."""


def _field_of(row: Option, **changed: Any) -> Any:
    """The type and the field of an option; `changed` are other arguments of `Field`."""
    choices = row.choices_in(RECIPE)
    held = Literal[choices] if choices else _OF_KIND[row.kind]
    default = row.default_in(RECIPE)
    none = row.takes_none or default is None
    return held | None if none else held, Field(**{"default": default, "description": row.sentence} | changed)


def with_options(group: str, *bases: type[BaseModel]) -> Any:
    """A model with the fields of `bases` and those of a group of options."""
    return create_model(group, __base__=bases, **{row.name: _field_of(row) for row in in_group(group)})


def with_defaults(group: str, base: type[BaseModel], **defaults: Any) -> Any:
    """A model in which some options of a group have other defaults."""
    rows = [row for row in in_group(group) if row.name in defaults]
    return create_model(group, __base__=base, **{row.name: _field_of(row, default=defaults[row.name]) for row in rows})
