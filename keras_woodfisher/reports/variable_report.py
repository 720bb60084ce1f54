"""The zeros of one variable, and what formats for sparse weights would make of it."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field

from keras_woodfisher.options.sizes import size_text
from keras_woodfisher.reports.html.elements import Section, paragraph, table, tiles
from keras_woodfisher.reports.storage import Storage

_FORMATS = ("dense", "bitmask", "CSR", "gzip")


@dataclass(frozen=True)
class VariableReport:
    """One variable.

        >>> first = kw.sparsity_report(model).variables[0]
        >>> first.shape, first.weights, first.pruned, first.sparsity
        ((2, 16), 32, 0, 0.0)

    Attributes:
        name: Its path.
        shape: Its shape.
        weights: Its number of weights.
        pruned: How many of them are zero.
        measure: Measures its bytes, for `storage`.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    pruned: int
    measure: Callable[[], Storage | None] | None = field(default=None, repr=False, compare=False)

    @property
    def sparsity(self) -> float:
        return self.pruned / self.weights

    @property
    def storage(self) -> Storage | None:
        """Bytes of it dense and in formats for sparse weights, measured when they are first asked for.

        None where the variable no longer exists or has another number of zeros by then.
        """
        return None if self.measure is None else self.measure()


def bytes_section(variables: Sequence[VariableReport]) -> Section:
    """The bytes of each variable and of all together, as far as they can be measured."""
    known = [(v.name, size) for v in variables if (size := v.storage) is not None]
    if not known:
        why = "Not measured: the model is gone, or its zeros have changed since." if variables else ""
        return Section("Bytes", paragraph(why) if why else "")
    total = sum((size for _, size in known), Storage(0, 0, 0, 0))
    rows = [(name, *(f"{count:,}" for count in astuple(size))) for name, size in (*known, ("total", total))]
    head = tiles(dict(zip(_FORMATS, map(_rounded, astuple(total)), strict=True)))
    missing = len(variables) - len(known)
    more = paragraph(f"{missing} variables have changed since, or are gone, and aren't counted.") if missing else ""
    return Section("Bytes", head + table([("variable", *_FORMATS), *rows], total=True) + more)


def _rounded(size: int) -> str:
    return f"{size / 1024:.1f} KiB" if size < 2**20 else size_text(size)
