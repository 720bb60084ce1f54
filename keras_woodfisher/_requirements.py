"""The oldest Keras that this package is tested with."""

import keras

OLDEST_KERAS = (3, 15)


def check_keras(version: str = keras.__version__) -> None:
    """Refuses a Keras that is too old.

    Raises:
        ImportError: With the version that is needed.
    """
    parts = tuple(int(part) for part in version.split(".")[:2])
    if parts < OLDEST_KERAS:
        needed = ".".join(str(part) for part in OLDEST_KERAS)
        raise ImportError(
            f"keras_woodfisher needs Keras {needed} or newer, found {version}. "
            f"Upgrade with: pip install 'keras>={needed}'."
        )
