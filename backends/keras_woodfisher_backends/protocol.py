"""The contract between the core and a framework.

Letters used in every docstring of this package:

    d   weights that may be pruned          B   weights in one block
    m   gradient samples (rows of G)        b   examples averaged into one sample
    G   the (m, d) matrix of samples        n   groups of b examples in one chunk

Row k of `G` is the gradient of the `Loss` of group k, float32. The Fisher of a block is `F = damp I + (1/m) G^T G` over
its columns of `G`, (B, B); `damp` has the unit of a squared gradient.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.ranks.transport import Transport


class Loss(Protocol):
    """The scalar loss of one group of b examples, as a function of tensors alone: it has no other state.

    `values` are tensors for the variables to differentiate, each of its variable's shape, `others` tensors for all
    other variables of the model.

    Attributes:
        model: The model that it runs.
    """

    model: Any

    @property
    def identity(self) -> Hashable:
        """Equal for losses that are the same function."""
        ...

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> Any:
        """`measure(batch, predict(values, others, batch))`, a scalar tensor.

        `batch` is (x, y, sample_weight), whose leaves have shape (b, ...); y and sample_weight may be None.
        """
        ...

    def predict(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> Any:
        """The model's output, in inference mode, for any number of examples, which don't influence each other."""
        ...

    def scope(self, values: Sequence[Any], others: Sequence[Any]) -> AbstractContextManager[Any]:
        """A context in which the model's variables have these values."""
        ...

    def measure(self, batch: Any, prediction: Any) -> Any:
        """The loss of one group, a scalar tensor, given its part (b, ...) of the output."""
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
        return f"gradients of {', '.join(self.names)} are taken one sample at a time: {self.reason}"


class Sampler(Protocol):
    """Gradients of chunks of groups."""

    @property
    def slow_layers(self) -> SlowLayers | None:
        """The layers that keep a faster way from being used, as far as calls have shown; None if there are none."""
        ...

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Any) -> list[np.ndarray]:
        """The gradient of each group of a chunk: for each of `values`, a float32 array (n, *shape).

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
        """The block-wise inverse-Fisher mathematics on one device, see `BlockKernel`.

        It has as many lanes as make it fast, which is what takes most memory (`BlockKernel.with_lanes` gives others).
        "cpu" is the fastest way known on the host's processor (the NumPy kernel); a numbered
        device, "cpu:0" included, runs the framework's own operators there.

        Raises:
            ValueError: If there is no such device (the message lists those that exist).
        """
        ...

    def free_memory(self, device: str) -> int | None:
        """Bytes that are free on a device; None for the host, and where the framework doesn't know."""
        ...

    def peak_memory(self, device: str) -> int | None:
        """Most bytes in use on a device so far; None for the host, and where the framework doesn't know."""
        ...

    def placed(self, device: str) -> AbstractContextManager[Any]:
        """A context in which `keras.ops` computes on a device, in full float32 and without gradients."""
        ...

    def in_turn(self) -> AbstractContextManager[Any]:
        """A context that threads enter to begin operations on tensors; a lock where only one of them may at a time."""
        ...

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error says that the memory of a device, or of the host, is full.

        If so, memory that the framework holds in reserve on devices is released, where it can be.
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

    def compiled(self, function: Callable[..., Any], loss: Loss) -> Callable[..., Any]:
        """The same function of nested structures of tensors, compiled where that gives the same numbers.

        It is compiled once for losses of the same identity.
        """
        ...

    def outlined(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives; on JAX zeros like it, for which nothing is compiled.

        Where the function looks at values, it is called a second time, with values.
        """
        ...

    def dry_call(self, function: Callable[[Any], None], x: Any) -> None:
        """Calls a function of a nest of arrays for what it learns of shapes; on JAX nothing is compiled for that.

        Where the function looks at values, it is called a second time, with values.
        """
        ...

    def unfollowed(self, model: Any) -> str:
        """What trains a model that pruning can't follow: a strategy, or variables that are held in parts; or ""."""
        ...

    def transport(self) -> Transport | None:
        """What connects the processes that train together, always the same one; None where there is only this one.

        Where it isn't known yet, all of them have to ask for it.
        """
        ...

    def whole(self, variable: Any) -> np.ndarray:
        """A variable's value, or a tensor's, on the host; where processes hold parts of it, all have to ask for it."""
        ...

    def spread(self, array: np.ndarray, variable: Any) -> Any:
        """What a variable can be assigned to take a value that is the same on all processes, each for itself."""
        ...

    def chunk_groups(self, examples: int, model: Any = None) -> int:
        """How many groups (n) of b = `examples` a chunk should hold to be fast with a model; at least one."""
        ...

    def write_row(self, buffer: Any, slot: Any, row: Any) -> None:
        """Writes `row` (d,) into row `slot`, an integer tensor, of the Keras variable `buffer` (m, d), in place.

        Called inside the training step, so `slot` may be a tensor that is being traced.
        """
        ...
