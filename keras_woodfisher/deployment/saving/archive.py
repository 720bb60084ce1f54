"""A `.keras` file is a zip archive, which Keras writes without compression; these are the same members, deflated."""

import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

_SMALL, _EXPANSION = 64 * 2**20, 100
"""Keras (from 256 MiB on) and this package's command line refuse members that unpack to above 100 times their size."""

_CHUNK = 2**20


class Sizes(NamedTuple):
    """Bytes of a file, and of its members unpacked."""

    file: int
    unpacked: int


def deflate(source: str | Path, target: str | Path) -> None:
    """Writes the members of a zip archive into another one: the same names, order, dates and content, but deflated.

    Members above 64 MiB that would come to less than a hundredth are stored: Keras takes such ones for an attack.

    Args:
        source: The archive.
        target: Where to write the other one.

    Raises:
        zipfile.BadZipFile: If the source is damaged.
    """
    stored: frozenset[str] = frozenset()
    while True:
        _copy(source, target, stored)
        suspicious = _suspicious(target)
        if not suspicious:
            return
        stored |= suspicious


def sizes_of(path: str | Path) -> Sizes:
    """The bytes of a zip archive, as it is and unpacked."""
    with zipfile.ZipFile(path) as archive:
        return Sizes(Path(path).stat().st_size, sum(entry.file_size for entry in archive.infolist()))


def _copy(source: str | Path, target: str | Path, stored: frozenset[str]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            copy = zipfile.ZipInfo(entry.filename, entry.date_time)
            copy.external_attr = entry.external_attr
            # Known in advance, so that members above 4 GiB get the room that their header takes.
            copy.file_size = entry.file_size
            # At zlib's own level, 6: level 9 took 14 times as long for 5 % of the bytes (240 MB, 80 % zeros).
            copy.compress_type = zipfile.ZIP_STORED if entry.filename in stored else zipfile.ZIP_DEFLATED
            if entry.is_dir():
                new.writestr(copy, b"")
                continue
            # Reading to the end compares with the checksum of the source.
            with old.open(entry) as member, new.open(copy, "w") as out:
                shutil.copyfileobj(member, out, _CHUNK)


def _suspicious(path: str | Path) -> frozenset[str]:
    with zipfile.ZipFile(path) as archive:
        return frozenset(
            entry.filename
            for entry in archive.infolist()
            if entry.file_size > _SMALL and entry.file_size > _EXPANSION * entry.compress_size
        )
