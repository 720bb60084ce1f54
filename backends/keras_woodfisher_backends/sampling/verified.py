"""Fast ways to take gradient samples, used only where they give what one backward pass a group gives."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Loss, Sampler, SlowLayers
from keras_woodfisher_backends.sampling.capture import OutOfReachError, Pass
from keras_woodfisher_backends.sampling.ways import Ways

TOLERANCE = 1e-3
"""Largest relative distance between a fast sample and the direct one."""

_FAINT = 1e-4
"""A variable with less than this part of a sample's norm may be off by TOLERANCE of this part."""

DIFFERENT = "in one pass over many examples their gradients come out differently"

Rows = list[np.ndarray]
"""For each variable the samples of a chunk, (n, *shape)."""


class Gradients(Protocol):
    """How a framework takes samples, in one pass over a chunk and one group at a time."""

    ways: Ways

    @property
    def manners(self) -> Sequence[Any]:
        """Arguments of `captured`, the fastest one first."""
        ...

    def captured(self, manner: Any, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[Any]:
        """Rows of a chunk by its ways; None for variables without one."""
        ...

    def direct(self, values: Sequence[Any], others: Sequence[Any], batch: Any, places: Sequence[int]) -> Rows:
        """One backward pass a group, for some variables: always right."""
        ...

    def direct_few(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> Rows:
        """The same of few groups and all variables, as fast as can be for once."""
        ...

    def in_place(
        self, manner: Any, values: Sequence[Any], others: Sequence[Any], batch: Any, groups: Sequence[int]
    ) -> tuple[Rows, Rows, bool]:
        """See `compared_in_place`."""
        ...


class VerifiedSampler:
    """Compares the two largest samples of the first chunk, and trusts a fast way for the variables where they agree.

    The largest, because the gradient of an example that the model is sure of is little more than rounding. Where a
    sample is off, rounding may have switched a ReLU: sums of many examples are rounded otherwise than those of one.
    Then the sample is compared with the plain derivative of the same pass, in which all switches are the same, and the
    outputs, which a switch doesn't move, with those of the group alone. A variable for which that is off too gets the
    next of its ways; where a pass fails as a whole (a layer may do anything to its tensors), all samples are taken
    directly, unless memory is full: the caller may try fewer groups.

    Args:
        gradients: Takes samples.
        is_out_of_memory: Tells whether an error means that memory is full.

    Attributes:
        trusted: Whether all variables are sampled in one pass over many examples; None before the first chunk, unless
            a layer is known to prevent it.
    """

    def __init__(self, gradients: Gradients, is_out_of_memory: Callable[[Exception], bool]):
        self._gradients = gradients
        self._ways = gradients.ways
        self._is_out_of_memory = is_out_of_memory
        self._manner: Any = None
        self._chosen = False
        self._failed = False

    @property
    def trusted(self) -> bool | None:
        if any(self._ways.reasons):
            return False
        return True if self._chosen else None

    @property
    def slow_layers(self) -> SlowLayers | None:
        """See `Sampler`."""
        slow = {name: reason for name, reason in zip(self._ways.names, self._ways.reasons, strict=True) if reason}
        return SlowLayers(tuple(slow), "; ".join(dict.fromkeys(slow.values()))) if slow else None

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> Rows:
        return self._rows(values, others, batch) if self._chosen else self._choose(values, others, batch)

    def _rows(self, values: Any, others: Any, batch: Any) -> Rows:
        direct, every = self._ways.direct, range(len(values))
        if len(direct) == len(values):
            return self._gradients.direct(values, others, batch, every)
        rows = self._gradients.captured(self._manner, values, others, batch)
        if direct:
            found = self._gradients.direct(values, others, batch, direct)
            for place, row in zip(direct, found, strict=True):
                rows[place] = row
        return rows

    def _choose(self, values: Any, others: Any, batch: Any) -> Rows:
        manners = iter(self._gradients.manners)
        self._manner = next(manners)
        exact: dict[tuple[int, ...], Rows] = {}
        while True:
            try:
                rows = self._rows(values, others, batch)
                wrong = self._wrong(rows, values, others, batch, exact)
            except OutOfReachError as error:
                self._ways.give_up(error.places, error.reason)
                continue
            except Exception as error:  # what is wrong with the model itself, the direct way will say
                if len(self._ways.direct) == len(values) or (
                    arrays(batch)[0].shape[0] > 1 and self._is_out_of_memory(error)
                ):
                    raise
                self._manner = next(manners, None)
                if self._manner is None:
                    self._ways.give_up_all(f"the faster way failed with {type(error).__name__}")
                continue
            if not wrong:
                self._chosen = True
                return rows
            self._ways.give_up(wrong, DIFFERENT)

    def _wrong(self, rows: Rows, values: Any, others: Any, batch: Any, exact: dict[tuple[int, ...], Rows]) -> list[int]:
        """Places of the variables whose samples are off."""
        direct = self._ways.direct
        if len(direct) == len(rows):
            return []
        sizes = np.array([[np.linalg.norm(sample) for sample in row] for row in rows])
        total = np.nan_to_num(np.square(sizes).sum(0), nan=0.0, posinf=0.0)
        largest = np.argsort(total, kind="stable")[-2:]
        key = tuple(largest.tolist())
        if key not in exact:
            exact[key] = self._gradients.direct_few(values, others, take(batch, largest))
        off = _distant([row[largest] for row in rows], exact[key])
        suspects = sorted({place for place, _ in off} - set(direct))
        if not suspects:
            return []
        again, plain, alike = self._gradients.in_place(self._manner, values, others, batch, key)
        if not alike:
            return suspects
        switched = _distant(again, plain)
        return [place for place in suspects if any((place, sample) in off & switched for sample in range(len(key)))]


def _distant(rows: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> set[tuple[int, int]]:
    """Which samples of which variables are farther from the truth than rounding can be, (variable, sample)."""
    # Where a softmax has one entry only, say, the gradient before it is nothing but rounding.
    faint = _FAINT * np.sqrt(sum(np.square([np.linalg.norm(sample) for sample in row]) for row in truth))
    return {
        (place, number)
        for place, (row, right) in enumerate(zip(rows, truth, strict=True))
        for number, (fast, direct, rounding) in enumerate(zip(row, right, faint, strict=True))
        if not np.linalg.norm(fast - direct) <= TOLERANCE * max(np.linalg.norm(direct), rounding)
    }


def compared_in_place(
    found: Pass, loss: Loss, values: Any, others: Any, batch: Any, groups: Sequence[int], on_host: Callable[[Any], Any]
) -> tuple[Rows, Rows, bool]:
    """Compares rows of some groups of a pass with plain differentiation of that very pass.

    Args:
        found: The pass.
        loss: What was differentiated.
        values: At which values, as in `Loss`.
        others: The same.
        batch: Leaves (n, b, ...).
        groups: Which groups.
        on_host: Makes a float32 array of a tensor, and zeros of None.

    Returns:
        The rows, for each variable one a group, the same by plain differentiation, and whether the model's outputs for
        these groups are, but for rounding, those that each has alone.
    """
    rows = found.in_keras_layout(on_host)
    plain = [[on_host(grad) for grad in found.exact(group)] for group in groups]
    exact = [
        np.stack([np.broadcast_to(g, v.shape) for g in of])
        for of, v in zip(zip(*plain, strict=True), values, strict=True)
    ]
    again = [right if row is None else row[list(groups)] for row, right in zip(rows, exact, strict=True)]
    alike = True
    for group in groups:
        alone = arrays(loss.predict(values, others, take(batch, group)))
        for leaf, many in zip(alone, arrays(found.output), strict=True):
            one = np.asarray(on_host(leaf))
            alike &= bool(np.linalg.norm(one - on_host(many[group])) <= TOLERANCE * np.linalg.norm(one))
    return again, exact, alike


_sampler: Callable[..., Sampler] = VerifiedSampler
