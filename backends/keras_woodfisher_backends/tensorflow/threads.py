"""TensorFlow: one thread at a time begins operations.

On TensorFlow 2.21, threads that hand numbers of the host (shapes, for one) to operations on another device than the
host's first one now and then get each other's, mostly without an error, or wait for each other forever.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

ONE_AT_A_TIME = threading.RLock()
"""Held while operations begin. A GPU goes on with them when it is given back."""


Arguments = ParamSpec("Arguments")


Result = TypeVar("Result")


def one_at_a_time(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that only one thread is in. It should return tensors: waiting for their numbers is for afterwards."""

    @wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Result:
        with ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return alone
