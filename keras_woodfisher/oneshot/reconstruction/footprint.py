"""How much memory reconstruction takes, and how many examples at a time that allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree
from keras_woodfisher_backends.keras_internals.graphs import Graphs

from keras_woodfisher.options.sizes import size_text

TOGETHER = 3
"""Layers that are solved after one pass, where the examples don't fit into memory at once."""


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
        bytes: What that takes at most, by an estimate.
        limit: What it may take.
        reason: Where the limit comes from.
    """

    chunk: int
    chunks: int
    bytes: int
    limit: int
    reason: str

    def __str__(self) -> str:
        how = "in one pass" if self.chunks == 1 else f"{self.chunk} at a time"
        use = f"about {size_text(self.bytes)} of the {size_text(self.limit)} that may be used ({self.reason})"
        return f"examples {how}, {use}"


def plan_chunks(examples: int, live: int, work: Sequence[int], limit: int, reason: str) -> Plan:
    """As many examples at a time as fit.

    Args:
        examples: How many there are.
        live: Bytes of outputs that are alive at a time, for each example.
        work: Bytes that each problem takes while it is solved, with its rows.
        limit: Bytes that may be used.
        reason: Where the limit comes from.

    Raises:
        MemoryError: If not even one example does.
    """
    one_by_one = sorted(work)[-1:] or [0]
    together = sum(sorted(work)[-TOGETHER:])
    whole = 2 * examples * live + one_by_one[0]
    if whole <= limit:
        return Plan(examples, 1, whole, limit, reason)
    chunk = (limit - together) // (2 * live) if live else examples
    if chunk < 1:
        least = together + 2 * live
        raise MemoryError(
            f"Reconstruction needs at least {size_text(least)} of memory, but {size_text(limit)} may be used "
            f'({reason}). Give memory_limit="{-(-least // 2**20)} MiB", or choose fewer or smaller variables with '
            "params or exclude."
        )
    chunk = min(chunk, -(-examples // 2))
    return Plan(chunk, -(-examples // chunk), together + 2 * chunk * live, limit, reason)
