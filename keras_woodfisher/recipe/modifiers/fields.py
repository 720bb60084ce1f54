"""The kinds of values that fields of modifiers hold, in every form that recipes write them in."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, create_model

from keras_woodfisher.model.targets import ALL, ALL_PRUNABLE
from keras_woodfisher.options import kinds
from keras_woodfisher.options.checks import by_number
from keras_woodfisher.options.option import RECIPE, Option
from keras_woodfisher.options.patterns import check_pattern
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


LAST_POSITION = 1e6
_LARGEST_WHOLE = 2.0**53
"""Beyond it floats aren't exact."""
_COUNTS = ("step_size", "milestones", "T_0", "T_mult")
"""Arguments of schedules that are whole numbers, or lists of them."""


def as_whole(value: Any) -> Any:
    """A whole number that arithmetic made a float."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_WHOLE else value


def with_whole_counts(value: Any) -> Any:
    """`lr_kwargs` with whole numbers where they belong."""
    if not isinstance(value, Mapping):
        return value
    counts = {name: value[name] for name in _COUNTS if name in value}
    whole = {n: [*map(as_whole, v)] if isinstance(v, (list, tuple)) else as_whole(v) for n, v in counts.items()}
    return {**value, **whole}


def with_number_keys(value: Any) -> Any:
    """A mapping with numbers as keys, which JSON writes as strings."""
    return by_number(value) if isinstance(value, Mapping) else value


def as_pair(value: Any) -> Any:
    """A tuple of a list."""
    return tuple(value) if isinstance(value, list) else value


def as_names(value: Any) -> Any:
    """A tuple of a list, or of a single name."""
    return (value,) if isinstance(value, str) else as_pair(value)


def as_params(value: Any) -> Any:
    """Names, which may be `__ALL__` and `__ALL_PRUNABLE__` in either case; one of these alone isn't a list."""
    alone = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    if isinstance(alone, str) and alone.upper() in (ALL, ALL_PRUNABLE):
        return alone.upper()
    return as_names(value)


def check_patterns(value: Any) -> Any:
    """The names, if every pattern among them is valid."""
    for item in (value,) if isinstance(value, str) else value:
        check_pattern(item)
        if re.fullmatch("__.*__", item) and item.upper() not in (ALL, ALL_PRUNABLE):
            raise ValueError(f"must be {ALL} or {ALL_PRUNABLE}, the only keywords: {item!r} is none")
    return value


def all_logged(value: Any) -> Any:
    """None for what asks for no more than every logger of `fit` gets anyway."""
    if as_params(value) in (None, ALL, ()):
        return None
    raise ValueError(
        "must be __ALL__ or be left out: what is logged goes to `logs`, where every callback of fit finds it"
    )


def switched_off(reason: str) -> BeforeValidator:
    """None for false; whatever else is refused with a reason."""

    def check(value: Any) -> Any:
        if value is None or value is False:
            return None
        raise ValueError(f"must be false or be left out: {reason}")

    return BeforeValidator(check, json_schema_input_type=Literal[False] | None)


Whole = Annotated[int, BeforeValidator(as_whole)]
_Listed = str | list[str]
_Checked = AfterValidator(check_patterns)
Names = Annotated[tuple[str, ...], BeforeValidator(as_names, json_schema_input_type=_Listed), _Checked]
Params = Annotated[str | tuple[str, ...], BeforeValidator(as_params, json_schema_input_type=_Listed), _Checked]
Gradients = Annotated[Whole | dict[float, Whole], BeforeValidator(with_number_keys), AfterValidator(fixed)]
Sparsities = Annotated[float | dict[float, Names], BeforeValidator(with_number_keys), AfterValidator(fixed)]
Sampler = Annotated[dict[Literal["batch_size"], Whole], AfterValidator(fixed)]
Settings = Annotated[dict[str, Any], BeforeValidator(with_whole_counts), AfterValidator(fixed)]
Position = Annotated[float, Field(le=LAST_POSITION, description="In epochs, fractions allowed.")]
LogTypes = Annotated[None, BeforeValidator(all_logged, json_schema_input_type=_Listed | None)]
Off = Annotated[None, switched_off("the rate is logged at the end of each epoch, as Keras does")]
Unphased = Annotated[None, switched_off("phases, in which pruned weights grow back, aren't there")]
Mask = Annotated[str | tuple[Whole, Whole], BeforeValidator(as_pair)]

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


def _field_of(row: Option, default: Any) -> Any:
    """The type and the field of an option."""
    choices = row.choices_in(RECIPE)
    held = Literal[choices] if choices else _OF_KIND[row.kind]
    return held | None if row.takes_none or default is None else held, Field(default, description=row.sentence)


def with_options(group: str, *bases: type[BaseModel], **defaults: Any) -> Any:
    """A model with the fields of `bases`, and those of a group of options; with other `defaults`, only these ones."""
    rows = [row for row in in_group(group) if not defaults or row.name in defaults]
    held = {row.name: _field_of(row, defaults.get(row.name, row.default_in(RECIPE))) for row in rows}
    return create_model(group, __base__=bases, **held)
