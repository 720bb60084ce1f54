"""The examples that gradient samples are taken of: whatever `fit` takes, as groups of b examples."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import keras
import numpy as np
from keras import tree
from keras_woodfisher_backends.nest import arrays, map_arrays, take
from keras_woodfisher_backends.ranks.digests import digest_of

from keras_woodfisher.model.batches import Batch, as_batch, as_numpy, cut, length, lengths, unpacked
from keras_woodfisher.model.held_out import HeldOut, contents
from keras_woodfisher.options.checks import count

GROUPS_AT_A_TIME = 256
"""Groups that are gathered from arrays at a time."""


class Examples(Protocol):
    """A source that can be read afresh at each update."""

    @property
    def available(self) -> int | None:
        """How many examples there are, or None where only reading them tells."""
        ...

    def groups(self, count: int, size: int, seed: Any) -> Iterator[Batch]:
        """Chunks of groups: leaves of shape (n, size, ...), `count` groups in all or fewer if they run out."""
        ...

    def hold_out(self, count: int, seed: Any) -> tuple[list[Batch], "Examples"]:
        """Sets examples aside: batches of `count` examples, leaves (n, ...), and the source without them.

        Raises:
            ValueError: If none would be left.
        """
        ...


def open_examples(data: Any) -> Examples:
    """Understands `data` as `fit` does.

    Args:
        data: Arrays (`(x, y)` or `(x, y, sample_weight)`; x may be a list or dict), a `tf.data.Dataset`, a torch
            `DataLoader`, a `keras.utils.PyDataset`, another iterable of batches that starts afresh each time, or a
            callable that returns an iterator of batches.

    Raises:
        TypeError: If it is a generator or another iterator, which sampling would use up.
        ValueError: If arrays differ in length or are empty.
    """
    if isinstance(data, keras.utils.PyDataset):
        return StreamedExamples(lambda: iter(data), _length_of_pydataset(data))
    if _is_loader(data):
        return StreamedExamples(lambda: iter(data), _length_of_loader(data))
    if isinstance(data, (tuple, list, Mapping)) or _is_array(data):
        return ArrayExamples(unpacked(data if not isinstance(data, list) else tuple(data)))
    if callable(data):
        return StreamedExamples(lambda: _fresh(data), None)
    if isinstance(data, Iterator):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be read only once: sampling would use up what "
            "training needs. Give a callable that returns a fresh one: data=lambda: make_batches()."
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return StreamedExamples(lambda: iter(data), None)
    raise TypeError(
        f"data is a {type(data).__name__}. Give what `fit` takes: (x, y) arrays, a tf.data.Dataset, a torch "
        "DataLoader, a keras.utils.PyDataset, or a callable that returns a fresh iterator of batches."
    )


def count_up_to(examples: Examples, most: int) -> int | None:
    """How many examples there are; of a stream, which is read to find out, None if there are `most` or more."""
    if examples.available is not None:
        return examples.available
    number = sum(length(part) for part in examples.groups(most, 1, None))
    return number if number < most else None


def read_batches(examples: Examples, num_examples: int | None, batch_size: int, seed: Any) -> list[Batch]:
    """Some of the examples, the same at each look even if reading shuffles or augments them.

    Args:
        examples: Where to read; labels may be missing.
        num_examples: The most to read, or None for all: of arrays drawn with the seed, else the first ones.
        batch_size: Examples of one batch at most.
        seed: Of the choice from arrays.

    Returns:
        (x, y, sample_weight) each, leaves (n, ...).

    Raises:
        ValueError: If there is no example.
    """
    most = sys.maxsize if num_examples is None else count("num_examples", num_examples, "None means all.")
    size = count("batch_size", batch_size)
    if examples.available is not None:
        most = min(most, examples.available)
    batches: list[Batch] = []
    for groups in examples.groups(most, 1, seed):
        batches += cut(map_arrays(lambda array: array[:, 0], groups), size)
    if not batches:
        raise ValueError("data holds no example (a callable must return a fresh iterator at each call).")
    return batches


class ArrayExamples:
    """Arrays, drawn by `numpy.random.default_rng(seed).permutation`, the same on every backend.

    Args:
        batch: The arrays.
        rows: Those that are drawn from, all by default; the arrays aren't copied.
    """

    def __init__(self, batch: Batch, rows: np.ndarray | None = None):
        self._batch = map_arrays(as_numpy, batch)
        found = lengths(self._batch)
        if len(found) != 1 or 0 in found:
            raise ValueError(
                f"The arrays in data hold {sorted(found)} examples. "
                "Give x, y and sample_weight with the same, positive number of rows."
            )
        self._rows = np.arange(found.pop()) if rows is None else rows
        self.available: int | None = len(self._rows)

    @property
    def labels(self) -> Any:
        """All labels, those that aren't drawn from too."""
        return self._batch[1]

    def digest(self) -> bytes:
        """Of all arrays, and of the rows that are drawn from."""
        return digest_of(*arrays(self._batch), self._rows)

    def groups(self, count: int, size: int, seed: Any) -> Iterator[Batch]:
        drawn = self._rows[np.random.default_rng(seed).permutation(len(self._rows))[: count * size]]
        groups = drawn[: len(drawn) // size * size].reshape(-1, size)
        for start in range(0, len(groups), GROUPS_AT_A_TIME):
            yield take(self._batch, groups[start : start + GROUPS_AT_A_TIME])

    def hold_out(self, count: int, seed: Any) -> tuple[list[Batch], "Examples"]:
        if len(self._rows) <= count:
            raise _none_left(count, len(self._rows))
        order = np.random.default_rng(None if seed is None else [seed, _HELD_OUT]).permutation(len(self._rows))
        rest = ArrayExamples(self._batch, self._rows[np.sort(order[count:])])
        return [take(self._batch, self._rows[order[:count]])], rest


_HELD_OUT = 2**32 - 1
"""Number of the draw of what is held out: no update has it."""

_PATIENCE = 16
"""A stream is read for so many times as many examples as groups need and as are held out, and then given up.

So far it is looked at, too, to find out whether what is held out comes up again.
"""


class StreamedExamples:
    """Batches of an iterable, in their order, cut into groups.

    Args:
        start: Begins to read anew.
        available: Examples that there are, where that is known.
        held: Those that are left out of each reading.
    """

    def __init__(self, start: Callable[[], Iterator[Any]], available: int | None, held: HeldOut | None = None):
        self._start = start
        self.available = available
        self._held = held or HeldOut()

    def groups(self, count: int, size: int, seed: Any) -> Iterator[Batch]:
        del seed
        rest: Batch | None = None
        # A stream may never end, and groups of one shape never form in it.
        patience = _PATIENCE * (count * size + len(self._held))
        others = self._held.reading()
        with _random_state_kept():
            for item in self._start():
                batch = as_batch(item)
                patience -= length(batch)
                if len(self._held):
                    batch = take(batch, others(batch))
                # Batches may be padded to different lengths: groups never mix them.
                if _fits(rest, batch):
                    batch = map_arrays(lambda a, b: np.concatenate([a, b]), rest, batch)
                number = min(length(batch) // size, count)
                used = number * size
                if number:
                    yield map_arrays(lambda a: a.reshape(-1, size, *a.shape[1:]), take(batch, slice(used)))
                count -= number
                if count == 0 or patience < 0:
                    return
                rest = take(batch, slice(used, None))

    def hold_out(self, count: int, seed: Any) -> tuple[list[Batch], "Examples"]:
        held: list[Batch] = []
        now, after = Counter[int](), Counter[int]()
        # Where the length is known, one reading never comes round.
        window = (1 if self.available is not None else _PATIENCE) * count + 1
        for part in self.groups(window, 1, seed):
            batch = map_arrays(lambda array: array[:, 0], part)
            first = take(batch, slice(count - now.total()))
            held += [first] if length(first) else []
            after.update(contents(take(batch, slice(length(first), None))))
            now.update(contents(first))
        found = now.total() + after.total()
        if found <= count:
            raise _none_left(count, found)
        ended = self.available is not None or found < window
        left = None if self.available is None else self.available - count
        return held, StreamedExamples(self._start, left, self._held.joined(now, after, ended))


def _none_left(count: int, there: int) -> ValueError:
    return ValueError(
        f"calibration={count} sets aside {count} examples, but data holds {there}. Give fewer, or other examples for "
        "it: calibration=(x, y)."
    )


def _fits(rest: Batch | None, batch: Batch) -> bool:
    if rest is None or length(rest) == 0:
        return False
    pairs = zip(tree.flatten(rest), tree.flatten(batch), strict=True)
    return all(a is b or (a is not None and b is not None and a.shape[1:] == b.shape[1:]) for a, b in pairs)


def _fresh(make: Callable[[], Any]) -> Iterator[Any]:
    made = make()
    if not isinstance(made, Iterable):
        raise TypeError(
            f"The callable in data returned a {type(made).__name__}. It must return a fresh iterator of batches."
        )
    return iter(made)


def _length_of_pydataset(data: keras.utils.PyDataset) -> int | None:
    try:
        number = data.num_batches
    except NotImplementedError:
        return None
    if not number:
        return number
    # All batches but the last are as long as the first; the last one may be shorter.
    with _random_state_kept():
        sizes = [length(unpacked(data[i])) for i in sorted({0, number - 1})]
    return sizes[0] * (number - 1) + sizes[-1]


def _length_of_loader(data: Any) -> int | None:
    if data.batch_size is None:  # batches come from a batch sampler or the dataset itself, of any size
        return None
    try:
        examples = len(data.sampler)
    except (TypeError, NotImplementedError):
        return None
    return examples // data.batch_size * data.batch_size if data.drop_last else examples


def _is_loader(data: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.utils.data.DataLoader)


def _is_array(data: Any) -> bool:
    return hasattr(data, "shape") and hasattr(data, "__array__")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Reading may shuffle or augment: the training's own random numbers stay what they would have been."""
    torch = sys.modules.get("torch")
    states = random.getstate(), np.random.get_state(), torch and torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch:
            torch.set_rng_state(states[2])
