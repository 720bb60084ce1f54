"""What holds a variable after each step: masks of this package, and within them the user's own constraint."""

from typing import Any

import keras
from keras import ops


class MaskConstraint(keras.constraints.Constraint):
    """`where(mask, w, 0)` after each optimizer step, before and after the constraint that was there.

    Before, so that a constraint of norms sees the weights that are left; after, so that they are zero whatever it does.
    """

    def __init__(self, mask: Any, inner: Any, owner: Any):
        self.mask = mask
        self.inner = inner
        self.owner = owner

    def __call__(self, w: Any) -> Any:
        w = self.masked(w)
        return w if self.inner is None else self.masked(self.inner(w))

    def masked(self, w: Any) -> Any:
        """The tensor of a variable or tensor `w` with pruned weights at zero."""
        # Bare variables fail inside JAX's conditional.
        w = ops.convert_to_tensor(w)
        w = ops.where(ops.convert_to_tensor(self.mask), w, ops.zeros_like(w))
        return self.inner.masked(w) if isinstance(self.inner, MaskConstraint) else w


def constraint_of(variable: Any) -> Any:
    """The outermost constraint of a variable, or None."""
    return getattr(variable, "constraint", None)


def masks_of(variable: Any) -> list[MaskConstraint]:
    """The masks on a variable, from the outside in."""
    masks, constraint = [], constraint_of(variable)
    while isinstance(constraint, MaskConstraint):
        masks.append(constraint)
        constraint = constraint.inner
    return masks


def own_constraint(variable: Any) -> Any:
    """The constraint that the user gave a variable, whatever masks are around it, or None."""
    masks = masks_of(variable)
    return masks[-1].inner if masks else constraint_of(variable)
