"""Which channels stay: those that something needs, found from the outputs back to the inputs."""

from typing import NamedTuple

import numpy as np

from keras_woodfisher.deployment.shrinking.kernels import bias_of, response_of
from keras_woodfisher.deployment.shrinking.records import Linear
from keras_woodfisher.deployment.shrinking.walk import Walk

READ = "{} reads them"


class Joined(NamedTuple):
    """An input that goes, since one that stays can have its part.

    Attributes:
        gone: The input channel that goes.
        kept: The one that stays.
        ratio: The constant of the former over that of the latter.
    """

    gone: int
    kept: int
    ratio: float


class Liveness:
    """The channels that stay.

    A channel is needed if what must stay contains it, or if a layer reads it for an output that is needed itself. A
    constant that a bias can have isn't read. Several constants that convolutions with padding read (beyond the borders
    there are zeros, so no bias can have them) are one: a stand-in keeps its place, and has the others' part.

    Attributes:
        why: For each set of channels that stays, what was first found to need it.
    """

    def __init__(self, walk: Walk):
        self._linears = list(walk.linears.values())
        self._sizes = list(walk.sizes.values())
        self._roots = walk.ties.roots()
        self._kept = np.zeros(len(self._roots), bool)
        self.why: dict[int, str] = {}
        self._stand_ins: dict[frozenset[int], int] = {}
        for sets, reason in walk.ties.needed:
            self._need(sets, reason)
        while self._spread() or self._choose_stand_ins() or self._fill():
            pass

    def stays(self, sets: np.ndarray) -> np.ndarray:
        """Of each of some channels whether it stays."""
        return self._kept[self._roots[sets]]

    def count(self, sets: np.ndarray) -> int:
        """How many of some channels stay."""
        return int(self.stays(sets).sum())

    def set_of(self, channel: int) -> int:
        """The set that a channel belongs to."""
        return int(self._roots[channel])

    def joined(self, linear: Linear) -> list[Joined]:
        """The inputs of a layer whose part a stand-in has."""
        inputs, constants = self._roots[linear.sizes.inputs], linear.constants
        found = []
        demands = self._demands()
        for gone in np.flatnonzero(self._read(linear) & linear.joinable & ~self._kept[inputs]).tolist():
            stand_in = self._stand_ins[demands[int(inputs[gone])]]
            # A set may come in at several places, with several constants.
            kept = int(np.argmax(np.where((inputs == stand_in) & linear.joinable, np.abs(constants), -1.0)))
            found.append(Joined(gone, kept, float(constants[gone] / constants[kept])))
        return found

    def folded(self, linear: Linear) -> np.ndarray:
        """(inputs,) the constants of inputs that go, and that the layer's bias gets; zero for all others."""
        constants = linear.constants
        return np.where(~self.stays(linear.sizes.inputs) & linear.foldable, constants, 0.0)

    def folded_bias(self, linear: Linear) -> np.ndarray | None:
        """(outputs,) the bias with what inputs add that go; None where they add nothing."""
        folded = self.folded(linear)
        if not folded.any():
            return None
        outputs = linear.sizes.outputs
        added = response_of(linear.layer, folded)
        return added + bias_of(linear.layer, len(outputs)) if added[self.stays(outputs)].any() else None

    def gets_bias(self, linear: Linear) -> bool:
        """Whether a layer without a bias gets one."""
        return linear.layer.bias is None and self.folded_bias(linear) is not None

    def _need(self, sets: np.ndarray, reason: str) -> bool:
        new = [root for root in dict.fromkeys(self._roots[sets].tolist()) if not self._kept[root]]
        self._kept[new] = True
        self.why |= dict.fromkeys(new, reason)
        return bool(new)

    def _read(self, linear: Linear) -> np.ndarray:
        """(inputs,) whether an output that stays depends on an input."""
        return np.any(linear.reads[:, self.stays(linear.sizes.outputs)], axis=1)

    def _spread(self) -> bool:
        """What is needed needs what it reads."""
        changed = False
        for linear in reversed(self._linears):
            read = self._read(linear) & ~linear.foldable & ~linear.joinable
            changed |= self._need(linear.sizes.inputs[read], READ.format(linear.layer.name))
        return changed

    def _demands(self) -> dict[int, frozenset[int]]:
        """The sets that go only if a stand-in has their part, each with the layers in which it is to have it."""
        found: dict[int, set[int]] = {}
        for place, linear in enumerate(self._linears):
            for channel in linear.sizes.inputs[self._read(linear) & linear.joinable].tolist():
                if not self._kept[self._roots[channel]]:
                    found.setdefault(int(self._roots[channel]), set()).add(place)
        return {root: frozenset(places) for root, places in found.items()}

    def _choose_stand_ins(self) -> bool:
        """Of the sets that ask the same layers the one with the largest constants."""
        waiting: dict[frozenset[int], list[int]] = {}
        for root, places in self._demands().items():
            if places not in self._stand_ins:
                waiting.setdefault(places, []).append(root)
        for places, roots in waiting.items():
            sizes = [self._least(root, places) for root in roots]
            self._stand_ins[places] = roots[int(np.argmax(sizes))]
            names = ", ".join(self._linears[place].layer.name for place in sorted(places))
            self._need(np.array([self._stand_ins[places]]), f"constant, not zero, and {names} pads with zeros")
        return bool(waiting)

    def _least(self, root: int, places: frozenset[int]) -> float:
        """The size of a set's constants, in the layer of some where it is smallest."""
        sizes = []
        for place in places:
            linear = self._linears[place]
            here = (self._roots[linear.sizes.inputs] == root) & linear.joinable
            sizes.append(float(np.abs(linear.constants[here]).max()))
        return min(sizes)

    def _fill(self) -> bool:
        """No layer can be without channels."""
        for sizes in self._sizes:
            for sets in (sizes.outputs, sizes.inputs):
                if len(sets) and not self.stays(sets).any():
                    return self._need(sets[:1], "a layer can't have no channels")
        return False
