"""Makes sure that processes which prune together have the same model and want the same of it."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.engines import assign_whole, whole_value
from keras_woodfisher_backends.keras_internals.models import layers_of, own_weights
from keras_woodfisher_backends.ranks.digests import digest_of
from keras_woodfisher_backends.ranks.joint import MAY_DIFFER
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.pruning.pruner import Pruner


def agree(model: keras.Model, pruner: Pruner, *wishes: Any) -> str:
    """Averages the moving statistics of BatchNorm, which engines let differ, and compares all else.

    Args:
        model: The model.
        pruner: Its pruner.
        wishes: What is to be done, as far as the options don't say it.

    Returns:
        What was averaged, or "".

    Raises:
        ValueError: On all processes, if weights, masks, variables or wishes differ.
    """
    ranks = pruner.ranks
    if ranks.size == 1:
        return ""
    options = {name: repr(value) for name, value in vars(pruner.options).items() if name not in MAY_DIFFER}
    ranks.check_same_words(options | {"what is to be done": repr(wishes)})
    ranks.check_same(
        variables=digest_of([tuple(target.variable.shape) for target in pruner.targets]),
        weights=digest_of(*weights_of(model)),
        masks=digest_of(*pruner.pruned),
    )
    return average_statistics(model, ranks)


def average_statistics(model: keras.Model, ranks: Ranks) -> str:
    """Gives the moving statistics of BatchNorm layers the mean over all processes, where they differ; says so."""
    different = []
    for layer in layers_of(model):
        for name in ("moving_mean", "moving_variance"):
            variable = getattr(layer, name, None)
            if not isinstance(variable, keras.Variable):
                continue
            found = ranks.all_gather(whole_value(variable))
            if any(not np.array_equal(found[0], other) for other in found[1:]):
                assign_whole(variable, np.mean(found, axis=0, dtype=np.float64).astype(found[0].dtype))
                different.append(layer.name)
    if not different:
        return ""
    number = len(dict.fromkeys(different))
    return f"moving statistics of {number} BatchNorm layers differed between processes, and are their mean now"


def weights_of(model: keras.Model) -> Iterator[np.ndarray]:
    """What is trained, or may be: no counters, statistics and states."""
    for layer in layers_of(model):
        for variable in own_weights(layer):
            yield whole_value(variable)
