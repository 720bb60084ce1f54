"""What is known of the channels of a tensor, and which channels can only go together."""

from dataclasses import dataclass

import numpy as np

GIVEN = "they are an input of the model, or come from a layer that can't be narrowed"
"""Why channels stay that nothing in the model makes one by one."""


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor.

    Attributes:
        axis: The axis that counts them, the batch's being 0; None where nothing is known, and none of them can go.
        sets: (C,) the number of each channel in `Ties`.
        constants: (C,) float64, the value that a channel has in inference at every place of every example; nan where it
            depends on the input.
    """

    axis: int | None
    sets: np.ndarray
    constants: np.ndarray

    def holding(self, constants: np.ndarray) -> "Channels":
        """The same channels with other values."""
        return Channels(self.axis, self.sets, constants)


UNKNOWN = Channels(None, np.zeros(0, np.int64), np.zeros(0))


class Ties:
    """Sets of channels that can only go together, since layers that mix no channels lie between them.

    Attributes:
        needed: Channels that must stay, and why, in the order in which that was found.
        varied: Channels that are constant before something that makes them vary, and what that is.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self.needed: list[tuple[np.ndarray, str]] = []
        self.varied: list[tuple[np.ndarray, str]] = []

    def fresh(self, count: int) -> np.ndarray:
        """New channels, each by itself."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        return np.arange(first, first + count)

    def tie(self, some: np.ndarray, others: np.ndarray) -> None:
        """Channel by channel, those of both arrays can only go together from now on."""
        for pair in zip(some.tolist(), others.tolist(), strict=True):
            first, second = sorted(map(self._root, pair))
            self._parents[second] = first

    def need(self, sets: np.ndarray, why: str) -> None:
        """They must stay."""
        if len(sets):
            self.needed.append((sets, why))

    def vary(self, sets: np.ndarray, why: str) -> None:
        """They are constant, and no longer so behind what `why` names."""
        if len(sets):
            self.varied.append((sets, why))

    def roots(self) -> np.ndarray:
        """For each channel the one that stands for its set."""
        return np.array([self._root(channel) for channel in range(len(self._parents))], np.int64)

    def _root(self, channel: int) -> int:
        while self._parents[channel] != channel:
            self._parents[channel] = channel = self._parents[self._parents[channel]]
        return channel
