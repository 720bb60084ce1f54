"""Gauss-Newton samples: rows whose mean outer product is the curvature of the loss, without its labels' noise."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import losses, ops, tree
from keras_woodfisher_backends.keras_internals.models import (
    compiled_loss_weights,
    compiled_losses,
    loss_settings,
    mask_of,
)
from keras_woodfisher_backends.nest import arrays, map_arrays, take

from keras_woodfisher.gradients.loss import ModelLoss, Outlined, called
from keras_woodfisher.model.batches import Batch
from keras_woodfisher.model.targets import Target

_TINY = 1e-7
"""Smallest probability that differs from zero, as in Keras's losses."""


class GaussNewtonLoss(ModelLoss):
    """A scalar whose gradient is one row of an unbiased sketch of the Gauss-Newton matrix.

    For a loss that is a mean over N terms `l(z_i)` of the model's outputs, the Gauss-Newton matrix is
    `H = (1/N) sum_i J_i^T S_i J_i` with `J_i = dz_i/dw` and `S_i = d^2 l / dz_i^2`. With random signs `xi` and any root
    `R_i R_i^T = S_i`, the row `(1/sqrt N) sum_i J_i^T R_i xi_i` has the mean outer product `H`, at the cost of one
    gradient. For the softmax cross-entropy of logits `R xi = sqrt(p) xi - p (sqrt(p) . xi)`; for that of probabilities,
    which Keras divides by their sum P, `(xi / sqrt(p) - sqrt(p) . xi) / P`; for the binary one `sqrt(p (1 - p)) xi` and
    `xi / sqrt(p (1 - p))`; for squared errors `sqrt(2) xi`. Of probabilities it is the mean over labels that the model
    itself draws, which is the curvature of the logits behind them. Unlike in the empirical Fisher, a row of b examples
    doesn't shrink `b`-fold. Sources: Martens, New insights and perspectives on the natural gradient method (arXiv
    1412.1193, section 9); Schraudolph 2002.

    The signs take the place of the labels in a batch; see `signs`. Of the labels only the sum over the classes of a
    categorical cross-entropy is left in `S_i`, as a factor: 1 for a class, 0 for none.

    Args:
        model: A built model with one output.
        targets: The variables to differentiate.
        loss: A Keras loss to use instead of the compiled one.

    Raises:
        ValueError: If the curvature of the loss isn't known.
    """

    def __init__(self, model: keras.Model, targets: Sequence[Target], loss: Any = None):
        super().__init__(model, targets, loss)
        self._root, self._mean, self._weight = _curvature(model, self._trainer)
        loss = losses.get(self.losses[0])
        one_hot = _function_of(loss) is losses.categorical_crossentropy
        self._smoothing = float(loss_settings(loss).get("label_smoothing", 0.0)) if one_hot else None

    def signs(self, seed: Any, outlined: Outlined = called, first: int = 0) -> Callable[[Batch], Batch]:
        """A function that puts random signs, in the shape of the output, in the place of labels.

        The sums of one-hot labels, which needn't be 1, go among the weights. It is called with one chunk after the
        other, leaves (n, b, ...); a group gets the same signs however groups are cut into chunks.

        Args:
            seed: Of the signs.
            outlined: See `Backend`.
            first: The number of the first group, where others get those before it.
        """
        rng = np.random.default_rng(seed)
        shapes: dict[Any, tuple[int, ...]] = {}
        before = first

        def signed(batch: Batch) -> Batch:
            nonlocal before
            x, labels, weight = batch
            leaves = arrays(x)
            key = tuple(leaf.shape[1:] for leaf in leaves)
            if key not in shapes:
                shapes[key] = self.output_shape(batch, outlined)
            for _ in range(before):
                rng.integers(0, 2, shapes[key], np.int8)
            before = 0
            signs = np.stack([rng.integers(0, 2, shapes[key], np.int8) for _ in leaves[0]])
            sums = self.label_sums(labels)
            weight = weight if sums is None else (*arrays(weight), sums)
            return x, (2 * signs - 1).astype(np.float32), weight

        return signed

    def label_sums(self, labels: Any) -> np.ndarray | None:
        """The sum over classes of each label of a categorical cross-entropy, as it is smoothed; None for other losses.

        Args:
            labels: (..., classes).

        Raises:
            ValueError: If one is negative, for which there is no root.
        """
        if self._smoothing is None:
            return None
        sums = np.asarray(arrays(labels)[0]).sum(-1, dtype=np.float32)
        sums = np.asarray((1.0 - self._smoothing) * sums + self._smoothing, np.float32)
        if (sums < 0).any():
            raise ValueError(
                f"fisher='ggn' needs labels whose sum over the classes isn't negative, got {sums.min():g}. Give zeros "
                "for examples without a class, or use fisher='empirical'."
            )
        return sums

    def output_shape(self, batch: Batch, outlined: Outlined = called) -> tuple[int, ...]:
        """The shape of the output for one group of a batch.

        Raises:
            ValueError: If the model has several outputs.
        """
        first = map_arrays(ops.convert_to_tensor, take(batch, 0))
        with self.sampling_mode():
            outputs = tree.flatten(outlined(self.predict, *self.values(), first))
        if len(outputs) != 1:
            raise ValueError(f"fisher='ggn' needs a model with one output, got {len(outputs)}. Use fisher='empirical'.")
        return tuple(outputs[0].shape)

    def _measure(self, batch: Batch, prediction: Any) -> Any:
        _, signs, weight = batch
        given = tree.flatten(prediction)[0]
        output = ops.cast(given, "float32")
        row = self._root(ops.stop_gradient(output), ops.cast(signs, "float32"))
        # Of each row of outputs Keras takes the mean, where it doesn't take the sum over classes.
        terms = output.shape[-1] if self._root in _ELEMENTWISE else 1
        scale = self._weight / (terms * (int(np.prod(output.shape[:-1])) if self._mean else 1))
        each = output * row * np.float32(np.sqrt(scale))
        for factor in [*arrays(weight), *self._mask(given)]:
            each = each * ops.sqrt(_spread(ops.cast(factor, "float32"), len(output.shape)))
        return ops.sum(each)

    def _mask(self, output: Any) -> list[Any]:
        """What Keras multiplies the terms by where the output carries a mask: a mean is one over the valid ones."""
        mask = mask_of(output)
        if mask is None:
            return []
        mask = ops.cast(mask, "float32")
        return [mask * (float(np.prod(mask.shape)) / ops.maximum(ops.sum(mask), 1.0)) if self._mean else mask]


