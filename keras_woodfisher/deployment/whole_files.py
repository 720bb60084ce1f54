"""Files that are whole or not there at all: they are made beside their place, and moved there once they are done."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, save: Callable[[str], Any]) -> None:
    """Calls `save` with a path to write to, and moves what is there to `path` once that is done.

    A file or a folder that is there stays until then, and if `save` fails or is interrupted. A link stays a link: what
    it leads to is exchanged.

    Args:
        path: The file or folder to be; its folder must exist.
        save: Writes a file, or a folder with files; the path has the name that `path` has.
    """
    target = Path(os.path.realpath(path))
    with beside(target) as folder:
        made = folder / target.name
        save(str(made))
        move(made, target)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder beside `target`, on the same disk; it is gone afterwards, with all that is still in it.

    Raises:
        OSError: If there is no room for it, of the kind that the system says (`PermissionError`, ...).
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.stem[:40]}.", dir=target.parent))
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"The folder {target.parent} can't be written to ({reason}). Choose another place.") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move(made: Path, target: Path) -> None:
    """Puts a file or folder in the place of another one, which is there as a whole until then.

    A file takes over the other one's permissions. Of a folder, the other one is moved aside first.
    """
    if made.is_dir():
        _move_folder(made, target)
        return
    if target.exists():
        shutil.copymode(target, made)
    with open(made, "rb+") as file:
        os.fsync(file.fileno())
    made.replace(target)


def _move_folder(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    with beside(target) as folder:
        old = folder / "old"
        target.rename(old)
        try:
            made.rename(target)
        except BaseException:
            old.rename(target)
            raise
