"""What dies of pruning: variables that lose all their weights, and outputs that are the same whatever goes in."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras_woodfisher_backends.keras_internals.models import float32_computation, infer
from keras_woodfisher_backends.nest import arrays, map_arrays

from keras_woodfisher.gradients.loss import forward_only
from keras_woodfisher.model.axes import axis_roles
from keras_woodfisher.model.examples import Examples, read_batches
from keras_woodfisher.model.targets import Target
from keras_woodfisher.pruning.masks import count

_EXAMPLES = 16
"""Outputs of so many are compared."""

_ALIVE = 0.5
"""Where at least this part of the inputs and outputs of each variable has a weight, outputs aren't looked at."""

_SAME = 1e-6
"""Outputs that differ by no more than this part of the largest one differ by rounding."""

_LISTED = 5


class Collapse:
    """Notices what has died since it last looked.

    Args:
        targets: The variables that are pruned, as they are before.

    Attributes:
        constant: What is to be said of outputs that are the same whatever goes in, or "".
    """

    def __init__(self, targets: Sequence[Target]):
        self._targets = targets
        self._known = {place for place, target in enumerate(targets) if not target.read().any()}
        self.constant = ""

    def news(self, model: keras.Model, opened: Callable[[], Examples | None]) -> list[str]:
        """What is to be said of the model as it is now; nothing twice.

        Args:
            model: The model that the variables belong to.
            opened: Gives examples to look at outputs of, where that is called for; None: nothing is said of outputs.
        """
        kept = [target.unflatten(target.read()) != 0 for target in self._targets]
        empty = [place for place, weights in enumerate(kept) if not weights.any()]
        new = [place for place in empty if place not in self._known]
        self._known |= set(new)
        found = [emptied_text([self._targets[place] for place in new])] if new else []
        dying = not self.constant and not all(map(_is_alive, self._targets, kept))
        if dying and (examples := opened()) is not None:
            self.constant = constant_outputs(model, read_batches(examples, _EXAMPLES, _EXAMPLES, 0)[0][0])
            found += [self.constant] if self.constant else []
        return found


def _is_alive(target: Target, kept: np.ndarray) -> bool:
    """Whether most inputs and outputs of a variable still have a weight, given which weights aren't zero."""
    roles = axis_roles(target.layer, target.variable.name, kept.ndim)
    sides = [side for side in (roles.inputs, roles.outputs) if side]
    others = (tuple(axis for axis in range(kept.ndim) if axis not in side) for side in sides)
    return all(kept.any(axis).mean() >= _ALIVE for axis in others)


def emptied_text(targets: Sequence[Target], verb: str = "is") -> str:
    """What a warning says of variables that have no weight left, or will have none."""
    named = ", ".join(f"{target.name} ({target.size:,})" for target in targets[:_LISTED])
    more = f" and {len(targets) - _LISTED} more" if len(targets) > _LISTED else ""
    return (
        f"No weight {verb} left of {named}{more}: only biases and shortcuts are left of such a layer. Lower the "
        "sparsity, rank each variable by itself (global_sparsity=False), or put these in `exclude`."
    )


def emptied_at(sparsity: Sequence[float], sizes: Sequence[int], together: bool) -> list[int]:
    """Places of the variables that certainly have no weight left at a sparsity.

    >>> emptied_at([0.9999, 0.9999], [512, 224], together=True)
    [0, 1]
    >>> emptied_at([0.9, 0.999], [512, 224], together=False)
    [1]

    Args:
        sparsity: The fraction to reach, one a variable.
        sizes: Weights of each variable.
        together: Whether all are ranked together.
    """
    if together:
        return list(range(len(sizes))) if count(sparsity[0], sum(sizes)) == sum(sizes) else []
    return [place for place, (s, size) in enumerate(zip(sparsity, sizes, strict=True)) if count(s, size) == size]


def constant_outputs(model: keras.Model, x: Any) -> str:
    """Says so where an output of a model is the same for all of some inputs that differ, or isn't finite, else ""."""
    if all(_is_constant(array) for array in arrays(x)):
        return ""
    with forward_only(), float32_computation(model), keras.StatelessScope():
        outputs = tree.flatten(infer(model, map_arrays(ops.convert_to_tensor, x)))
    found = [ops.convert_to_numpy(ops.cast(output, "float32")) for output in outputs]
    lost = [sum(not np.isfinite(example).all() for example in output) for output in found]
    if any(lost):
        return (
            f"The output of the pruned model isn't finite for {max(lost)} of {len(found[0])} examples that were looked "
            "at. Lower the sparsity, or look for a division by what may be zero."
        )
    constant = [place for place, output in enumerate(found) if _is_constant(output)]
    if not constant:
        return ""
    which = f"Output {', '.join(str(place) for place in constant)}" if len(found) > 1 else "The output"
    return (
        f"{which} of the pruned model is the same for all {len(found[0])} examples that were looked at: nothing of "
        "what goes in gets through. Lower the sparsity, or rank each variable by itself (global_sparsity=False)."
    )


def _is_constant(array: np.ndarray) -> bool:
    """Whether all entries of an array are the same but for rounding."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        return bool((array == array[:1]).all())
    values = array.astype(np.float64)
    return bool(np.abs(values - values[:1]).max(initial=0.0) <= _SAME * np.abs(values).max(initial=0.0))
