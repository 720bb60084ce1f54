"""Where the command begins: reads the arguments, chooses the backend, and only then imports Keras.

Keras reads KERAS_BACKEND once, while it is imported. Help and wrong usage need no Keras, and answer at once.
"""

import os
import re
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from typing import Any

from keras_woodfisher.cli.answer import Answer
from keras_woodfisher.cli.arguments import BACKENDS, parse
from keras_woodfisher.reports.report import json_text

FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141
"""The last two as shells have them of a process that a signal ended: SIGINT, SIGPIPE."""

# Their messages say what to do; of any other error the name of its class is worth knowing.
_EXPLAINED = (ValueError, TypeError, KeyError, OSError, MemoryError, FloatingPointError, RuntimeError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 (the work failed, or `check` found problems), 130 (interrupted) or 141 (the work was done,
        and nobody reads the answer any more).

    Raises:
        SystemExit: With code 2 if the arguments are wrong.
    """
    args = parse(argv)
    if "keras" not in sys.modules:
        if getattr(args, "backend", None):
            os.environ["KERAS_BACKEND"] = args.backend
        # TensorFlow's start would bury a message of one line; a setting of the user's own goes first.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _progress_somewhere():
        return _answered(args)


def _answered(args: Namespace) -> int:
    try:
        with redirect_stdout(sys.stderr), _short_warnings():
            answer = _run(args)
        return _told(json_text(answer.data) if args.json else answer.text, answer.code)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the outermost place: whatever it is, the user gets one line
        if args.debug:
            traceback.print_exc()
        _say(f"error: {_one_line(error)}")
        return FAILED


def _told(text: str, code: int) -> int:
    """Writes an answer to standard output, where there is one; the exit code, by what becomes of it."""
    if sys.stdout is None:
        return code
    try:
        _write(sys.stdout, text)
        sys.stdout.flush()
    except OSError as error:
        # What is left of the answer would be written once more when Python ends.
        with suppress(OSError), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        _say(f"error: the work is done, but standard output can't be written: {error.strerror or error}")
        return FAILED
    return code


@contextmanager
def _progress_somewhere() -> Iterator[None]:
    """Lets progress and warnings go nowhere if standard error is closed: Keras writes without looking."""
    with ExitStack() as stack:
        if sys.stderr is None:
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def _run(args: Namespace) -> Answer:
    import keras

    wanted, running = getattr(args, "backend", None), keras.backend.backend()
    if wanted not in (None, running):
        raise RuntimeError(
            f"--backend {wanted} comes too late: Keras runs on {running} in this process. "
            f"Start the command keras-woodfisher, or set KERAS_BACKEND={wanted}."
        )
    answer: Answer = import_module(f"keras_woodfisher.cli.{args.command}").run(args)
    return answer


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows warnings meant for the user in one line, without the place in the source."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def short(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if category is UserWarning:
                _say(f"warning: {' '.join(str(message).split())}")
            else:
                show(message, category, *place, **more)

        warnings.showwarning = short
        yield


def _one_line(error: Exception) -> str:
    missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if missing in BACKENDS:
        return f"Keras's backend is {missing}, which isn't installed: pip install 'keras-woodfisher[{missing}]'."
    # The text of a KeyError is its argument in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(_own_words(text).split())
    return text if text and isinstance(error, _EXPLAINED) else f"{type(error).__name__}: {text}"


def _own_words(text: str) -> str:
    """An error's text without what Keras puts around one that comes up within a layer's call, and without colours."""
    inner = re.search(r"Exception encountered when calling .*?\n\n(.*?)\n\nArguments received by ", text, re.DOTALL)
    return re.sub(r"\x1b\[[0-9;]*m", "", inner[1] if inner else text)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        _write(sys.stderr, f"keras-woodfisher: {text}")


def _write(stream: Any, text: str) -> None:
    """Writes a line; what the encoding doesn't have, as in names of files that aren't UTF-8, is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
