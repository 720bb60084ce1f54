"""Compiled functions that outlive a call, so that the same work on the same model is compiled once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

_MOST = 8
"""Compiled functions that are kept of one model; the one that wasn't used for longest goes."""

_kept: WeakKeyDictionary[Any, OrderedDict[Hashable, "Trace"]] = WeakKeyDictionary()


class Trace:
    """A compiled function that holds none of what it was traced of: it is lent that for each call.

    So it may be kept beside a model without keeping the model.

    Args:
        compiled: Compiles a function.
    """

    def __init__(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self._lent: Callable[..., Any] | None = None
        self._run = compiled(self._traced)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives; it is called only where there is something to trace."""
        before, self._lent = self._lent, function
        try:
            return self._run(*args)
        finally:
            self._lent = before

    def _traced(self, *args: Any) -> Any:
        assert self._lent is not None
        return self._lent(*args)


def trace_of(model: Any, key: Hashable, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Trace:
    """The compiled function of a model under a key, the same one for equal keys as long as the model lives.

    Args:
        model: What is kept goes with it.
        key: All that the function depends on beside its arguments.
        compiled: Compiles a function, where there is none.
    """
    known = _kept.setdefault(model, OrderedDict())
    if key not in known:
        known[key] = Trace(compiled)
        while len(known) > _MOST:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]
