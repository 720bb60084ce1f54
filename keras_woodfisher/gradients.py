"""Gradient samples of a Keras model: the loss as a pure function, and G filled chunk by chunk."""

import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.nest import map_arrays, take
from keras_woodfisher_backends.protocol import Backend, Sampler

from keras_woodfisher.chunks import chunk_size, even_chunks
from keras_woodfisher.examples import Batch
from keras_woodfisher.stores.store import GradientStore
from keras_woodfisher.targets import Target

_HALF = ("float16", "bfloat16")


class ModelLoss:
    """The model's loss without regularisers, in inference mode and float32, as a function of tensors.

    Args:
        model: A built model.
        targets: The variables to differentiate.
        loss: A Keras loss to use instead of the compiled one.

    Raises:
        ValueError: If there is no loss to differentiate.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], loss: Any = None):
        self._model = model
        self._targets = [t.variable for t in targets]
        chosen = {id(v) for v in self._targets}
        self._others = [v for v in _all_variables(model) if id(v) not in chosen]
        self._trainer = model if loss is None else _trainer_with(loss, model)
        if loss is None and not has_loss(model):
            raise ValueError(
                f"The model {model.name!r} isn't compiled with a loss, so there is nothing to take gradients of. "
                "Compile it, or give `loss=`; where a custom train_step computes its own loss, override "
                "compute_loss, or leave out `data` to buffer the gradients of training."
            )

    @property
    def summed(self) -> bool:
        """Whether the loss is a sum over the examples of a batch, not a mean."""
        reductions = self._reductions()
        return bool(reductions) and all(reduction == "sum" for reduction in reductions)

    def values(self) -> tuple[list[Any], list[Any]]:
        """The present tensors of the variables to differentiate, and of all others."""
        # `convert_to_tensor` gives TensorFlow's variables, which each call of a function looks at one by one.
        return [ops.stop_gradient(v) for v in self._targets], [ops.stop_gradient(v) for v in self._others]

    def __call__(self, values: Sequence[Any], others: Sequence[Any], batch: Batch) -> Any:
        with self._scope(values, others):
            return self._measure(batch, self._predict(batch))

    def predict(self, values: Sequence[Any], others: Sequence[Any], batch: Batch) -> Any:
        with self._scope(values, others):
            return self._predict(batch)

    def measure(self, batch: Batch, prediction: Any) -> Any:
        with keras.StatelessScope():
            return self._measure(batch, prediction)

    def probe(self, batch: Batch) -> None:
        """Computes the loss of one group, so that what doesn't fit together fails early.

        Losses that are built on first use are built here. All else, metrics included, is left as it was.

        Raises:
            ValueError: If the data, the model and the loss don't fit together.
        """
        metrics = {id(v): ops.convert_to_numpy(v) for v in self._model.metrics_variables}
        try:
            first = map_arrays(ops.convert_to_tensor, take(batch, 0))
            with self.sampling_mode():
                prediction = self.predict(*self.values(), first)
                # Not stateless: the variables of a loss can't be made otherwise.
                value = ops.convert_to_numpy(self._measure(first, prediction))
        except Exception as error:
            if None in self._reductions():
                raise ValueError(
                    "The loss has reduction='none', so it gives a number for each example, and there is none to "
                    "differentiate. Use reduction='sum_over_batch_size' (or 'sum')."
                ) from error
            labels = "" if batch[1] is not None else "data holds no labels: give (x, y) if the loss needs them. "
            raise ValueError(f"{labels}The loss of the first examples in data can't be computed: {error}") from error
        finally:
            for variable in self._model.metrics_variables:
                # Those of a loss that was built just now begin at zero.
                variable.assign(metrics.get(id(variable), np.zeros(variable.shape)))
        if np.ndim(value) != 0:
            raise ValueError(
                f"The loss of one group of examples has shape {np.shape(value)}, but must be a scalar. "
                "Use a loss with reduction='sum_over_batch_size'."
            )

    def sampling_mode(self) -> Any:
        """The context in which samples are taken; see `sampling_mode`."""
        return sampling_mode(self._model, self._trainer)

    def _reductions(self) -> list[str | None]:
        """Of each loss that the model is compiled with; "" where it is a plain function, None for "none"."""
        compiled = self._trainer._compile_loss
        leaves = [] if compiled is None else [loss for loss in tree.flatten(compiled._user_loss) if loss is not None]
        found = [getattr(loss, "reduction", "") for loss in leaves]
        return [None if reduction == "none" else reduction for reduction in found]

    def _scope(self, values: Sequence[Any], others: Sequence[Any]) -> Any:
        mapping = [
            *zip(self._targets, values, strict=True),
            *zip(self._others, others, strict=True),
        ]
        return keras.StatelessScope(state_mapping=mapping)

    def _predict(self, batch: Batch) -> Any:
        # `_call_has_training_arg` is what Keras's own train step asks.
        if self._model._call_has_training_arg:
            return self._model(batch[0], training=False)
        return self._model(batch[0])

    def _measure(self, batch: Batch, prediction: Any) -> Any:
        x, y, weight = batch
        loss = self._trainer._compute_loss(x=x, y=y, y_pred=prediction, sample_weight=weight, training=False)
        return ops.cast(loss, "float32")


def sample_gradients(
    loss: ModelLoss,
    sampler: Sampler,
    backend: Backend,
    groups: Iterator[Batch],
    kept: Sequence[tuple[Target, np.ndarray]],
    wanted: int,
    store: GradientStore,
    advance: Callable[[int], None],
    prepare: Callable[[Batch], Batch] | None = None,
) -> float:
    """Fills G with the samples that are finite and not zero.

    Args:
        loss: What to differentiate.
        sampler: Gradients of a chunk of groups, from the backend.
        backend: Tells how many groups a chunk should hold.
        groups: Chunks of any size, leaves (n, b, ...).
        kept: Each variable with the bool mask of its unpruned weights, in weight order.
        wanted: How many samples there should be (m).
        store: Takes the samples of the d unpruned weights.
        advance: Called with the number of rows that were added.
        prepare: What is to be done to each chunk before.

    Returns:
        The sum of all squares of G.

    Raises:
        ValueError: If no usable sample is left.
    """
    values, others = loss.values()
    dropped, total = 0, 0.0
    with loss.sampling_mode():
        for batch, number in even_chunks(groups, lambda b: min(store.chunk, chunk_size(backend, values, b))):
            rows = sampler(values, others, batch if prepare is None else prepare(batch))
            into = store.room(number)
            start = 0
            for (target, mask), row in zip(kept, rows, strict=True):
                flat = target.flatten(np.asarray(row[:number], np.float32))
                stop = start + int(np.count_nonzero(mask))
                into[:, start:stop] = flat if mask.all() else flat[:, mask]
                start = stop
            good, squares = usable_rows(into)
            dropped += number - int(good.sum())
            total += float(squares[good].sum())
            # Not beside the samples of the next chunk.
            del rows, row, flat
            store.keep(good)
            advance(number)
    checked(store, dropped, wanted)
    return total


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


Grads = TypeVar("Grads", bound=Sized)


def checked(grads: Grads, dropped: int, wanted: int) -> Grads:
    """Warns of samples that are missing, and refuses to go on without any.

    Raises:
        ValueError: If there is no sample.
    """
    if not len(grads) and not dropped:
        raise ValueError(
            "No gradient sample: data gave no example, though it did before. A callable must return a fresh iterator "
            "at each call."
        )
    if not len(grads):
        raise ValueError(
            f"No usable gradient sample: {dropped} of {dropped} are zero or not finite. "
            "Look at the loss on this data: it must be finite, and depend on the weights to prune."
        )
    if dropped:
        warnings.warn(
            f"{dropped} of {dropped + len(grads)} gradient samples are zero or not finite and were dropped.",
            stacklevel=2,
        )
    elif len(grads) < wanted:
        warnings.warn(
            f"Only {len(grads)} of {wanted} gradient samples could be taken: the data ran out. "
            "Lower num_grads, or give more data.",
            stacklevel=2,
        )
    return grads


@contextmanager
def sampling_mode(*models: Any) -> Iterator[None]:
    """Half-precision layers compute in float32, and regularisers and `add_loss` add nothing; then all is put back.

    A regulariser would add one constant vector to each sample.
    """
    # A quantised layer computes as it was quantised: its policy says how.
    layers = [
        layer
        for layer in models[0]._flatten_layers()
        if layer.compute_dtype in _HALF and layer.quantization_mode is None
    ]
    policies = [layer._dtype_policy for layer in layers]
    overrides = [model._losses_override for model in models]
    try:
        for layer in layers:
            vars(layer)["_dtype_policy"] = _float32_with(layer.variable_dtype)
        for model in models:
            vars(model)["_losses_override"] = [ops.zeros(())]
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            vars(layer)["_dtype_policy"] = policy
        for model, override in zip(models, overrides, strict=True):
            vars(model)["_losses_override"] = override


def _float32_with(variable_dtype: str) -> keras.DTypePolicy:
    """Computes in float32; a layer casts its variables only where the policy says that they have another type."""
    policy = keras.DTypePolicy("float32")
    policy._variable_dtype = variable_dtype
    return policy


def _all_variables(model: keras.Model) -> list[Any]:
    return list({id(v): v for v in model.variables}.values())


def has_loss(model: keras.Model) -> bool:
    """Whether a model is compiled with a loss, or computes one of its own."""
    overridden = type(model).compute_loss is not keras.Model.compute_loss
    return model.compiled and (model._compile_loss is not None or overridden)


def may_have_loss(model: keras.Model) -> bool:
    """Whether training may find a loss: the compiled one, that of a layer, or one that the user's own code computes."""
    layers = model._flatten_layers()
    own_code = any(not type(layer).__module__.startswith("keras.") for layer in layers)
    activity = any(getattr(layer, "activity_regularizer", None) is not None for layer in model._flatten_layers())
    return has_loss(model) or own_code or activity or bool(model.losses)


def _trainer_with(loss: Any, model: keras.Model) -> keras.Model:
    """A bare model that knows nothing but the loss: the user's model isn't compiled or changed."""
    trainer = keras.Model(name="loss_of_pruning")
    names = getattr(model, "output_names", None)
    if names is not None:
        trainer.output_names = names
    trainer.compile(loss=loss)
    return trainer
