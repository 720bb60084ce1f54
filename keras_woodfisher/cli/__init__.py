"""The command line `keras-woodfisher`.

Standard output holds the answer of a command and nothing else; progress, warnings and errors go to standard error.
"""

import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

import keras

from keras_woodfisher.cli.answer import as_json
from keras_woodfisher.cli.arguments import parse

FAILED, INTERRUPTED = 1, 130

# Their messages say what to do; of any other error the name of its class is worth knowing.
_EXPLAINED = (ValueError, TypeError, KeyError, OSError, MemoryError, FloatingPointError, RuntimeError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command in this process; Keras's backend is chosen already.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 (the work failed, or `check` found problems) or 130 (interrupted).

    Raises:
        SystemExit: With code 2 if the arguments are wrong.
    """
    return run(parse(argv))


def run(args: Namespace) -> int:
    """Runs the command of parsed arguments, and turns errors into exit codes."""
    try:
        with redirect_stdout(sys.stderr), _short_warnings():
            _check_backend(getattr(args, "backend", None))
            answer = import_module(f"keras_woodfisher.cli.{args.command}").run(args)
        sys.stdout.write(f"{as_json(answer.data) if args.json else answer.text}\n")
        sys.stdout.flush()
        return answer.code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the outermost place: whatever it is, the user gets one line
        if args.debug:
            traceback.print_exc()
        _say(f"error: {_one_line(error)}")
        return FAILED


def _check_backend(wanted: str | None) -> None:
    running = keras.backend.backend()
    if wanted not in (None, running):
        raise RuntimeError(
            f"--backend {wanted} comes too late: Keras runs on {running} in this process. "
            f"Start the command keras-woodfisher, or set KERAS_BACKEND={wanted}."
        )


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
    # The text of a KeyError is its argument in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    return text if text and isinstance(error, _EXPLAINED) else f"{type(error).__name__}: {text}"


def _say(text: str) -> None:
    sys.stderr.write(f"keras-woodfisher: {text}\n")
