"""Fills G with gradient samples, chunk by chunk."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Backend, Sampler, SlowLayers
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.gradients.loss import ModelLoss
from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.model.batches import Batch, chunk_size, even_chunks
from keras_woodfisher.model.targets import Target


class HalvingSampler:
    """Gradients of a loss, a chunk of groups at a time, and in parts where a chunk doesn't fit as a whole.

    A part that doesn't fit is halved and taken again; later chunks are taken in parts of that size from the beginning.

    Args:
        loss: What to differentiate.
        sampler: The backend's own, of that loss.
        backend: Tells how many groups a chunk should hold, and whether an error means that memory is full.

    Attributes:
        told: Names of variables that no sample depended on and that were warned of.
    """

    def __init__(self, loss: ModelLoss, sampler: Sampler, backend: Backend):
        self.loss = loss
        self.sampler = sampler
        self._backend = backend
        self._most: int | None = None
        self.told: set[str] = set()

    @property
    def slow_layers(self) -> SlowLayers | None:
        return self.sampler.slow_layers

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        number = arrays(batch)[0].shape[0]
        parts: list[list[np.ndarray]] = []
        start = 0
        while start < number:
            size = number if self._most is None else min(self._most, number)
            # Frameworks compile once a shape: the last part repeats its last group.
            part = batch if size == number else take(batch, np.minimum(np.arange(start, start + size), number - 1))
            rows = self._sample(values, others, part, size)
            if rows is not None:
                parts.append([row[: number - start] for row in rows])
                start += size
        return parts[0] if len(parts) == 1 else [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def chunk(self, values: Sequence[Any], examples: int) -> int:
        """How many groups of so many examples should be taken at a time."""
        return chunk_size(self._backend, self.loss.model, values, examples)

    def _sample(self, values: Sequence[Any], others: Sequence[Any], part: Any, size: int) -> list[np.ndarray] | None:
        """None where there is no memory for so many; then `_most` is half of it."""
        try:
            return self.sampler(values, others, part)
        except Exception as error:
            if not self._backend.is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(
                    f"There is no memory for one gradient sample of {arrays(part)[0].shape[1]} examples: {error}. "
                    "Lower grad_batch_size, or choose fewer weights (params, exclude)."
                ) from error
        self._most = size // 2
        return None


_: type[Sampler] = HalvingSampler


def sample_gradients(
    sampler: HalvingSampler,
    groups: Iterator[Batch],
    kept: Sequence[tuple[Target, np.ndarray]],
    wanted: int,
    store: GradientStore,
    advance: Callable[[int], None],
    prepare: Callable[[Batch], Batch] | None = None,
) -> float:
    """Fills G with the samples that are finite and not zero.

    Args:
        sampler: Gives the gradients of a chunk of groups.
        groups: Chunks of any size, leaves (n, b, ...).
        kept: Each variable with the bool mask of its unpruned weights, in weight order.
        wanted: How many samples there should be (m).
        store: Takes the samples of the d unpruned weights.
        advance: Called with the number of rows that were added.
        prepare: What is to be done to each chunk before.

    Returns:
        The sum of all squares of G.

    Raises:
        NoUsableSamplesError: If no usable sample is left.
    """
    values, others = sampler.loss.values()
    dropped, size = 0, 0
    sums: list[np.ndarray] = []
    still = [target.name for target, mask in kept if mask.any()]
    with sampler.loss.sampling_mode():
        for batch, number in even_chunks(groups, lambda b: min(store.chunk, sampler.chunk(values, b))):
            rows = sampler(values, others, batch if prepare is None else prepare(batch))
            into = store.room(number)
            start = 0
            for (target, mask), row in zip(kept, rows, strict=True):
                stop = start + int(np.count_nonzero(mask))
                _copy_kept(target, mask, row[:number], into[:, start:stop])
                if target.name in still and into[:, start:stop].any():
                    still.remove(target.name)
                start = stop
            good, squares = usable_rows(into)
            dropped += number - int(good.sum())
            sums.append(squares[good])
            # Not beside the samples of the next chunk.
            del rows, row
            store.keep(good)
            advance(number)
            size = arrays(batch)[0].shape[1]
    taken = Taken.of(sums, dropped, {target.name: target.name not in still for target, mask in kept if mask.any()})
    check_samples(taken.kept, taken.dropped, wanted, size)
    warn_of_still([name for name in taken.still if name not in sampler.told])
    sampler.told.update(taken.still)
    return taken.squares


_COPIED = 4 * 2**20
"""Bytes that are copied at a time."""


def _copy_kept(target: Target, mask: np.ndarray, rows: np.ndarray, into: np.ndarray) -> None:
    """Puts the unpruned weights of gradients (n, *shape) into (n, k), a few rows at a time, since picking copies."""
    every = bool(mask.all())
    step = max(1, _COPIED // (4 * max(mask.size, 1)))
    for start in range(0, len(rows), step):
        flat = target.flatten(np.asarray(rows[start : start + step], np.float32))
        into[start : start + step] = flat if every else flat[:, mask]


@dataclass(frozen=True)
class Taken:
    """The samples of one update, those of all processes that prune together.

    Attributes:
        kept: How many are used.
        dropped: How many can't be used.
        squares: The sum of the squares of those that are used.
        still: Names of variables that none of them depends on.
    """

    kept: int
    dropped: int
    squares: float
    still: tuple[str, ...]

    @classmethod
    def of(cls, sums: Sequence[np.ndarray], dropped: int, moved: Mapping[str, bool]) -> "Taken":
        """Adds up what all processes have taken.

        Args:
            sums: Parts of the sums of squares of this process's samples, in their order.
            dropped: How many of its samples can't be used.
            moved: By a variable's name, whether one of its samples depends on that.
        """
        ranks = current_ranks()
        # In the order of samples, whichever process took them: rounding is always the same.
        squares = ranks.joined(np.concatenate([*sums, np.zeros(0)]))
        every = np.stack(ranks.all_gather(np.array([dropped, *moved.values()], np.int64)))
        found = [bool(column.any()) for column in every[:, 1:].T]
        still = tuple(name for name, depends in zip(moved, found, strict=True) if not depends)
        return cls(squares.size, int(every[:, 0].sum()), float(squares.sum()), still)


def usable_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are finite and not all zero, (n,) bool, and the sum of squares of each, (n,) float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.array([np.dot(row, row) for row in rows], np.float64).reshape(len(rows))
        good = np.isfinite(squares) & (squares > 0)
        # Squares may be too large or too small for float32 where the numbers aren't.
        for place in np.flatnonzero(~good):
            squares[place] = np.square(rows[place], dtype=np.float64).sum()
            good[place] = np.isfinite(squares[place]) and squares[place] > 0
    return good, squares


_LARGER = (
    " Where it compares the examples of a batch with each other, samples need more of them than grad_batch_size={}."
)


class NoUsableSamplesError(ValueError):
    """All gradient samples are zero or not finite."""

    def __init__(self, number: int, where: str = "on this data", hint: str = ""):
        self.problem = f"{number} of {number} gradient samples are zero or not finite"
        super().__init__(
            f"No usable gradient sample: {number} of {number} are zero or not finite. Look at the loss {where}: "
            f"it must be finite, and depend on the weights to prune, as it doesn't where outputs are saturated.{hint}"
        )


def warn_of_still(names: Sequence[str]) -> None:
    """Warns of variables, by name, that no gradient sample depends on."""
    if names:
        warnings.warn(
            f"No gradient sample depends on {', '.join(names)}: nothing but their size and `damp` says what they are "
            "worth, which can't be compared with the others. If something else needs them (an output without a loss, a "
            "network that another optimizer trains), put them in `exclude`.",
            stacklevel=2,
        )


def check_samples(kept: int, dropped: int, wanted: int, size: int | None = None, where: str = "on this data") -> None:
    """Warns of samples that are missing, and refuses to go on without any.

    Args:
        kept: Samples that are used.
        dropped: Those that can't be used.
        wanted: How many there should be.
        size: Examples in a sample (b), where that is for the user to say.
        where: What their loss is measured on.

    Raises:
        ValueError: If there is no sample, a `NoUsableSamplesError` where none can be used.
    """
    if not kept and not dropped:
        raise ValueError(
            "No gradient sample: data gave no example, though it did before. A callable must return a fresh iterator "
            "at each call."
        )
    if not kept:
        raise NoUsableSamplesError(dropped, where, "" if size is None else _LARGER.format(size))
    if dropped:
        warnings.warn(
            f"{dropped} of {dropped + kept} gradient samples are zero or not finite and were dropped.",
            stacklevel=2,
        )
    elif kept < wanted:
        warnings.warn(
            f"Only {kept} of {wanted} gradient samples could be taken: the data ran out. "
            "Lower num_grads, or give more data.",
            stacklevel=2,
        )
