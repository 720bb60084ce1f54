"""The groups of weights that are pruned together, over all chosen variables."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from keras_woodfisher.model.axes import axis_roles, branches
from keras_woodfisher.model.targets import Target
from keras_woodfisher.options.mask_types import UNSTRUCTURED, Mask, block_of, mask_text, pattern_of

_LISTED = 5


class Structure:
    """Which weight belongs to which group.

    A variable counts as a matrix: one row an output unit, and in a row the inputs of the first kernel position, then
    those of the second one, and so on (for a convolution `kernel.reshape(-1, filters).T`, which is what 2:4 hardware
    and SparseML divide too). Groups are

    - of `N:M` and `block4`: M or 4 neighbours in one row;
    - of `[a, b]`: a rows by b columns;
    - `"filter"`: one row, that is one output unit (of an embedding one token, of an LSTM one gate of a unit);
    - `"channel"`: what reads one input, at every kernel position.

    What fills no whole group, at the end of a row or below the last block, belongs to none and stays dense.

    Args:
        targets: The chosen variables, in the order that `arranged` gives them.
        mask: The mask type, a structured one.

    Attributes:
        pattern: (N, M) of an N:M mask, else None.
        labels: (d,) int32, the group of each weight in weight order, -1 where it has none. A variable's groups follow
            those of the variable before.
        edges: Where the groups of each variable begin, and their number at the end.
        covered: For each variable its weights that belong to a group.
        largest: The most weights of a group.
        members: (n, M) int64, the weights of each group of an N:M mask; else empty.

    Raises:
        ValueError: If no variable has a whole group.
    """

    def __init__(self, targets: Sequence[Target], mask: Mask):
        self._targets = targets
        self._mask = mask
        self.pattern = pattern_of(mask)
        parts: list[np.ndarray] = []
        self.edges = [0]
        self.covered: list[int] = []
        for target in targets:
            labels, number = group_labels(target, mask)
            inside = labels >= 0
            parts.append(np.where(inside, labels + self.edges[-1], -1).astype(np.int32))
            self.covered.append(int(inside.sum()))
            self.edges.append(self.edges[-1] + number)
        self.labels = np.concatenate(parts)
        if self.number == 0:
            raise ValueError(
                f"mask_type {mask_text(mask)} finds no whole group in any chosen variable: "
                f"{', '.join(f'{t.name} {tuple(t.variable.shape)}' for t in targets[:_LISTED])}. Choose a smaller "
                "group, or other params."
            )
        sizes = np.bincount(self.labels[self.labels >= 0], minlength=self.number)
        self.largest = int(sizes.max())
        self.members = np.zeros((0, 0), np.int64)
        if self.pattern is not None:
            order = np.argsort(self.labels, kind="stable")[self.labels.size - sum(self.covered) :]
            self.members = order.reshape(-1, self.pattern[1])

    @property
    def number(self) -> int:
        """How many groups there are."""
        return self.edges[-1]

    @property
    def most(self) -> int:
        """How many weights of a group an N:M mask removes."""
        assert self.pattern is not None
        return self.pattern[1] - self.pattern[0]

    @property
    def bytes(self) -> int:
        """Memory of the groups and of choosing among them."""
        size = self.labels.size
        if self.pattern is None:
            return 32 * size
        # Members, the columns that they are now, and the sets; costs, steps and the order of these.
        return (32 + self.most) * size + 64 * self.most * self.number

    def note(self) -> str:
        """What stays dense since it fills no group, or ""."""
        rests = [(t.name, t.size - c, t.size) for t, c in zip(self._targets, self.covered, strict=True) if c < t.size]
        if not rests:
            return ""
        listed = ", ".join(f"{name} ({rest:,} of {size:,} weights)" for name, rest, size in rests[:_LISTED])
        more = f" and {len(rests) - _LISTED} more" if len(rests) > _LISTED else ""
        return f"mask_type {mask_text(self._mask)} leaves dense what fills no group: {listed}{more}."


def structure_of(targets: Sequence[Target], mask: Mask) -> Structure | None:
    """The groups of a mask type; None where each weight is pruned by itself."""
    return None if mask == UNSTRUCTURED else Structure(targets, mask)


def arranged(target: Target, mask: Mask) -> Target:
    """The variable with its weights in an order in which groups are runs, as far as a transposition can do that.

    Blocks of the Fisher are runs of weights too, so that they hold whole groups.
    """
    outputs, inputs, positions = axis_roles(target.layer, target.variable.name, len(target.variable.shape))
    if block_of(mask) is not None:
        return replace(target, order=(*outputs, *positions, *inputs))
    if mask == "channel":
        return replace(target, order=(*inputs, *outputs, *positions))
    return target


def group_labels(target: Target, mask: Mask) -> tuple[np.ndarray, int]:
    """The group of each weight of one variable, in its weight order (-1: none), and how many groups there are."""
    shape = tuple(target.variable.shape)
    outputs, inputs, positions = axis_roles(target.layer, target.variable.name, len(shape))
    row, rows = _index(shape, outputs)
    channel, channels = _index(shape, inputs)
    position, places = _index(shape, positions)
    column, columns = position * channels + channel, places * channels
    block = block_of(mask)
    if block is not None:
        down, across = rows // block[0], columns // block[1]
        inside = (row < down * block[0]) & (column < across * block[1])
        label = np.where(inside, row // block[0] * across + column // block[1], -1)
        number = down * across
    elif mask == "filter":
        label, number = row, rows
    else:
        parts = branches(target.layer, target.variable.name, shape)
        label, number = row // (rows // parts) * channels + channel, parts * channels
    return target.flatten(np.broadcast_to(label, shape)), number


def _index(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The index along some axes as if they were one, to be broadcast, and its length."""
    index, length = np.zeros((1,) * len(shape), np.int64), 1
    for axis in axes:
        here = np.arange(shape[axis]).reshape([-1 if other == axis else 1 for other in range(len(shape))])
        index, length = index * shape[axis] + here, length * shape[axis]
    return index, length
