"""The kinds of values that fields of modifiers hold, in every form that recipes write them in."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from keras_woodfisher.checks import by_number
from keras_woodfisher.recipe.fixed import fixed
from keras_woodfisher.recipe.patterns import checked_pattern
from keras_woodfisher.targets import ALL, ALL_PRUNABLE

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
