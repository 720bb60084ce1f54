"""The processes that there are now, and functions that all of them call."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import keras

from keras_woodfisher_backends import get_backend, is_known
from keras_woodfisher_backends.ranks.ranks import Ranks

_P = ParamSpec("_P")
_T = TypeVar("_T")


def current_ranks() -> Ranks:
    """The processes that train together with this one, as its backend's engine has them now."""
    name = keras.backend.backend()
    transport = get_backend(name).transport() if is_known(name) else None
    if _Known.ranks.transport is not transport:
        _Known.ranks = Ranks(transport)
    return _Known.ranks


class _Known:
    ranks = Ranks()


def jointly(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes a function one that all processes call `together`, and that gives the first one's result to all."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        ranks = current_ranks()
        with ranks.together(function.__name__):
            if ranks.size > 1:
                given = inspect.signature(function).bind(*args, **kwargs)
                given.apply_defaults()
                words = {name: _word(value) for name, value in given.arguments.items() if name not in MAY_DIFFER}
                ranks.check_same_words(words)
            return ranks.same(function(*args, **kwargs))

    return call


MAY_DIFFER = ("verbose", "available_gpus", "memory_limit")
"""Options that processes may have otherwise each."""


def _word(value: Any) -> str:
    """What can be compared of an argument: its value if that is plain, else its kind."""
    if isinstance(value, dict):
        return repr({key: _word(other) for key, other in value.items()})
    if isinstance(value, (list, tuple)):
        return repr([_word(other) for other in value])
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)
    # Of losses and the like; a model's has the numbers of its layers' names.
    config = value.get_config() if isinstance(value, keras.losses.Loss) else ""
    return f"{type(value).__name__}{config}"
