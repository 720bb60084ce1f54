"""Where the command `keras-woodfisher` begins: chooses the backend, and only then imports Keras.

Keras reads KERAS_BACKEND once, while it is imported, and `import keras_woodfisher` imports Keras. So the program can't
begin there; it begins in this package, which imports no Keras. Help and wrong usage answer at once, too.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 (the work failed, or `check` found problems) or 130 (interrupted). Wrong usage
        exits with 2.
    """
    args = _arguments().parse(argv)
    if getattr(args, "backend", None):
        os.environ["KERAS_BACKEND"] = args.backend
    # TensorFlow's start would bury a message of one line; a wish of the user's own goes first.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from keras_woodfisher.cli import run
    except ImportError as error:
        if args.debug:
            raise
        sys.stderr.write(f"keras-woodfisher: error: {_explained(error)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return run(args)


def _arguments() -> ModuleType:
    """`keras_woodfisher.cli.arguments`, read without its package's `__init__`, which imports Keras."""
    package = find_spec("keras_woodfisher")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise ModuleNotFoundError("keras_woodfisher isn't installed. Install it with: pip install keras-woodfisher.")
    spec = spec_from_file_location("keras_woodfisher_arguments", Path(folders[0]) / "cli" / "arguments.py")
    assert isinstance(spec, ModuleSpec) and spec.loader is not None  # for the type checker
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _explained(error: ImportError) -> str:
    missing = (error.name or "").partition(".")[0]
    if missing in ("torch", "tensorflow", "jax"):
        return f"Keras's backend is {missing}, which isn't installed: pip install 'keras-woodfisher[{missing}]'."
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