def _spread(factor: Any, axes: int) -> Any:
    """With axes of length 1 at the end."""
    return ops.reshape(factor, (*factor.shape, *[1] * (axes - len(factor.shape))))


def _softmax_of_logits(logits: Any, signs: Any) -> Any:
    # By hand: TensorFlow's fused kernel rounds probabilities of 1, and then nothing is left out where outputs saturate.
    powers = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    p = powers / ops.sum(powers, axis=-1, keepdims=True)
    root = ops.sqrt(p)
    return root * signs - p * ops.sum(root * signs, axis=-1, keepdims=True)


def _softmax_of_probabilities(p: Any, signs: Any) -> Any:
    total = ops.sum(p, axis=-1, keepdims=True)
    # Logits that are taken for probabilities may have a sum near zero.
    total = ops.where(ops.min(p, axis=-1, keepdims=True) < 0.0, 1.0, ops.maximum(total, _TINY))
    root = ops.sqrt(ops.clip(p / total, _TINY, 1.0))
    return (signs / root - ops.sum(root * signs, axis=-1, keepdims=True)) / total


def _sigmoid_of_logits(logits: Any, signs: Any) -> Any:
    p = ops.sigmoid(logits)
    return ops.sqrt(p * (1.0 - p)) * signs


def _sigmoid_of_probabilities(p: Any, signs: Any) -> Any:
    p = ops.clip(p, _TINY, 1.0 - _TINY)
    return signs / ops.sqrt(p * (1.0 - p))


def _squared_error(output: Any, signs: Any) -> Any:
    return np.float32(np.sqrt(2.0)) * signs


Root = Callable[[Any, Any], Any]
_ELEMENTWISE = (_sigmoid_of_logits, _sigmoid_of_probabilities, _squared_error)

_ROOTS: dict[Any, tuple[Root, Root]] = {
    losses.sparse_categorical_crossentropy: (_softmax_of_logits, _softmax_of_probabilities),
    losses.categorical_crossentropy: (_softmax_of_logits, _softmax_of_probabilities),
    losses.binary_crossentropy: (_sigmoid_of_logits, _sigmoid_of_probabilities),
    losses.mean_squared_error: (_squared_error, _squared_error),
}
"""For each loss function the root for logits and the one for probabilities."""


def curvature_problem(model: keras.Model, loss: Any = None) -> str | None:
    """Why there are no Gauss-Newton samples of a model's loss, or None if there are.

    Args:
        model: A built model.
        loss: A Keras loss to use instead of the compiled one.
    """
    try:
        GaussNewtonLoss(model, (), loss)
    except ValueError as error:
        return str(error)
    return None


def _curvature(model: keras.Model, trainer: keras.Model) -> tuple[Root, bool, float]:
    """The root of the loss's second derivative, whether it is a mean (or a sum), and its weight."""
    if type(trainer).compute_loss is not keras.Model.compute_loss:
        raise ValueError(f"{_KNOWN} The model {model.name!r} computes its own loss. Use fisher='empirical'.")
    leaves = compiled_losses(trainer) or []
    if len(leaves) != 1:
        raise ValueError(f"{_KNOWN} Got {len(leaves)} losses. Use fisher='empirical'.")
    outputs = len(getattr(model, "outputs", None) or [None])
    if outputs > 1:
        raise ValueError(f"{_KNOWN} The model {model.name!r} has {outputs} outputs. Use fisher='empirical'.")
    loss = losses.get(leaves[0])
    function = _function_of(loss)
    reduction = loss.reduction if isinstance(loss, losses.Loss) else "sum_over_batch_size"
    settings = loss_settings(loss)
    if function not in _ROOTS:
        name = getattr(loss, "name", None) or getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(f"{_KNOWN} Got {name!r}. Use fisher='empirical'.")
    if reduction not in ("sum_over_batch_size", "mean", "sum"):
        raise ValueError(f"{_KNOWN} Got the reduction {reduction!r}. Use sum_over_batch_size or sum.")
    for setting, neutral in (("axis", -1), ("ignore_class", None)):
        if settings.get(setting, neutral) != neutral:
            raise ValueError(f"{_KNOWN} Got {setting}={settings[setting]!r}. Use fisher='empirical'.")
    from_logits = settings.get("from_logits", False)
    weights = compiled_loss_weights(trainer)
    return _ROOTS[function][0 if from_logits else 1], reduction != "sum", weights[0] if weights else 1.0


def _function_of(loss: Any) -> Any:
    """What a loss object calls, or a loss that is a function itself."""
    return getattr(loss, "fn", None) if isinstance(loss, losses.Loss) else loss


_KNOWN = (
    "fisher='ggn' needs a loss whose curvature is known: (sparse) categorical or binary cross-entropy, or mean squared "
    "error, for one output."
)
