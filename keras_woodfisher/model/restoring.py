"""All or nothing: variables that get their values back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from keras import ops


@contextmanager
def restored_on_failure(variables: Iterable[Any]) -> Iterator[None]:
    """Puts variables back as they were if the work within fails or is interrupted."""
    before = _values(variables)
    try:
        yield
    except BaseException:
        _assign(before)
        raise


@contextmanager
def restored(variables: Iterable[Any]) -> Iterator[None]:
    """Puts variables back as they were in any case."""
    before = _values(variables)
    try:
        yield
    finally:
        _assign(before)


def _values(variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    return [(variable, ops.copy(variable)) for variable in variables]


def _assign(values: list[tuple[Any, Any]]) -> None:
    for variable, value in values:
        variable.assign(value)
