"""What one option is: the values it takes, its default, who takes it, and what it means."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from keras_woodfisher.options.kinds import Kind

CALLBACK, PRUNE, SENSITIVITY, RECIPE = "WoodFisherPruning", "prune", "sensitivity", "recipe"
"""Who takes options. The commands of the command line bear the names of `prune` and `sensitivity`."""

RAMP, INVERSE, UPDATE = "ramp", "inverse", "update"
"""Groups of a recipe's fields: of every modifier that prunes; of the inverse Fisher, which may be nested; others."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A row of the table of options.

    Attributes:
        name: The option's name.
        kind: What values it takes.
        meaning: What it means, as the end of a sentence in Markdown.
        default: Its default; `...` where it has to be given.
        defaults: Other defaults, by caller. None leaves the choice to the caller.
        shown: The default as documentation words it, where its value doesn't say it.
        callers: Who takes it, beside recipes and the command line.
        renamed: Other names, by caller.
        group: The group of recipe fields to which it belongs; recipes have it only if there is one.
        commands: The commands of the command line that have it.
        help: What `--help` says instead of the meaning.
        takes_none: Whether None is a value of its own.
        second_order: Whether it has no effect on magnitude pruning.
        reported: Whether a report says it, since results depend on it.
    """

    name: str = ""
    kind: Kind
    meaning: str
    default: Any = ...
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shown: str = ""
    callers: tuple[str, ...] = (CALLBACK, PRUNE, SENSITIVITY)
    renamed: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    commands: tuple[str, ...] = ()
    help: str = ""
    takes_none: bool = False
    second_order: bool = False
    reported: bool = False

    def name_in(self, caller: str) -> str:
        """How a caller spells it."""
        return self.renamed.get(caller, self.name)

    def default_in(self, caller: str) -> Any:
        """The default that a caller has; `...` where it has to be given."""
        return self.defaults.get(caller, self.default)

    def choices_in(self, caller: str) -> tuple[Any, ...]:
        """The values that a caller takes, where there are only a few."""
        return self.kind.choices + self.kind.further.get(caller, ())

    def checked(self, value: Any) -> Any:
        """A value in one form, if it is allowed (else a ValueError or TypeError)."""
        return None if value is None and self.takes_none else self.kind.check(self.name, value)

    def default_text(self, caller: str) -> str:
        """The default as `--help` puts it behind the meaning, if there is one to tell."""
        value = self.default_in(caller)
        shown = value not in (..., None, (), False) and "default" not in self.help
        return f" (default {' '.join(map(str, value)) if isinstance(value, tuple) else value})" if shown else ""

    @property
    def plain_meaning(self) -> str:
        """The meaning without Markdown."""
        return self.meaning.replace("`", "")

    @property
    def sentence(self) -> str:
        """The meaning as a sentence of its own, without Markdown."""
        return f"{self.plain_meaning[0].upper()}{self.plain_meaning[1:]}."


def option(default: Any, kind: Kind, meaning: str, group: str = "", **more: Any) -> Any:
    """A field of a dataclass that is a row of the table, too; `more` are further attributes of `Option`."""
    row = Option(default=default, kind=kind, meaning=meaning, group=group, **more)
    return field(default=default, metadata={"option": row})


def options_of(kind: type) -> tuple[Option, ...]:
    """The rows that the fields of a dataclass are."""
    return tuple(replace(f.metadata["option"], name=f.name) for f in fields(kind))
