"""What becomes smaller in a model, what stays and why, as data and as a table."""

from dataclasses import asdict, dataclass
from typing import Any

from keras_woodfisher.reports.rendering import aligned

_KINDS = {"constant": "filters whose output is constant", "unread": "input channels that it doesn't read"}


@dataclass(frozen=True)
class ShrunkLayer:
    """A layer that becomes smaller.

        >>> model.get_layer("out").set_weights([np.eye(16, 3), np.zeros(3)])
        >>> kw.shrink_report(model).layers[-1]
        ShrunkLayer(name='out', kind='Dense', channels=3, channels_left=3, parameters=51, parameters_left=12)

    Attributes:
        name: Its name.
        kind: Its class.
        channels: How many output channels (units, filters) it has.
        channels_left: How many of them stay.
        parameters: How many weights it has, those that aren't trained included.
        parameters_left: How many of them stay.
    """

    name: str
    kind: str
    channels: int
    channels_left: int
    parameters: int
    parameters_left: int


@dataclass(frozen=True)
class StayingChannels:
    """Channels of a layer that do nothing by themselves and stay nevertheless.

        >>> model.get_layer("out").set_weights([np.zeros((16, 3)), np.zeros(3)])
        >>> kw.shrink_report(model).staying[0]
        StayingChannels(layer='out', kind='constant', channels=3, why='they are an output of the model')

    Attributes:
        layer: The layer's name.
        kind: `"constant"`, outputs that are the same for all inputs, or `"unread"`, inputs that it doesn't read.
        channels: How many.
        why: What needs them.
    """

    layer: str
    kind: str
    channels: int
    why: str


@dataclass(frozen=True)
class ShrinkReport:
    """The outcome of `shrink_report`; `print` it to see a table.

        >>> report = kw.shrink_report(model)
        >>> report.layers, report.parameters == report.parameters_left
        ((), True)
        >>> print(report)
        nothing can be removed: each of the model's 163 parameters is needed
        the smaller model is compiled in the same way; its optimizer begins anew

    Attributes:
        layers: Those that become smaller, in the order of their calls.
        staying: Channels that could have gone by themselves, and why they stay.
        parameters: How many weights the model has.
        parameters_left: How many the smaller one has.
        notes: What else is worth knowing.
    """

    layers: tuple[ShrunkLayer, ...]
    staying: tuple[StayingChannels, ...]
    parameters: int
    parameters_left: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        data = asdict(self)
        return data | {name: list(data[name]) for name in ("layers", "staying", "notes")}

    def __str__(self) -> str:
        lines = self._table() if self.layers else []
        if not self.layers:
            lines.append(f"nothing can be removed: each of the model's {self.parameters:,} parameters is needed")
        if self.staying:
            lines.append("stays, though it does nothing by itself:")
        lines += [f"  {s.layer}: {s.channels:,} {_KINDS[s.kind]}: {s.why}" for s in self.staying]
        return "\n".join([*lines, *self.notes])

    def _table(self) -> list[str]:
        cells: list[tuple[str, ...]] = [("layer", "kind", "channels", "left", "parameters", "left")]
        for layer in self.layers:
            numbers = (layer.channels, layer.channels_left, layer.parameters, layer.parameters_left)
            cells.append((layer.name, layer.kind, *(f"{number:,}" for number in numbers)))
        cells.append(("total", "", "", "", f"{self.parameters:,}", f"{self.parameters_left:,}"))
        lines = aligned(cells)
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        return lines
