"""How sparse the model shall be, as pure functions of the position in training (in epochs)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.options.checks import fraction, number, one_of

FROM_PARAM = "__FROM_PARAM__"
"""As `init_sparsity`: the zeros that are there when training begins."""

_GRID_TOLERANCE = 1e-9
_MOST_UPDATES = 1_000_000


INTERPOLATIONS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cubic": lambda x: 1.0 - (1.0 - x) ** 3,
    "inverse_cubic": lambda x: 1.0 - (1.0 - x) ** (1.0 / 3.0),
}


@dataclass(frozen=True)
class Schedule:
    """A ramp from `init` to `final` sparsity on a fixed grid of updates.

    `s = init + f(x) (final - init)` with `x = (position - start) / (end - start)` clamped to [0, 1]; `cubic` is
    `1 - (1 - x)^3` (Zhu & Gupta, arXiv 1710.01878, eq. 1). The same position always gives the same
    sparsity, so that a resumed run goes on where the other one stopped.

        >>> ramp = Schedule(init=0.0, final=0.8, start=0.0, end=4.0, frequency=1.0)
        >>> [round(ramp.sparsity(p), 3) for p in (0, 1, 2, 3, 4, 5)]
        [0.0, 0.463, 0.7, 0.788, 0.8, 0.8]
        >>> [ramp.due(p) for p in (-0.5, 0.0, 0.9, 1.0, 3.99, 4.0, 7.0)]
        [None, 0.0, 0.0, 1.0, 3.0, 4.0, 4.0]

    Attributes:
        init: Sparsity at `start`, a fraction.
        final: Sparsity from `end` on, a fraction.
        start: Position of the first update, in epochs.
        end: Position of the last update, in epochs.
        frequency: Epochs between updates; 0 means at every step.
        interpolation: `"linear"`, `"cubic"` or `"inverse_cubic"`.
    """

    init: float
    final: float
    start: float
    end: float
    frequency: float
    interpolation: str = "cubic"

    def sparsity(self, position: float) -> float:
        """The sparsity that the ramp has at a position."""
        if position >= self.end:
            return self.final
        if position <= self.start:
            return self.init
        x = (position - self.start) / (self.end - self.start)
        return self.init + INTERPOLATIONS[self.interpolation](x) * (self.final - self.init)

    def due(self, position: float) -> float | None:
        """The latest update at or before a position, or None before the first one."""
        if position < self.start - _GRID_TOLERANCE:
            return None
        if position >= self.end - _GRID_TOLERANCE:
            return self.end
        if self.frequency == 0:
            return max(position, self.start)
        steps = math.floor((position - self.start) / self.frequency + _GRID_TOLERANCE)
        return self.start + steps * self.frequency

    def before(self, epoch: int, steps: int | None) -> float | None:
        """The latest update before the one that may be due when an epoch begins, or None.

        >>> ramp = Schedule(0.0, 0.8, start=1.0, end=4.0, frequency=0.5)
        >>> [ramp.before(epoch, steps=None) for epoch in (1, 2, 9)]
        [None, 1.5, 4.0]
        """
        return self.due(epoch - (1.0 / steps if self.frequency == 0 and steps else 1e-6))

    def updates(self, steps: int | None, first_epoch: int = 0) -> list[float]:
        """Every update from `first_epoch` on; for one at each step, `steps` an epoch must be known.

        >>> Schedule(0.0, 0.8, start=0.5, end=2.0, frequency=0.6).updates(steps=None)
        [0.5, 1.1, 1.7, 2.0]

        Raises:
            ValueError: If there are too many to plan.
        """
        gap = self.frequency or 1.0 / (steps or 1)
        count = math.ceil((self.end - self.start) / gap - _GRID_TOLERANCE)
        if count > _MOST_UPDATES:
            raise ValueError(
                f"An update at every step makes {count:,} updates from epoch {self.start:g} to {self.end:g}; up to "
                f"{_MOST_UPDATES:,} can be planned. Set update_frequency, or check end_epoch."
            )
        grid = [self.start + k * gap for k in range(count)]
        # Of the updates that were due before `first_epoch`, only the latest is made up for.
        current = self.due(float(first_epoch))
        late = [current] if current is not None and current < first_epoch - _GRID_TOLERANCE else []
        return [*late, *(p for p in [*grid, self.end] if p >= first_epoch - _GRID_TOLERANCE)]


def checked_schedule(init: Any, final: Any, start: Any, end: Any, frequency: Any, interpolation: Any) -> Schedule:
    """A schedule of what a user wrote, whose special values mean: start -1 at once, frequency -1 every step.

    Raises:
        ValueError, TypeError: If a value is out of range or of the wrong kind, or there are too many updates to plan.
    """
    final = fraction("final_sparsity", final)
    if init != FROM_PARAM:
        init = fraction("init_sparsity", init)
        if init > final:
            raise ValueError(
                f"init_sparsity={init:g} is above final_sparsity={final:g}; sparsity never falls. Lower it."
            )
    start = number("start_epoch", start)
    if start < 0 and start != -1:
        raise ValueError(f"start_epoch must be at least 0, or -1 for at once, got {start:g}.")
    start = max(start, 0.0)
    end = number("end_epoch", end, least=0.0)
    if end < start:
        raise ValueError(f"end_epoch={end:g} lies before start_epoch={start:g}. Swap or move them.")
    frequency = number("update_frequency", frequency)
    if frequency < 0 and frequency != -1:
        raise ValueError(
            f"update_frequency must be a positive number of epochs, or 0 or -1 for every step, got {frequency:g}."
        )
    gap = frequency if frequency > 0 else 1.0
    if (end - start) / gap > _MOST_UPDATES:
        raise ValueError(
            f"update_frequency={frequency:g} makes more than {_MOST_UPDATES:,} updates from epoch {start:g} to "
            f"{end:g}. Write 0 for an update at every step, or check end_epoch."
        )
    one_of("inter_func", interpolation, tuple(INTERPOLATIONS))
    return Schedule(0.0 if init == FROM_PARAM else init, final, start, end, max(frequency, 0.0), interpolation)
