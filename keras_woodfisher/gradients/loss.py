"""The loss of a Keras model on examples, as a pure function, in inference mode and without regularisers."""

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.keras_internals.engines import assign_whole, value_here
from keras_woodfisher_backends.keras_internals.identity import identity
from keras_woodfisher_backends.keras_internals.models import (
    build_losses,
    compiled_losses,
    compute_loss,
    float32_computation,
    infer,
    layers_of,
    loss_outline,
    without_added_losses,
)
from keras_woodfisher_backends.nest import arrays, map_arrays, take

from keras_woodfisher.gradients.classes import ClassOutput, check_classes, class_outputs, one_hot_text
from keras_woodfisher.gradients.probing import check_examples_alone, check_shapes, depends
from keras_woodfisher.model.batches import Batch
from keras_woodfisher.model.inputs import check_inputs
from keras_woodfisher.model.targets import Target
from keras_woodfisher.model.tokens import check_tokens, token_inputs

Outlined = Callable[..., Any]


def called(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives."""
    return function(*args)


class ModelLoss:
    """The model's loss without regularisers, in inference mode and float32, as a function of tensors.

    Args:
        model: A built model.
        targets: The variables to differentiate.
        loss: A Keras loss to use instead of the compiled one.

    Attributes:
        model: The model.

    Raises:
        ValueError: If there is no loss to differentiate.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], loss: Any = None):
        self.model = model
        self._targets = [t.variable for t in targets]
        chosen = {id(v) for v in self._targets}
        self._others = [v for v in {id(v): v for v in model.variables}.values() if id(v) not in chosen]
        self._trainer = model if loss is None else _trainer_with(loss, model)
        self._classes: list[ClassOutput] | None = None
        if loss is None:
            check_loss(
                model, "Compile it, or give `loss=`; where add_loss or a train_step makes it, override compute_loss."
            )

    @property
    def summed(self) -> bool:
        """Whether the loss is a sum over the examples of a batch, not a mean."""
        reductions = self._reductions()
        return bool(reductions) and all(reduction == "sum" for reduction in reductions)

    @property
    def identity(self) -> Hashable:
        """Equal for losses that are the same function; see `Loss`."""
        return type(self), identity(self.model, self._targets, loss_outline(self._trainer))

    def values(self) -> tuple[list[Any], list[Any]]:
        """The present tensors of the variables to differentiate, and of all others."""
        return [value_here(v) for v in self._targets], [value_here(v) for v in self._others]

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Batch) -> Any:
        with self.scope(values, others):
            return self._measure(batch, infer(self.model, batch[0]))

    def predict(self, values: Sequence[Any], others: Sequence[Any], batch: Batch) -> Any:
        with self.scope(values, others):
            return infer(self.model, batch[0])

    def measure(self, batch: Batch, prediction: Any) -> Any:
        with keras.StatelessScope():
            return self._measure(batch, prediction)

    def probe(self, batch: Batch, outlined: Outlined = called) -> bool:
        """Computes the loss of one group, so that what doesn't fit together fails early.

        Losses that are built on first use are built here. All else, metrics included, is left as it was.

        Args:
            batch: Leaves (n, b, ...).
            outlined: See `Backend`.

        Returns:
            Whether the loss changes when the model's outputs for this group do.

        Raises:
            ValueError: If the data, the model and the loss don't fit together.
        """
        check_inputs(self.model, take(batch, 0)[0])
        check_tokens(token_inputs(self.model), batch[0])
        metrics = {id(v): ops.convert_to_numpy(v) for v in self.model.metrics_variables}
        try:
            first = map_arrays(ops.convert_to_tensor, take(batch, 0))
            with self.sampling_mode():
                prediction = outlined(self.predict, *self.values(), first)
                build_losses(self._trainer, first[1], prediction)
                try:
                    value = ops.convert_to_numpy(outlined(self.measure, first, prediction))
                except Exception:  # noqa: BLE001 - variables of a loss can't be made but here; all else fails again
                    value = ops.convert_to_numpy(self._measure(first, prediction))
        except Exception as error:
            self.check_classes(batch[1])
            if None in self._reductions():
                raise ValueError(
                    "The loss has reduction='none', so it gives a number for each example, and there is none to "
                    "differentiate. Use reduction='sum_over_batch_size' (or 'sum')."
                ) from error
            names = getattr(self._trainer, "output_names", None)
            if text := one_hot_text(self._classes or (), take(batch, 0)[1], names):
                raise ValueError(text) from error
            labels = "" if batch[1] is not None else "data holds no labels: give (x, y) if the loss needs them. "
            raise ValueError(f"{labels}The loss of the first examples in data can't be computed: {error}") from error
        finally:
            for variable in self.model.metrics_variables:
                # Those of a loss that was built just now begin at zero.
                assign_whole(variable, metrics.get(id(variable), np.zeros(variable.shape)))
        self.check_classes(batch[1])
        if np.ndim(value) != 0:
            raise ValueError(
                f"The loss of one group of examples has shape {np.shape(value)}, but must be a scalar. "
                "Use a loss with reduction='sum_over_batch_size'."
            )
        with self.sampling_mode(), forward_only():
            check_shapes(self.model, self.measure, first, prediction)
            return depends(self.measure, first, prediction)

    def check_size(self, groups: Sequence[Batch]) -> None:
        """Finds out whether groups of so few examples have a loss that depends on the model's outputs.

        Args:
            groups: A few of them, leaves (b, ...).

        Raises:
            ValueError: If only several groups together have one.
        """
        with self.sampling_mode(), forward_only():
            values = self.values()
            check_examples_alone(lambda x: self.predict(*values, (x, None, None)), self.measure, groups)

    def check_classes(self, labels: Any) -> None:
        """Refuses labels that are no class of the model, as soon as a loss was computed (else a ValueError)."""
        if self._classes:
            check_classes(self._classes, labels, getattr(self._trainer, "output_names", None))

    def checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, if labels are classes and tokens are embedded, where they are to be."""
        tokens = token_inputs(self.model)
        for batch in batches:
            check_tokens(tokens, batch[0])
            self.check_classes(batch[1])
            yield batch

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """The mode in which samples are taken: float32, and nothing but the loss; then all is put back.

        A regulariser would add one constant vector to each sample.
        """
        with float32_computation(self.model), without_added_losses(self.model, self._trainer):
            yield

    @property
    def losses(self) -> list[Any]:
        """The losses that the model is compiled with, each as it was given; none where it computes its own."""
        overridden = type(self._trainer).compute_loss is not keras.Model.compute_loss
        return [] if overridden else compiled_losses(self._trainer) or []

    def _reductions(self) -> list[str | None]:
        """Of each loss that the model is compiled with; "" where it is a plain function, None for "none"."""
        found = [getattr(loss, "reduction", "") for loss in compiled_losses(self._trainer) or []]
        return [None if reduction == "none" else reduction for reduction in found]

    def scope(self, values: Sequence[Any], others: Sequence[Any]) -> Any:
        """A context in which the model's variables have these values."""
        mapping = [*zip(self._targets, values, strict=True), *zip(self._others, others, strict=True)]
        return keras.StatelessScope(state_mapping=mapping)

    def _measure(self, batch: Batch, prediction: Any) -> Any:
        x, y, weight = batch
        try:
            return ops.cast(compute_loss(self._trainer, x, y, prediction, weight), "float32")
        finally:
            # Of a loss that fails, too: labels may be why.
            self._classes = class_outputs(self._trainer, prediction)


