"""All or nothing: variables that get their values back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from keras import ops


@contextmanager
def restored(variables: Iterable[Any], only_on_failure: bool = False) -> Iterator[None]:
    """Puts variables back as they were, in any case or only if the work within fails or is interrupted."""
    before = [(variable, ops.copy(variable)) for variable in variables]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or not only_on_failure:
            for variable, value in before:
                variable.assign(value)
