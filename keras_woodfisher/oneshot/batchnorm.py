"""BatchNorm re-estimation: the moving statistics of a pruned model, measured anew on training examples."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.nest import map_arrays
from keras_woodfisher_backends.ranks.joint import current_ranks, jointly

from keras_woodfisher.gradients.loss import ModelLoss, has_loss, mean_loss
from keras_woodfisher.model.batches import length
from keras_woodfisher.model.examples import Examples, open_examples, read_batches
from keras_woodfisher.model.restoring import restored
from keras_woodfisher.model.targets import check_model
from keras_woodfisher.oneshot.batchnorm_statistics import batchnorm_layers, call_order, measure, name_of
from keras_woodfisher.options.checks import one_of
from keras_woodfisher.pruning.agreement import average_statistics
from keras_woodfisher.reports.batchnorm_report import BatchNormReport
from keras_woodfisher.reports.meter import Meter, say

EXAMPLES = 2048
"""How many are used unless something else is said."""


@jointly
def reestimate_batchnorm(  # noqa: PLR0913
    model: keras.Model,
    data: Any,
    *,
    dense: keras.Model | None = None,
    loss: Any = None,
    num_examples: int | None = EXAMPLES,
    batch_size: int = 256,
    seed: int | None = 0,
    verbose: int = 1,
) -> BatchNormReport:
    """Measures the moving mean and variance of each BatchNorm layer anew; nothing else is changed.

    Pruning shifts what each layer gets, and the statistics from before don't fit any more. Layer after layer, in the
    order in which the model calls them, mean and variance of what a layer gets over all examples replace its moving
    statistics, the layers before it being done already. There is no momentum and no average of averages: both are
    exact over the examples, however they are batched. A layer that is called several times gets the statistics of all
    its calls, made with its old ones. The model runs in inference mode, for each layer up to that layer: that is about
    `L / 2` passes over the examples for L layers.

    The examples must be what the model was trained on, *with the training's augmentation*: plain images have other
    statistics than cropped and flipped ones, and with them even a dense model loses accuracy. Give the dense model to
    have that checked.

        >>> report = kw.prune(model, sparsity=0.5, method="magnitude")
        >>> report = kw.reestimate_batchnorm(model, x, num_examples=200, verbose=0)
        >>> report.layers, report.examples
        (('sequential/batch_normalization',), 200)

    `prune(..., reestimate_batchnorm=True)` does all of it. Where several processes train together, all of them call
    this, and get the mean of what each has measured.

    Args:
        model: A built Keras model, usually one that was pruned.
        data: Training examples: whatever `fit` takes, or a callable that returns a fresh iterator of batches. They
            are read once. Labels are needed only with `dense`.
        dense: The model before pruning. Its statistics are measured in the same way, its loss is compared, and a
            warning says if it gets worse; then it is put back as it was.
        loss: A Keras loss for `dense`; by default the one that it was compiled with.
        num_examples: How many to use, of arrays drawn with `seed`; fewer if there are no more. None: all.
        batch_size: Examples in one batch. It has no influence on the result.
        seed: Of the choice of examples from arrays.
        verbose: 0 silent, 1 a progress bar, 2 one line.

    Returns:
        Which layers were done, and the dense model's losses; `print` it.

    Raises:
        ValueError: If there is no BatchNorm layer to measure, the data is empty, or a statistic isn't finite. Nothing
            is changed then, nor if the work is interrupted.
    """
    one_of("verbose", verbose, (0, 1, 2))
    work = Reestimation(model, open_examples(data), num_examples, batch_size, seed)
    if verbose:
        say("BatchNorm re-estimation")
    passes = 1 if dense is None else 2
    bar = keras.utils.Progbar(passes * work.total, verbose=verbose, unit_name="layer")
    if dense is not None:
        work.check_dense(dense, loss, lambda: bar.add(1))
    report = work.run(lambda: bar.add(1))
    average_statistics(model, current_ranks())
    return report


class Reestimation:
    """The work in steps: what can be found out beforehand, the check of the dense model, the re-estimation.

    Its arguments are those of `reestimate_batchnorm`.

    Attributes:
        total: Layers to measure.

    Raises:
        ValueError: If there is nothing to measure.
    """

    def __init__(self, model: keras.Model, examples: Examples, num_examples: int | None, batch_size: int, seed: Any):
        self._model = model
        found = _measurable_layers(model)
        self._batches = read_batches(examples, num_examples, batch_size, seed)
        trained = [layer for layer in found if layer.trainable]
        self._order = call_order(model, trained, self._batches[0])
        if not self._order:
            raise ValueError(
                f"The model {model.name!r} calls none of its {len(trained)} BatchNorm layers that aren't frozen, so "
                "there is nothing to re-estimate. Leave BatchNorm re-estimation out."
            )
        self.total = len(self._order)
        called = {id(layer) for layer, _ in self._order}
        self._left_alone = tuple(name_of(layer) for layer in found if id(layer) not in called)
        self._dense_loss: tuple[float, float] | None = None

    def check_dense(self, dense: keras.Model, loss: Any, advance: Callable[[], None]) -> None:
        """Measures the dense model's loss with its own and with measured statistics, and warns if it gets worse.

        The model is left as it was; `advance` is called after each layer.

        Raises:
            ValueError: If there is no loss, or it can't be computed.
        """
        if loss is None and not has_loss(dense):
            raise ValueError(
                f"The model {dense.name!r} isn't compiled with a loss, so whether this data suits its BatchNorm layers "
                "can't be checked. Compile it, or give `loss=`."
            )
        ModelLoss(dense, (), loss).probe(map_arrays(lambda array: array[None, :1], self._batches[0]))
        found = _measurable_layers(dense)
        order = call_order(dense, [layer for layer in found if layer.trainable], self._batches[0])
        with restored(_statistics(found)):
            own = mean_loss(dense, self._batches, loss)
            for layer, calls in order:
                measure(dense, layer, calls, self._batches)
                advance()
            self._dense_loss = own, mean_loss(dense, self._batches, loss)
        if not self._report().dense_keeps_accuracy:
            warnings.warn(
                f"The dense model's loss on this data grows from {own:.4g} to {self._dense_loss[1]:.4g} when its "
                "BatchNorm statistics are measured on it: the data isn't what the model was trained on, and the pruned "
                "model will suffer in the same way. Is the training's augmentation missing? Give training examples as "
                "training saw them (augmented arrays, or a dataset or callable that augments), or leave BatchNorm "
                "re-estimation out.",
                stacklevel=4,
            )

    def run(self, advance: Callable[[], None]) -> BatchNormReport:
        """Measures all layers, and calls `advance` after each; if one fails, all are as before."""
        with restored(_statistics([layer for layer, _ in self._order]), only_on_failure=True):
            for layer, calls in self._order:
                measure(self._model, layer, calls, self._batches)
                advance()
            # What fails on one of several processes is undone on all.
            current_ranks().settle()
        return self._report()

    def _report(self) -> BatchNormReport:
        done = tuple(name_of(layer) for layer, _ in self._order)
        return BatchNormReport(done, self._left_alone, sum(map(length, self._batches)), self._dense_loss)


def takes_data(wanted: Any) -> bool:
    """Whether `prune(reestimate_batchnorm=wanted)` measures statistics on the examples that gradients are taken of."""
    return isinstance(wanted, (bool, np.bool_)) and bool(wanted)


def reestimation_of(
    model: keras.Model, wanted: Any, examples: Examples | None, loss: Any, seed: Any, meter: Meter
) -> Reestimation | None:
    """What `prune` is to re-estimate after pruning, with its dense model checked; None for nothing.

    `wanted` is True, False, or data to use instead of `examples`, those that gradients are taken of.

    Raises:
        ValueError, TypeError: If it can't be done.
    """
    if takes_data(wanted):
        if examples is None:
            raise ValueError(
                "reestimate_batchnorm=True needs data to measure statistics on: give data=(x, y), or "
                "reestimate_batchnorm=(x, y)."
            )
    elif isinstance(wanted, (bool, np.bool_)):
        return None
    elif wanted is None or isinstance(wanted, (int, float, str)):
        raise TypeError(f"reestimate_batchnorm must be True, False, or training examples, got {wanted!r}.")
    else:
        examples = open_examples(wanted)
    work = Reestimation(model, examples, EXAMPLES, 256, seed)
    with meter.phase("batchnorm of the dense model", work.total, "layer") as advance:
        work.check_dense(model, loss, advance)
    return work


def _measurable_layers(model: keras.Model) -> list[Any]:
    """All BatchNorm layers of a model, of which one isn't frozen at least."""
    check_model(model)
    found = batchnorm_layers(model)
    if not found:
        raise ValueError(
            f"The model {model.name!r} has no BatchNormalization layer, so there is nothing to re-estimate. Leave "
            "BatchNorm re-estimation out."
        )
    if not model.built or any(layer.moving_mean is None for layer in found):
        raise ValueError(f"The model {model.name!r} isn't built yet. Call it on a batch of data first.")
    if all(not layer.trainable for layer in found):
        raise ValueError(
            f"All {len(found)} BatchNormalization layers of the model {model.name!r} are frozen, and frozen layers are "
            "left alone. Set `trainable = True` on them, or leave BatchNorm re-estimation out."
        )
    return found


def _statistics(found: list[Any]) -> list[Any]:
    return [variable for layer in found for variable in layer.non_trainable_variables]
