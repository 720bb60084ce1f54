"""Where the gradient samples of an update come from, and samples of given data."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras_woodfisher_backends.nest import arrays, take
from keras_woodfisher_backends.protocol import Backend, SlowLayers
from keras_woodfisher_backends.ranks.digests import digest_of
from keras_woodfisher_backends.ranks.joint import current_ranks
from keras_woodfisher_backends.ranks.shares import row_share

from keras_woodfisher.gradients.footprint import Footprint, PassBytes, counted_outputs, is_plain, sampled_footprint
from keras_woodfisher.gradients.gauss_newton import GaussNewtonLoss
from keras_woodfisher.gradients.loss import ModelLoss
from keras_woodfisher.gradients.sampling import HalvingSampler, sample_gradients
from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.model.batches import Batch, between, even_chunks
from keras_woodfisher.model.examples import ArrayExamples, Examples
from keras_woodfisher.model.targets import Target, tensors_of
from keras_woodfisher.options.pruning_options import PruningOptions


class GradientSource(Protocol):
    """Gives G at an update."""

    @property
    def slow_layers(self) -> SlowLayers | None:
        """Layers that make sampling slow, as far as they are known by now."""
        ...

    def check(self, rows: int) -> None:
        """Raises now what would fail later."""
        ...

    def footprint(self, rows: int) -> Footprint:
        """The memory that taking so many samples needs; after `check`."""
        ...

    def fill(
        self, store: GradientStore, kept: Sequence[np.ndarray], rows: int, draw: int, advance: Callable[[int], None]
    ) -> float:
        """Puts samples of the unpruned weights into a store, the same ones at each call with the same arguments.

        Args:
            store: Takes (m, d) float32, m at most `rows`.
            kept: For each variable the bool mask of its unpruned weights, in weight order.
            rows: How many samples to use.
            draw: Number of the update, so that each one draws other examples.
            advance: Called with the number of samples that were taken.

        Returns:
            The sum of all squares of those samples.
        """
        ...


GRADIENT_EXAMPLES = 1024
"""Examples that a gradient of the mean loss is taken of, at most."""

_COMPARED = 32
"""Groups that are looked at, alone and together, where the loss of one doesn't depend on the outputs."""

_SIGNS, _GRADIENTS = 1, 2
"""What random numbers are for, beside the choice of samples."""