def has_loss(model: keras.Model) -> bool:
    """Whether a model is compiled with a loss, or computes one of its own."""
    overridden = type(model).compute_loss is not keras.Model.compute_loss
    return model.compiled and (compiled_losses(model) is not None or overridden)


def check_loss(model: keras.Model, mend: str) -> None:
    """Refuses a model without a loss of its own, and says what the caller can do.

    Raises:
        ValueError: If it has none.
    """
    if not has_loss(model):
        raise ValueError(
            f"The model {model.name!r} isn't compiled with a loss, so there is nothing to take gradients of. {mend}"
        )


def may_have_loss(model: keras.Model) -> bool:
    """Whether training may find a loss: the compiled one, that of a layer, or one that the user's own code computes."""
    layers = layers_of(model)
    own_code = any(not type(layer).__module__.startswith("keras.") for layer in layers)
    activity = any(getattr(layer, "activity_regularizer", None) is not None for layer in layers)
    return has_loss(model) or own_code or activity or bool(model.losses)


def _trainer_with(loss: Any, model: keras.Model) -> keras.Model:
    """A bare model that knows nothing but the loss: the user's model isn't compiled or changed."""
    trainer = keras.Model(name="loss_of_pruning")
    names = getattr(model, "output_names", None)
    if names is not None:
        trainer.output_names = names
    trainer.compile(loss=loss)
    return trainer


def mean_loss(model: keras.Model, batches: Iterable[Batch], loss: Any = None) -> float:
    """The mean over all examples, with the model's present weights.

    Args:
        model: A built model.
        batches: (x, y, sample_weight), leaves (n, ...).
        loss: A Keras loss instead of the compiled one.
    """
    return MeanLoss(ModelLoss(model, (), loss))([], batches)


class MeanLoss:
    """The mean loss over examples, as a function of the variables that `loss` is a function of.

    Args:
        loss: The loss of a model.
        compiled: Compiles what is computed of a batch, where that happens often: see `Backend`.
    """

    def __init__(self, loss: ModelLoss, compiled: Callable[..., Callable[..., Any]] = lambda f, _: f):
        self._loss = loss
        self._of_batch = compiled(
            lambda values, others, batch: loss.measure(batch, loss.predict(values, others, batch)), loss
        )

    def __call__(self, values: Sequence[Any], batches: Iterable[Batch]) -> float:
        """The mean over all examples, (x, y, sample_weight) with leaves (n, ...), given a tensor for each variable."""
        total = number = 0.0
        with self._loss.sampling_mode(), forward_only():
            _, others = self._loss.values()
            for batch in self._loss.checked(batches):
                tensors = map_arrays(ops.convert_to_tensor, batch)
                size = len(arrays(batch)[0])
                try:
                    value = float(ops.convert_to_numpy(self._of_batch(list(values), others, tensors)))
                finally:
                    # The classes are known now.
                    self._loss.check_classes(batch[1])
                total += value if self._loss.summed else size * value
                number += size
        if not number:
            raise ValueError("data holds no example.")
        return total / number


@contextmanager
def forward_only() -> Iterator[None]:
    """On torch, keeps no graph for a backward pass."""
    torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
    with torch.no_grad() if torch else nullcontext():
        yield
