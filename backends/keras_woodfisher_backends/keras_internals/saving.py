"""Private parts of saving."""

from keras.src.utils import io_utils


def may_overwrite(path: str) -> bool:
    """Asks on the terminal whether a file may be overwritten, in Keras's own words.

    Raises:
        FileExistsError: If nobody can be asked.
    """
    try:
        return bool(io_utils.ask_to_proceed_with_overwrite(path))
    except EOFError:
        raise FileExistsError(
            f"{path} exists, and there is no terminal to ask whether it may be overwritten. Give another path, or "
            "overwrite=True."
        ) from None