class SampledGradients:
    """Samples taken from data at the present weights.

    Args:
        model: A built model.
        targets: The variables to differentiate.
        options: How samples are taken.
        backend: Takes them.
        examples: What they are taken of.
        loss: A Keras loss instead of the compiled one.

    Attributes:
        targets: The variables to differentiate.
        loss: The loss of the model.
    """

    def __init__(
        self,
        model: keras.Model,
        targets: Sequence[Target],
        options: PruningOptions,
        backend: Backend,
        examples: Examples,
        loss: Any = None,
    ):
        self.targets = list(targets)
        _refuse_modules(self.targets)
        self.loss = ModelLoss(model, targets, loss)
        self._options = options
        self._backend = backend
        self._model = model
        # Examples may be read several times: without a seed one is drawn, for all of them.
        drawn = int(np.random.default_rng().integers(2**32)) if options.seed is None else options.seed
        self._seed = current_ranks().same(drawn)
        self._examples = examples
        self._curvature = GaussNewtonLoss(model, targets, loss) if options.fisher == "ggn" else None
        self._samplers: dict[int, HalvingSampler] = {}
        self._probed: tuple[Any, PassBytes] | None = None
        self._but_for = ""
        self._own_stream = False

    @property
    def available(self) -> int | None:
        """How many samples the data can give, to each process where several prune together; None if not known."""
        examples = self._examples.available
        return None if examples is None else current_ranks().least(examples // self._options.grad_batch_size)

    @property
    def square_scale(self) -> float:
        """What the squares of a sample are to be multiplied by to be those of one example."""
        if self.loss.summed:
            return 1.0 / self._options.grad_batch_size
        # A mean over b gradients has about a b-th of the squares of one; a Gauss-Newton sample hasn't.
        return self._options.grad_batch_size if self._curvature is None else 1.0

    @property
    def slow_layers(self) -> SlowLayers | None:
        found = [sampler.slow_layers for sampler in self._samplers.values()]
        return next((slow for slow in found if slow is not None), None)

    def hold_out(self, count: int) -> list[Batch]:
        """Sets so many examples aside, so that no sample is taken of them: batches, leaves (n, ...).

        Raises:
            ValueError: If there aren't so many, and at least one for the samples.
        """
        held, self._examples = self._examples.hold_out(count, self._seed)
        self._but_for = f" beside the {count} that are held out"
        return held

    def take_gradients(self) -> None:
        """Takes gradients of the loss from now on, whatever the options say of Gauss-Newton samples."""
        self._curvature = None

    def check(self, rows: int) -> None:
        size = self._options.grad_batch_size
        self._compare()
        if not self._own_stream and self.available is not None and self.available < rows:
            raise ValueError(
                f"num_grads={rows} with grad_batch_size={size} needs {rows * size} examples, but data holds "
                f"{self._examples.available}{self._but_for}. {self._fitting(rows)}"
            )
        first = next(self._examples.groups(1, size, self._seed), None)
        if first is None:
            raise ValueError(
                f"data gives no group of grad_batch_size={size} examples: it holds fewer, or not so many of one shape "
                "in a row, or a callable doesn't return a fresh iterator at each call. Lower grad_batch_size, or give "
                "more data."
            )
        with counted_outputs(self._model) as passed:
            depends = self.loss.probe(first, self._backend.outlined)
        if isinstance(self._examples, ArrayExamples):
            self.loss.check_classes(self._examples.labels)
        if not depends:
            self.loss.check_size(self._alike(_COMPARED))
        if self._curvature is not None:
            self._curvature.output_shape(first, self._backend.outlined)
            self._curvature.label_sums(self._examples.labels if isinstance(self._examples, ArrayExamples) else first[1])
        passed.plain = is_plain(self.loss.losses)
        self._probed = first, passed

    def _compare(self) -> None:
        """Finds out whether processes that prune together have the same data: arrays must be, streams may be parts."""
        ranks = current_ranks()
        if ranks.size == 1:
            return
        if isinstance(self._examples, ArrayExamples):
            ranks.check_same(data=self._examples.digest())
            return
        first = next(self._examples.groups(1, self._options.grad_batch_size, self._seed), None)
        self._own_stream = ranks.differ(digest_of(*([] if first is None else arrays(first))))

    def _alike(self, number: int) -> list[Batch]:
        """The first groups of one shape."""
        chunk = next(
            even_chunks(self._examples.groups(number, self._options.grad_batch_size, self._seed), lambda b: number)
        )
        return [take(chunk[0], place) for place in range(chunk[1])]

    def _fitting(self, rows: int) -> str:
        """What would fit the examples that there are."""
        examples, size = self._examples.available or 0, self._options.grad_batch_size
        fits = [f"num_grads={examples // size}"] if examples >= size else []
        if size > 1 and examples >= rows:
            fits.append(f"grad_batch_size={examples // rows}")
        fits = fits or [f"num_grads={examples} with grad_batch_size=1"]
        return f"{' or '.join(fits)} would fit."

    def footprint(self, rows: int) -> Footprint:
        if self._probed is None:
            self.check(rows)
        assert self._probed is not None
        return sampled_footprint(self._model, self.targets, self._backend, rows, *self._probed)

    def fill(
        self, store: GradientStore, kept: Sequence[np.ndarray], rows: int, draw: int, advance: Callable[[int], None]
    ) -> float:
        ranks, size, stream = current_ranks(), self._options.grad_batch_size, self._stream(draw)
        share = row_share(rows, ranks.rank, ranks.size)
        if self._own_stream:
            found = (
                self._examples.groups(share.stop - share.start, size, stream) if share.stop > share.start else iter(())
            )
        else:
            found = between(self._examples.groups(rows, size, stream), share.start, share.stop)
        groups = self.loss.checked(found)
        pairs = list(zip(self.targets, kept, strict=True))
        loss, prepare = self.loss, None
        if self._curvature is not None:
            signs = self._stream(draw, _SIGNS)
            loss, prepare = self._curvature, self._curvature.signs(signs, self._backend.outlined, share.start)
        return sample_gradients(self._sampler_of(loss), groups, pairs, rows, store, advance, prepare)

    def mean_gradient(
        self, weights: np.ndarray, kept: Sequence[np.ndarray], draw: int, number: int, size: int
    ) -> tuple[np.ndarray, int]:
        """The gradient of the mean loss at other weights than the model's.

        Args:
            weights: (N,) all chosen weights, in weight order.
            kept: As in `fill`.
            draw: Number of the update.
            number: Number of the gradient within it: of arrays each has examples of its own; a stream is read from its
                beginning.
            size: Examples to differentiate at a time, fewer where memory is full.

        Returns:
            (d,) float64, of the unpruned weights, and the number of examples.

        Raises:
            ValueError: If data gives no example.
        """
        available = self._examples.available
        examples = GRADIENT_EXAMPLES if available is None else min(available, GRADIENT_EXAMPLES)
        size = min(size, examples)
        while True:
            try:
                total, groups = self._sum(weights, kept, self._stream(draw, _GRADIENTS + number), examples, size)
                if groups:
                    return total / (groups * size if self.loss.summed else groups), groups * size
                # So many examples of one shape never follow each other in a stream.
                if size == 1:
                    raise ValueError("data gave no example to take a gradient of, though it did before.")
            except MemoryError:
                if size == 1:
                    raise
            size //= 2

    def _sum(
        self, weights: np.ndarray, kept: Sequence[np.ndarray], stream: Any, examples: int, size: int
    ) -> tuple[np.ndarray, int]:
        """The sum of the gradients of groups of `size` examples, and how many groups there are."""
        total, number = np.zeros(int(sum(mask.sum() for mask in kept))), 0
        _, others = self.loss.values()
        values = tensors_of(self.targets, weights)
        sampler = self._sampler_of(self.loss)
        with self.loss.sampling_mode():
            ranks, most = current_ranks(), examples // size
            share = slice(most * ranks.rank // ranks.size, most * (ranks.rank + 1) // ranks.size)
            groups = self.loss.checked(between(self._examples.groups(most, size, stream), share.start, share.stop))
            for batch, _ in even_chunks(groups, lambda b: 1):
                rows = zip(self.targets, sampler(values, others, batch), kept, strict=True)
                total += np.concatenate([target.flatten(row[0])[mask] for target, row, mask in rows])
                number += 1
        return ranks.sum(total), int(ranks.sum(np.array([number]))[0])

    def _stream(self, draw: int, purpose: int = 0) -> Any:
        """The seed of an update. The first draw is `default_rng(seed)` itself; each later one has its own stream."""
        if not (draw or purpose):
            return self._seed
        return [self._seed, draw, purpose] if purpose else [self._seed, draw]

    def _sampler_of(self, loss: ModelLoss) -> HalvingSampler:
        if id(loss) not in self._samplers:
            sampler = self._backend.sampler(loss, self._model, [t.variable for t in self.targets])
            self._samplers[id(loss)] = HalvingSampler(loss, sampler, self._backend)
        return self._samplers[id(loss)]


def _refuse_modules(targets: Sequence[Target]) -> None:
    # Their parameters are read past Keras, so that no sample depends on what is put in place of them.
    found = [target.name for target in targets if isinstance(target.layer, keras.layers.TorchModuleWrapper)]
    if found:
        raise ValueError(
            f"{found[0]} belongs to a torch module in a TorchModuleWrapper, of which no gradient samples can be taken. "
            "Put it in `exclude`, prune it by method='magnitude', or while training with buffered gradients "
            "(WoodFisherPruning without `data`)."
        )
