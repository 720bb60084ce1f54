"""What all reports have in common: notebooks show them, and they are saved as a page or as data."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keras_woodfisher.options.checks import as_json
from keras_woodfisher.reports.html.elements import Section
from keras_woodfisher.reports.html.page import fragment, page

_ENDINGS = (".html", ".json")


class Report:
    """A dataclass that tells what was done.

    Attributes:
        title: Its heading.
    """

    title = "Report"

    def sections(self, whole: bool = False) -> list[Section]:
        """What a page shows under the title.

        Args:
            whole: Also what takes time to find out: bytes that compression leaves.
        """
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return as_json(asdict(self))  # type: ignore[call-overload]

    def save(self, path: str | os.PathLike[str], *others: "Report") -> None:
        """Writes the report, in place of what is there, whole or not at all.

            >>> report = kw.prune(model, sparsity=0.5, method="magnitude")
            >>> sensitivity = kw.sensitivity(model, levels=[0.9], eval_data=(x, y), method="magnitude", verbose=0)
            >>> report.save("report.html", sensitivity)
            >>> report.save("report.json")

        Args:
            path: A file that ends in `.html`: one page that needs no other file and no network; or in `.json`: what
                `as_dict` gives (numbers that aren't finite as null).
            others: Further reports for the same page, such as that of `sensitivity`.

        Raises:
            ValueError: If the file ends otherwise, or JSON is to hold several reports.
            TypeError: If one of `others` isn't a report.
            OSError: If it can't be written.
        """
        target = Path(path)
        if target.suffix.lower() not in _ENDINGS:
            raise ValueError(f"A report is saved as {' or '.join(_ENDINGS)}, got {str(path)!r}. Give such an ending.")
        if wrong := next((other for other in others if not isinstance(other, Report)), None):
            raise TypeError(f"Only reports can stand on the same page, got {wrong!r}. Leave it out.")
        if target.suffix.lower() == ".json":
            if others:
                raise ValueError(
                    f"{path} would hold one report, got {1 + len(others)}. Save each in a file of its own."
                )
            _write(target, json_text(self.as_dict()))
            return
        parts = [(report.title, report.sections(whole=True)) for report in (self, *others)]
        _write(target, page(parts, "keras_woodfisher"))

    def _repr_html_(self) -> str:
        return fragment(self.title, self.sections())


def json_text(data: Any) -> str:
    """One JSON document; numbers that JSON doesn't know (a loss of nan) become null."""
    return json.dumps(_known_to_json(data), indent=2, allow_nan=False)


def _known_to_json(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _known_to_json(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_known_to_json(value) for value in data]
    if hasattr(data, "item"):  # a number of NumPy's
        data = data.item()
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _write(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.stem[:40]}.{os.getpid()}{target.suffix}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
