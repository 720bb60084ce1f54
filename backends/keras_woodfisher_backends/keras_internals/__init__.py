"""All that this project uses of Keras's private parts, and all that differs between releases of Keras.

Nothing outside of this package reads a private attribute of Keras or imports a private module of it. What each function
here relies on stands in one table, in `tests/backends/test_keras_internals.py`, which names what a new release lacks.
"""

import re
import warnings

import keras

OLDEST_TESTED, NEWEST_TESTED = (3, 12), (3, 16)


def check_version(version: str) -> None:
    """Warns of a release of Keras that nobody has tried."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST_TESTED <= (int(found[1]), int(found[2])) <= NEWEST_TESTED:
        oldest, (major, newest) = "{}.{}".format(*OLDEST_TESTED), NEWEST_TESTED
        warnings.warn(
            f"keras_woodfisher is tested with Keras {oldest} to {major}.{newest}, found {version}, which may lack "
            f"something that it needs. If it fails: pip install 'keras>={oldest},<{major}.{newest + 1}'.",
            stacklevel=2,
        )


check_version(keras.__version__)
