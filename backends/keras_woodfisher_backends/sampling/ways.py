"""How each variable's gradients are taken: by its layer's rule, by running a layer again, or directly."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import layers

from keras_woodfisher_backends.keras_internals.models import layers_of, own_weights, sublayers_of
from keras_woodfisher_backends.keras_internals.recurrence import is_plain_cell
from keras_woodfisher_backends.sampling.layer_rules import Rule, rule_of
from keras_woodfisher_backends.sampling.listening import Listen
from keras_woodfisher_backends.sampling.recurrence import cells_of, recurrent_rule

UNKNOWN = "no faster way is known for layers of this kind"


@dataclass
class Host:
    """A layer that is listened to.

    Attributes:
        layer: The layer.
        listen: How.
        places: Places of the variables whose gradients come of that.
        rules: Their rules.
    """

    layer: Any
    listen: Listen
    places: list[int] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)


@dataclass
class Unit:
    """A layer that is run again, one group of examples at a time.

    Attributes:
        layer: The layer.
        places: Places of the variables whose gradients come of that.
    """

    layer: Any
    places: list[int] = field(default_factory=list)


class Ways:
    """For each variable the ways there are, the fastest first: a rule; the layer, or one around it, run again; none.

    Args:
        model: The Keras model.
        variables: The variables to differentiate.

    Attributes:
        names: For each variable, the path of the layer that owns it.
        reasons: For each variable why it isn't captured by a rule, or None where it is.
    """

    def __init__(self, model: Any, variables: Sequence[Any]):
        around = _Surroundings(model)
        owners: dict[int, list[Any]] = {id(variable): [] for variable in variables}
        for layer in layers_of(model):
            for variable in own_weights(layer):
                if id(variable) in owners:
                    owners[id(variable)].append(layer)
        self.names = [v.path.rpartition("/")[0] or v.path for v in variables]
        self._left: list[list[Rule | Any]] = []
        for variable in variables:
            found = _makers(owners[id(variable)])
            self._left.append(around.ways(found[0], variable) if len(found) == 1 else [])
        self.reasons = [None if self._rule(place) else UNKNOWN for place in range(len(variables))]

    @property
    def hosts(self) -> list[Host]:
        """The layers to listen to, with the variables of each."""
        found: dict[int, Host] = {}
        for place in range(len(self._left)):
            rule = self._rule(place)
            if rule is not None:
                host = found.setdefault(id(rule.host), Host(rule.host, rule.listen))
                host.places.append(place)
                host.rules.append(rule)
        return list(found.values())

    @property
    def units(self) -> list[Unit]:
        """The layers to run again, with the variables of each."""
        found: dict[int, Unit] = {}
        for place, ways in enumerate(self._left):
            if ways and self._rule(place) is None:
                found.setdefault(id(ways[0]), Unit(ways[0])).places.append(place)
        return list(found.values())

    @property
    def left(self) -> list[int]:
        """For each variable how many ways are left."""
        return [len(ways) for ways in self._left]

    @property
    def direct(self) -> list[int]:
        """Places of the variables for which there is no way left."""
        return [place for place, ways in enumerate(self._left) if not ways]

    def give_up(self, places: Sequence[int], reason: str) -> None:
        """Has the next way used for some variables."""
        for place in places:
            self._left[place] = self._left[place][1:]
            self.reasons[place] = reason

    def give_up_all(self, reason: str) -> None:
        """Has all variables sampled directly."""
        self._left = [[] for _ in self._left]
        self.reasons = [reason for _ in self.reasons]

    def in_keras_layout(self, rows: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Views (n, *shape) of what a pass gave, the rows of rules in weight order; None stays None."""
        rules = map(self._rule, range(len(self._left)))
        return [
            row if row is None or rule is None else row.transpose(rule.axes)
            for row, rule in zip(rows, rules, strict=True)
        ]

    def _rule(self, place: int) -> Rule | None:
        first = next(iter(self._left[place]), None)
        return first if isinstance(first, Rule) else None


def _makers(owners: Sequence[Any]) -> list[Any]:
    """Owners of a variable without wrappers (SpectralNormalization) that only hold the kernel of what they wrap."""
    return [o for o in owners if not (isinstance(o, layers.Wrapper) and any(o.layer is other for other in owners))]


class _Surroundings:
    """Which layers are around a layer."""

    def __init__(self, model: Any):
        self._model = model
        self._holders: dict[int, list[Any]] = {}
        for layer in layers_of(model):
            for held in sublayers_of(layer):
                self._holders.setdefault(id(held), []).append(layer)

    def ways(self, owner: Any, variable: Any) -> list[Rule | Any]:
        chain = self._chain(owner)
        loops = [layer for layer in chain if isinstance(layer, layers.RNN)]
        if is_plain_cell(owner):
            rule = recurrent_rule(owner, variable, next((rnn for rnn in loops if owner in cells_of(rnn)), None))
        else:
            rule = None if loops else rule_of(owner, variable)
        # Nothing within a loop can be run again by itself.
        units = chain[chain.index(loops[-1]) :] if loops else chain
        return [*([] if rule is None else [rule]), *units]

    def _chain(self, layer: Any) -> list[Any]:
        """A layer, the one that holds it, and so on, without the model; where several hold one, it ends."""
        chain = []
        while layer is not self._model:
            chain.append(layer)
            holders = self._holders.get(id(layer), [])
            if len(holders) != 1:
                break
            layer = holders[0]
        return chain
