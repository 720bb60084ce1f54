"""Processes that do the same work together, each with a share of it: no one is left waiting, and none goes its own way.

Before anything is sent all processes exchange a short header: what each of them is about to do, or that it has failed.
A process that fails tells the others at the next header, wherever they are by then, and all of them raise its error.
What processes would do differently is found out at the same place.
"""

import json
import pickle
import signal
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from keras_woodfisher_backends.ranks.digests import DIGEST, digest_of
from keras_woodfisher_backends.ranks.errors import as_elsewhere, as_text
from keras_woodfisher_backends.ranks.transport import Transport

_HEADER = struct.Struct("<?55sq")
"""Whether a process has failed, what it is about to do, and a number."""

_PIECE = 8 * 2**20
"""Bytes that come from all processes at a time, where arrays are joined."""

_T = TypeVar("_T")


class LostProcessError(RuntimeError):
    """Another process has ended, or doesn't answer."""


class Ranks:
    """The processes that train together; a single one needs no transport and sends nothing.

    Args:
        transport: Carries bytes between them; None for a single process.

    Attributes:
        rank: The number of this process.
        size: How many there are.
        transport: As given.
    """

    def __init__(self, transport: Transport | None = None):
        self.transport = transport
        self.rank = 0 if transport is None else transport.rank
        self.size = 1 if transport is None else transport.size
        self._depth = 0
        self._ended = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Work that all processes do: if it fails or is interrupted on one, it fails on all of them.

        Warnings are the first process's.

        Args:
            name: What it is, in a few words; has to be the same on all.

        Raises:
            Exception: On a process that didn't fail itself, the error of the first one that did, with its number; a
                RuntimeError if processes do different things.
            LostProcessError: If one has ended.
        """
        if self.size == 1 or self._depth:
            yield
            return
        self._depth, self._ended = 1, False
        try:
            with self._quiet():
                with self._met(name, 0):
                    pass
                yield
                with self._met(f"end of {name}", 0):
                    # From here on the others are gone.
                    self._ended = True
        except BaseException as error:
            if not self._ended:
                self._tell(error)
            raise
        finally:
            self._depth = 0

    def all_gather(self, array: np.ndarray, name: str = "all_gather") -> list[np.ndarray]:
        """The arrays (n, ...) of all processes; only the first axis may differ."""
        if self.size == 1:
            return [array]
        array = np.ascontiguousarray(array)
        with self._met(name, array.nbytes) as sizes:
            most = max(sizes)
            data = np.zeros(most, np.uint8)
            data[: array.nbytes] = _bytes(array)
            found = self._gathered(data) if most else [data] * self.size
        return [_array(part[:size], array.dtype, array.shape[1:]) for part, size in zip(found, sizes, strict=True)]

    def joined(self, array: np.ndarray, axis: int = 0) -> np.ndarray:
        """The arrays of all processes, one after the other along an axis."""
        if self.size == 1:
            return array
        moved = np.ascontiguousarray(np.moveaxis(array, axis, 0))
        own = _bytes(moved)
        with self._met("joined", own.size) as sizes:
            starts = np.cumsum([0, *sizes]).tolist()
            joined = np.empty(starts[-1], np.uint8)
            # A few at a time: all of them twice is much where arrays are as long as the weights.
            step = max(1, _PIECE // self.size)
            for place in range(0, max(sizes), step):
                data = np.zeros(min(step, max(sizes) - place), np.uint8)
                data[: max(0, min(step, own.size - place))] = own[place : place + step]
                for start, size, part in zip(starts, sizes, self._gathered(data), strict=False):
                    number = max(0, min(len(data), size - place))
                    joined[start + place : start + place + number] = part[:number]
        return np.moveaxis(_array(joined, moved.dtype, moved.shape[1:]), 0, axis)

    def all_to_all(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What each process has for this one, (n,); `parts` are arrays (n,) of one type, one for each process."""
        if self.size == 1:
            return list(parts)
        dtype = parts[0].dtype
        flat = [_bytes(np.ascontiguousarray(part)) for part in parts]
        sizes = np.array([len(part) for part in flat])
        table = np.stack(self.all_gather(sizes, "sizes of all_to_all"))
        with self._met("all_to_all", int(sizes.max())) as longest:
            lengths = table[:, self.rank].tolist()
            found = self._carry(lambda transport: transport.all_to_all(flat, lengths, max(longest)))
        return [_array(part, dtype, ()) for part in found]

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of the arrays of all processes, the same to the bit on all: each adds a part, in their order."""
        if self.size == 1:
            return array
        parts = self.all_to_all(np.array_split(array.ravel(), self.size))
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        return self.joined(total).reshape(array.shape)

    def mean(self, value: float) -> float:
        """The mean of a number of each process, the same on all."""
        if self.size == 1:
            return value
        return float(np.mean(self.joined(np.array([value]))))

    def least(self, value: int) -> int:
        """The least of an integer of each process."""
        return value if self.size == 1 else int(np.min(self.joined(np.array([value]))))

    def beside(self) -> int:
        """How many processes run on this host, with this one."""
        own = digest_of(socket.gethostname())
        return sum(bytes(found) == own for found in self.all_gather(np.frombuffer(own, np.uint8)))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return flag if self.size == 1 else bool(self.joined(np.array([flag])).any())

    def from_first(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The first process's arrays; the others give arrays of the same shapes and types."""
        if self.size == 1:
            return list(arrays)
        return [self._from_first(np.ascontiguousarray(array)) for array in arrays]

    def _from_first(self, array: np.ndarray) -> np.ndarray:
        with self._met("broadcast", array.nbytes) as sizes:
            if len(set(sizes)) > 1:
                raise RuntimeError(f"Processes broadcast arrays of {sorted(set(sizes))} bytes.")
            data = _bytes(array)
            if data.size:
                data = self._carry(lambda transport: transport.broadcast(data))
        return _array(data, array.dtype, ()).reshape(array.shape)

    def same(self, thing: _T) -> _T:
        """The first process's object, which can be pickled, for all."""
        if self.size == 1:
            return thing
        own = pickle.dumps(thing) if self.first else b""
        return pickle.loads(self.all_gather(np.frombuffer(own, np.uint8))[0].tobytes())

    def settle(self) -> None:
        """Waits until all have come so far: what has failed on another process is raised here."""
        if self.size > 1 and self._depth:
            with self._met("settle", 0):
                pass

    def check_same(self, **digests: bytes) -> None:
        """Refuses processes that differ in something.

        Args:
            digests: Of each thing, by what messages call it, with `_` for a space; see `digest_of`.

        Raises:
            ValueError: On all processes, with the numbers of those that differ from the first one.
        """
        if self.size == 1:
            return
        names = sorted(digests)
        found = self.all_gather(np.frombuffer(b"".join(digests[name] for name in names), np.uint8).reshape(-1, DIGEST))
        for place, name in enumerate(names):
            others = [rank for rank, part in enumerate(found) if not np.array_equal(part[place], found[0][place])]
            if others:
                raise self._differ(others, f"other {name.replace('_', ' ')} than process 0")

    def differ(self, digest: bytes) -> bool:
        """Whether processes have other digests than the first one."""
        return self.size > 1 and len({bytes(found) for found in self.all_gather(np.frombuffer(digest, np.uint8))}) > 1

    def check_same_words(self, words: Mapping[str, str]) -> None:
        """The same for things that can be told, by their names."""
        if self.size == 1:
            return
        text = np.frombuffer(json.dumps(words, sort_keys=True).encode(), np.uint8)
        first, *rest = (json.loads(part.tobytes()) for part in self.all_gather(text))
        for name in sorted({name for words in (first, *rest) for name in words}):
            others = [1 + place for place, other in enumerate(rest) if other.get(name) != first.get(name)]
            if others:
                told = f"{name}={rest[others[0] - 1].get(name)}, and process 0 {first.get(name)}"
                raise self._differ(others, told)

    def _differ(self, others: Sequence[int], what: str) -> ValueError:
        which = f"process {others[0]} has" if len(others) == 1 else f"processes {', '.join(map(str, others))} have"
        return ValueError(
            f"The {self.size} processes that prune together differ: {which} {what}. Give all of them the same; nothing "
            "was pruned."
        )

    def _meet(self, name: str, number: int = 0) -> list[int]:
        """Exchanges headers; gives the numbers of all."""
        heads = self._heads(name, number)
        if any(failed for failed, _, _ in heads):
            self._raise_elsewhere(self._texts(b"", heads), heads)
        names = [name for _, name, _ in heads]
        if len(set(names)) > 1:
            self._ended = True
            told = ", ".join(f"process {rank}: {text!r}" for rank, text in enumerate(names))
            raise RuntimeError(
                f"The processes do different things ({told}). Have all of them make the same calls of "
                "keras_woodfisher, in one order, with the same arguments."
            )
        return [number for _, _, number in heads]

    @contextmanager
    def _met(self, name: str, number: int) -> Iterator[list[int]]:
        """The numbers of all; what is sent within follows the headers, whatever interrupts this process."""
        if not self._depth:
            raise RuntimeError(f"{name} outside of `together`.")
        with _uninterrupted():
            numbers = self._meet(name, number)
            try:
                yield numbers
            except BaseException:
                # The others wait for what was to follow the headers, and hear of nothing else.
                self._ended = True
                raise

    def _tell(self, error: BaseException) -> None:
        """Tells the others, at their next header, of an error."""
        self._ended = True
        text = as_text(error).encode(errors="backslashreplace")
        with suppress(LostProcessError), _uninterrupted():
            heads = self._heads("", len(text), failed=True)
            self._texts(text, heads)

    def _heads(self, name: str, number: int, failed: bool = False) -> list[tuple[bool, str, int]]:
        head = np.frombuffer(_HEADER.pack(failed, name.encode()[:55], number), np.uint8)
        found = self._gathered(head)
        unpacked = (_HEADER.unpack(part.tobytes()) for part in found)
        return [(failed, name.rstrip(b"\0").decode(errors="replace"), number) for failed, name, number in unpacked]

    def _texts(self, text: bytes, heads: Sequence[tuple[bool, str, int]]) -> list[str]:
        sizes = [number if failed else 0 for failed, _, number in heads]
        data = np.zeros(max(sizes), np.uint8)
        data[: len(text)] = np.frombuffer(text, np.uint8)
        found = self._gathered(data)
        return [part[:size].tobytes().decode(errors="replace") for part, size in zip(found, sizes, strict=True)]

    def _raise_elsewhere(self, texts: Sequence[str], heads: Sequence[tuple[bool, str, int]]) -> None:
        self._ended = True
        rank = next(rank for rank, (failed, _, _) in enumerate(heads) if failed)
        raise as_elsewhere(texts[rank], f"Process {rank} of {self.size} failed")

    def _gathered(self, data: np.ndarray) -> list[np.ndarray]:
        return self._carry(lambda transport: transport.all_gather(data))

    def _carry(self, send: Callable[[Transport], Any]) -> Any:
        assert self.transport is not None
        try:
            return send(self.transport)
        except Exception as error:
            self._ended = True
            raise LostProcessError(
                f"Process {self.rank} of {self.size} has lost the others ({self.transport.name}: {error}). One of them "
                "has ended, or left the work: look at what it wrote last."
            ) from error

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without warnings, but for the first process."""
        if self.first:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _array(data: np.ndarray, dtype: Any, rest: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(data).view(dtype).reshape(-1, *rest) if rest else np.ascontiguousarray(data).view(dtype)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait: a process that stopped between a header and what follows it would leave the others there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
