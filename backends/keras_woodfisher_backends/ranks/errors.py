"""How an error of one process is told to the others, and what it is there."""

import builtins
from collections.abc import Iterator
from contextlib import suppress


def _kinds() -> Iterator[type[BaseException]]:
    """Python's own errors that a text makes, and that mean nothing to loops and generators."""
    for kind in vars(builtins).values():
        if isinstance(kind, type) and issubclass(kind, (Exception, KeyboardInterrupt)):
            if kind is Exception or issubclass(kind, (StopIteration, StopAsyncIteration, Warning)):
                continue
            with suppress(TypeError):
                kind("")
                yield kind


_KNOWN = {kind.__name__: kind for kind in _kinds()}


def as_text(error: BaseException) -> str:
    r"""An error as the others are told of it: its kind, the nearest one of Python's own, and its message.

    >>> as_text(KeyError("x"))
    'KeyError\nKeyError\nx'
    """
    names = (kind.__name__ for kind in type(error).__mro__ if _KNOWN.get(kind.__name__) is kind)
    try:
        # A KeyError's own text is the repr of its message.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except Exception as unreadable:  # noqa: BLE001 - of a kind of the user's own
        text = f"its message can't be told ({type(unreadable).__name__})"
    return "\n".join([type(error).__name__, next(names, RuntimeError.__name__), text])


def as_elsewhere(text: str, where: str) -> BaseException:
    r"""What is raised where the error didn't occur: the nearest of Python's own errors, or a RuntimeError.

    >>> as_elsewhere("BadBatchError\nValueError\nempty", "Process 1 of 2 failed")
    ValueError('Process 1 of 2 failed: BadBatchError: empty')

    Args:
        text: As `as_text` gave it.
        where: Which process it was.
    """
    kind, known, message = text.split("\n", 2)
    named = "" if known == kind else f"{kind}: "
    return _KNOWN[known](f"{where}: {named}{message or kind}")
