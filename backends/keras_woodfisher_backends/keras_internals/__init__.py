"""All that this project uses of Keras's private parts, and all that differs between releases of Keras.

Nothing outside of this package reads a private attribute of Keras or imports a private module of it. What each function
here relies on stands in one table, in `tests/backends/test_keras_internals.py`, which names what a new release lacks.
"""

import re
import warnings

import keras

OLDEST_TESTED, NEWEST_TESTED = (3, 12), (3, 16)


def release_of(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, as far as there are any."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def check_version(version: str) -> None:
    """Warns of a release of Keras that nobody has tried."""
    if not OLDEST_TESTED <= release_of(version) <= NEWEST_TESTED:
        oldest, (major, newest) = "{}.{}".format(*OLDEST_TESTED), NEWEST_TESTED
        warnings.warn(
            f"keras_woodfisher is tested with Keras {oldest} to {major}.{newest}, found {version}, which may lack "
            f"something that it needs. If it fails: pip install 'keras>={oldest},<{major}.{newest + 1}'.",
            stacklevel=2,
        )


RELEASE = release_of(keras.__version__)

check_version(keras.__version__)
