"""The contract between the core and a framework.

Letters used in every docstring of this package:

    d   weights that may be pruned          B   weights in one block
    m   gradient samples (rows of G)        b   examples averaged into one sample
    G   the (m, d) matrix of samples        n   groups of b examples in one chunk
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from keras_woodfisher_backends.kernel.block_kernel import BlockKernel


class Loss(Protocol):
    """The scalar loss of one group of b examples, as a function of tensors alone.

    `values` are tensors for the variables to differentiate, `others` tensors for all other variables of
    the model. It reads no other state and writes none.
    """

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> Any:
        """`measure(batch, predict(values, others, batch))`, with `batch` = (x, y, sample_weight)."""
        ...

    def predict(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> Any:
        """The model's output, in inference mode, for examples that don't influence each other."""
        ...

    def measure(self, batch: Any, prediction: Any) -> Any:
        """The loss of one group, given its part of the output."""
        ...


@dataclass(frozen=True)
class SlowLayers:
    """Layers whose gradients are taken one group of examples at a time.

    Attributes:
        names: Their names.
        reason: Why there is no faster way.
    """

    names: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"gradients are taken one sample at a time because of {', '.join(self.names)}: {self.reason}"


class Sampler(Protocol):
    """Gradients of chunks of groups."""

    @property
    def slow_layers(self) -> SlowLayers | None:
        """What keeps the fast way from being used, as far as it is known by now; None if nothing does."""
        ...

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        """The gradient of each group of a chunk: for each of `values`, an array (n, *shape).

        The leaves of `batch` have shape (n, b, ...).
        """
        ...


class Backend(Protocol):
    """What the core asks of a framework. Nothing here knows about Keras callbacks or masks."""

    name: str

    def devices(self) -> list[str]:
        """Names that `kernel` accepts, such as "cpu", "cpu:0", "cuda:0"."""
        ...

    def kernel(self, device: str) -> BlockKernel:
        """The block-wise inverse-Fisher mathematics on one device.

        "cpu" is the fastest way known on the host's processor (the NumPy kernel); a numbered
        device, "cpu:0" included, runs the framework's own operators there.

        Raises:
            ValueError: If there is no such device (the message lists those that exist).
        """
        ...

    def free_memory(self, device: str) -> int | None:
        """Bytes that are free on a device, or None where the framework can't tell."""
        ...

    def peak_memory(self, device: str) -> int | None:
        """Largest number of bytes in use on a device so far, or None where it can't tell."""
        ...

    def in_turn(self) -> AbstractContextManager[Any]:
        """Entered by threads that work on tensors side by side, where only one of them at a time may begin to."""
        ...

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error says that the memory of a device, or of the host, is full.

        What can be given back to the device is.
        """
        ...

    def sampler(self, loss: Loss, model: Any, variables: Sequence[Any]) -> Sampler:
        """Compiles (where the framework does so) the gradients of `loss` for chunks of groups.

        A chunk of the same shapes is never compiled again, whatever the values.

        Args:
            loss: See `Loss`.
            model: The Keras model that `loss` runs; adapters may look at its layers.
            variables: The Keras variables that `values` stand for.
        """
        ...

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of nested structures of tensors, compiled where that gives the same numbers."""
        ...

    def chunk_groups(self, examples: int) -> int:
        """How many groups of b = `examples` a chunk should hold to be fast."""
        ...

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        """Writes `row` (d,) into row `slot` of the Keras variable `buffer` (m, d), in place.

        Called inside the training step, so `slot` may be a tensor that is being traced.
        """
        ...
