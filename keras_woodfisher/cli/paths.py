"""Which files may be read and written, found out before any work."""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from keras_woodfisher.options.sizes import size_text


def check_input(
    path: str, endings: Sequence[str] = (), kind: str = "file", mend: str = "Write or copy it anew."
) -> None:
    """Refuses what can't be read to its end as a file.

    Args:
        path: The file, or a link to it.
        endings: Those that it may have; none: any.
        kind: What messages call it.
        mend: How to come by one.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else (a pipe or device might never end), empty, or its ending is wrong.
        PermissionError: If it mayn't be read.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        if os.path.islink(path):
            raise FileNotFoundError(
                f"{path} is a link to {os.readlink(path)}, which leads to no file. Mend the link, or give the file."
            ) from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise FileNotFoundError(f"There is no {kind} {path}.") from None
        raise ValueError(f"{path} can't be read: {error}. Give the name of a file.") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_kind_of(found.st_mode)}. Give a {_wanted(kind, endings)}.")
    if endings and Path(path).suffix not in endings:
        raise ValueError(f"{path} must be a {_wanted(kind, endings)}. {mend}")
    if not found.st_size:
        raise ValueError(f"{path} is empty (0 bytes). {mend}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read. Change its permissions.")


def _wanted(kind: str, endings: Sequence[str]) -> str:
    return f"{kind} that ends in {' or '.join(endings)}" if endings else kind


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no ordinary file")


def check_output(path: str, endings: Sequence[str], force: bool, size: int = 0) -> None:
    """Finds out before any work whether a result can be written, by writing so many bytes in its place.

    Args:
        path: Where the result is to be.
        endings: Those that it may have.
        force: Whether a file that is there may be overwritten.
        size: Bytes that the result is expected to take.

    Raises:
        ValueError: If the ending is wrong.
        FileExistsError: If the file is there and mustn't be overwritten.
        FileNotFoundError, NotADirectoryError, PermissionError, OSError: If its folder can't take it.
    """
    target = Path(path)
    if target.suffix not in endings:
        raise ValueError(f"{path} must end in {' or '.join(endings)}.")
    if os.path.isdir(path):
        raise FileExistsError(f"{path} is a folder. Name a file in it.")
    # A link that leads nowhere is there, too.
    if os.path.lexists(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise FileExistsError(f"{path} is {_kind_of(os.stat(path).st_mode)}. Give another name.")
        if not force:
            raise FileExistsError(f"{path} exists. Give another name, or --force to overwrite it.")
    folder = target.parent
    if not os.path.lexists(folder):
        raise FileNotFoundError(f"The folder {folder} of {path} doesn't exist. Create it first.")
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} isn't a folder, so {path} can't be written.")
    _try_to_write(target, size)


def _try_to_write(target: Path, size: int) -> None:
    temporary = _temporary(target)
    try:
        with suppress(FileNotFoundError):
            os.lstat(target)  # a name may be too long
        with open(temporary, "xb") as file, suppress(AttributeError):  # not every system can set room aside
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        reason = f"{error.strerror or error}, trying to write {size_text(size)}" if size else error.strerror or error
        raise type(error)(
            f"The folder {target.parent} can't be written to ({reason}). Choose another place for {target.name}."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _temporary(target: Path) -> Path:
    """A file of its own beside the target, whose name isn't longer than a folder allows."""
    return target.with_name(f".{target.stem[:40]}.{os.getpid()}{target.suffix}")


def size_of(path: str) -> int:
    """Bytes of a file; 0 where there is none."""
    return os.path.getsize(path) if os.path.isfile(path) else 0
