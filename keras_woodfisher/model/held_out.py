"""Which examples of a stream are held out, known at each reading by their content: streams may shuffle anew."""

from collections import Counter
from collections.abc import Callable

import numpy as np
from keras_woodfisher_backends.nest import arrays

from keras_woodfisher.model.batches import Batch, length

_MOST = 0.5
"""No more of a stream that comes round again is left out than this part."""


class HeldOut:
    """Examples of a stream that are left out of each reading.

    Where several examples have the same content, only so many of each content are left out as were held out: the first
    ones, which are the very same where a stream repeats itself exactly. A stream that comes round within one reading
    shows the held-out examples again and again, and they are left out each time.

    Args:
        counts: How many examples of each content are held out.
        circles: Whether the stream comes round within one reading.
    """

    def __init__(self, counts: Counter[int] | None = None, circles: bool = False):
        self._counts = counts or Counter()
        self._circles = circles

    def __len__(self) -> int:
        return self._counts.total()

    def reading(self) -> Callable[[Batch], np.ndarray]:
        """A function for one reading: given one batch after the other, the places of those that aren't held out."""
        left = self._counts.copy()

        def others(batch: Batch) -> np.ndarray:
            kept = []
            for place, key in enumerate(contents(batch)):
                if left[key] <= 0:
                    kept.append(place)
                elif not self._circles:
                    left[key] -= 1
            return np.array(kept, int)

        return others

    def joined(self, held: Counter[int], after: Counter[int], ended: bool) -> "HeldOut":
        """With further examples.

        Args:
            held: How many of each content are held out now.
            after: How many of each content come after them in one reading.
            ended: Whether that reading came to the end of the stream.
        """
        again = sum(after[key] for key in held)
        circles = not ended and all(after[key] >= number for key, number in held.items())
        circles = circles and again <= _MOST * after.total()
        return HeldOut(self._counts + held, self._circles or circles)


def contents(batch: Batch) -> list[int]:
    """What tells the contents of the examples of a batch apart: inputs and labels."""
    leaves = arrays(batch[:2])
    return [hash(tuple(leaf[place].tobytes() for leaf in leaves)) for place in range(length(batch))]
