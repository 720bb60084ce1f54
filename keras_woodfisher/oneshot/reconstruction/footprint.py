"""How much memory reconstruction takes, and how many examples at a time that allows."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree
from keras_woodfisher_backends.keras_internals.graphs import Graphs

from keras_woodfisher.options.sizes import size_text

TOGETHER = 3
"""Layers that are solved after one pass at most, where the examples don't fit into memory at once."""

HELD_OUT = 10
"""One example in so many is held out, to measure what nothing was fitted to."""

_FEW = 16
"""With fewer examples at a time passes take long."""


class LiveOutputs:
    """Follows, call by call, how many bytes of layers' outputs are alive at a time.

    Within a functional model outputs go after their last use; within other layers all stay until the call ends.

    Args:
        graphs: The functional models, watched.
    """

    def __init__(self, graphs: Graphs):
        self._graphs = graphs
        self._open: list[int] = []
        self.peak = 0

    def call(self, layer: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a layer."""
        if self._graphs.runs(layer):
            return own(*args, **kwargs)
        self._open.append(0)
        output = own(*args, **kwargs)
        self._open.pop()
        size = size_of(output)
        # Beside its output a layer holds its input, perhaps in another order.
        self.peak = max(self.peak, size_of(self._graphs.known()) + sum(self._open) + 2 * size + size_of(args))
        if self._open:
            self._open[-1] += size
        return output


def size_of(nest: Any) -> int:
    """Bytes of all tensors of a nest."""
    return sum(bytes_of(leaf) for leaf in tree.flatten(nest) if hasattr(leaf, "shape"))


def bytes_of(tensor: Any) -> int:
    """Bytes of a tensor."""
    name = keras.backend.standardize_dtype(tensor.dtype)
    return int(np.prod(tensor.shape)) * (
        1 if name == "bool" else np.dtype("float32" if name == "bfloat16" else name).itemsize
    )


@dataclass(frozen=True)
class Plan:
    """How the examples are worked on.

    Attributes:
        chunk: Examples at a time.
        chunks: How many chunks there are; with one, each layer is solved where it is called.
        together: Layers that are solved after one pass, where there are several chunks.
        bytes: What that takes at most, by an estimate.
        limit: What it may take.
        reason: Where the limit comes from.
        room: Bytes of it for what a pass leaves to the next one, which goes on from there.
    """

    chunk: int
    chunks: int
    together: int
    bytes: int
    limit: int
    reason: str
    room: int = 0

    def __str__(self) -> str:
        how = "in one pass" if self.chunks == 1 else f"{self.chunk} at a time"
        use = f"about {size_text(self.bytes)} of the {size_text(self.limit)} that may be used ({self.reason})"
        return f"examples {how}, {use}"


@dataclass(frozen=True)
class Needs:
    """What reconstruction takes, in bytes.

    Attributes:
        example: An example's inputs.
        live: Outputs that are alive at a time, for each example of one model.
        sums: For each problem what it keeps of the rows it has seen.
        work: The most that any problem takes while it sees rows or is solved.
        amid: What a pass leaves to the next one, so that it goes on from there, at half of the places at most; 0: it
            can't. For each example of one model.
    """

    example: int
    live: int
    sums: Sequence[int]
    work: int
    amid: int = 0

    def bytes(self, examples: int, chunk: int, together: int) -> int:
        """All of that.

        Args:
            examples: How many there are; they are read beside whatever the caller has.
            chunk: How many are worked on at a time, by the dense and the pruned model.
            together: How many problems see the same pass.
        """
        read = self.example * (examples + -(-examples // HELD_OUT))
        each = 2 * (self.live + 2 * self.example)
        return read + chunk * each + sum(sorted(self.sums)[-together:]) + self.work


_MORE = 1.16
"""A limit so many times what is needed now is enough for what is read then."""


def plan_chunks(examples: int, needs: Needs, limit: int, reason: str, free: int = sys.maxsize) -> Plan:
    """As many examples at a time as fit, and then as many layers.

    Args:
        examples: How many there are.
        needs: What they take.
        limit: Bytes that may be used.
        reason: Where the limit comes from.
        free: Bytes that there are, whatever limit is given.

    Raises:
        MemoryError: If not even one example and one layer do.
    """
    whole = needs.bytes(examples, examples, TOGETHER)
    if whole <= limit:
        return Plan(examples, 1, TOGETHER, whole, limit, reason)
    least = needs.bytes(examples, 1, 1)
    if least > limit:
        # With more memory, more examples are read (`_INPUTS` in `pruning`), which take at most a seventh of it.
        enough = int(_MORE * least)
        larger = f'Give memory_limit="{-(-enough // 2**20)} MiB". ' if enough <= free else ""
        raise MemoryError(
            f"Reconstruction needs at least {size_text(least)} of memory, but {size_text(limit)} may be used "
            f"({reason}). {larger}Choose fewer or smaller variables with params or exclude."
        )
    together = next(n for n in range(TOGETHER, 0, -1) if n == 1 or needs.bytes(examples, _FEW, n) <= limit)
    room = 0
    if needs.amid:
        room = max(0, min(2 * needs.live * examples, (limit - needs.bytes(examples, _FEW, together)) // 2))
        if room >= 2 * needs.amid * examples:
            # Passes are short then, and a layer that is solved alone sees the errors of all that come before it.
            together = 1
    fixed = room + needs.bytes(examples, 0, together)
    chunk = (limit - fixed) // (room + needs.bytes(examples, 1, together) - fixed)
    chunk = min(chunk, -(-examples // 2))
    use = room + needs.bytes(examples, chunk, together)
    return Plan(chunk, -(-examples // chunk), together, use, limit, reason, room)
