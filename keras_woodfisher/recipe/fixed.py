"""Values that can't be changed any more, so that a recipe stays what was checked."""

from collections.abc import Mapping
from typing import Any, NoReturn


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
