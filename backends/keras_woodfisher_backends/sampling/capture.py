"""Gradients of many groups of examples from one pass: the input of each layer and the gradient of its output.

For `z = op(x, kernel)` the kernel's gradient for one example needs only that example's rows of `x` and
`dL/dz`, which a batched forward and backward pass gives for all examples at once (Goodfellow, arXiv
1510.01799; for convolutions Rochette et al., arXiv 1912.06015).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from keras import ops, tree

from keras_woodfisher_backends.keras_internals.models import mask_of, set_mask
from keras_woodfisher_backends.nest import arrays, map_arrays
from keras_woodfisher_backends.protocol import Loss
from keras_woodfisher_backends.sampling.layer_rules import Rule
from keras_woodfisher_backends.sampling.listening import Record, Use, listening
from keras_woodfisher_backends.sampling.replay import Replay, UnsplittableError, differentiable, listen_to_arguments
from keras_woodfisher_backends.sampling.ways import Ways


class Differentiation(Protocol):
    """What capturing needs of a framework."""

    def watch(self, tensor: Any) -> Any:
        """The same tensor, whose gradient can be asked for from here on; None where it can't."""
        ...

    def of_outputs(self, measure: Callable[[Any, Any], Any], batch: Any, output: Any) -> Any:
        """The gradient of each group's loss with respect to its output, a nest like it, or its arrays alone.

        Args:
            measure: The loss of one group, `measure(batch, output)`.
            batch: Leaves (n, b, ...).
            output: Leaves (n, b, ...).
        """
        ...

    def pulled_back(self, output: Any, grads: Any, tensors: Sequence[Any]) -> Sequence[Any]:
        """From gradients with respect to the output to those with respect to tensors; None where there is none."""
        ...

    def group_by_group(
        self, function: Callable[[Sequence[Any], Sequence[Any]], Any], values: Sequence[Any], parts: Sequence[Any]
    ) -> Sequence[Any]:
        """The gradient of `function(values, part)` with respect to values, (n, *shape), for parts (n, ...)."""
        ...

    def kernel_gradient(self, x: Any, grad: Any, layer: Any, groups: int) -> Any:
        """See `KernelGradient`."""
        ...


LOOP = "within a loop of the framework's their gradients can't be seen"
MIXED = "the first axis of what they take or give isn't that of the examples"


class OutOfReachError(RuntimeError):
    """Variables whose layers can't be followed in one pass.

    Args:
        places: Places of the variables.
        reason: Why.
    """

    def __init__(self, places: Sequence[int], reason: str):
        super().__init__(reason)
        self.places = list(places)
        self.reason = reason


class Pass:
    """One pass forward over all groups, and what came of it.

    Attributes:
        output: Leaves (n, b, ...).
        grads: The gradient of each group's loss with respect to it.
    """

    def __init__(self, how: Differentiation, loss: Loss, values: Any, others: Any, batch: Any, ways: Ways):
        self._how = how
        self._loss = loss
        self._values = values
        self._others = others
        self._ways = ways
        self._groups, self._size = arrays(batch)[0].shape[:2]
        self._heard = [(host, Record(how.watch)) for host in ways.hosts]
        self._played = [(unit, Record(how.watch)) for unit in ways.units]
        listeners = [(host.layer, host.listen, record) for host, record in self._heard]
        listeners += [(unit.layer, listen_to_arguments, record) for unit, record in self._played]
        with listening(listeners):
            output = loss.predict(values, others, map_arrays(_merged, batch))
        lost = [place for host, record in self._heard if record.out_of_reach for place in host.places]
        lost += [place for unit, record in self._played if record.out_of_reach for place in unit.places]
        if lost:
            raise OutOfReachError(lost, LOOP)
        # Losses leave out what masks hide; Keras hangs them on outputs.
        masks = map_arrays(lambda leaf: self._grouped(mask_of(leaf)), output)
        self.output = map_arrays(self._grouped, output)

        def measure(group: Any, output: Any) -> Any:
            examples, hidden = group
            for leaf, mask in zip(tree.flatten(output), tree.flatten(hidden), strict=True):
                if mask is not None:
                    set_mask(leaf, mask)
            return loss.measure(examples, output)

        self.grads = how.of_outputs(measure, (batch, masks), self.output)

    def rows(self) -> list[Any]:
        """The gradient of each group, those of rules in weight order; None where there is no way but the direct one."""
        if mixed := [p for host, record in self._heard if not self._are_apart(record.uses) for p in host.places]:
            raise OutOfReachError(mixed, MIXED)
        records = [record for _, record in (*self._heard, *self._played)]
        tensors = [leaf for record in records for use in record.uses for leaf in differentiable(use.output)]
        found = iter(self._how.pulled_back(self.output, self.grads, tensors))
        pulled = [[[next(found) for _ in differentiable(use.output)] for use in record.uses] for record in records]
        rows: list[Any] = [None] * len(self._values)
        with self._loss.scope(self._values, self._others):
            for (host, record), grads in zip(self._heard, pulled, strict=False):
                uses = self._joined(record.uses, [parts[0] if parts else None for parts in grads])
                for place, rule in zip(host.places, host.rules, strict=True):
                    rows[place] = self._by_rule(rule, uses, self._values[place].shape)
        for (unit, record), grads in zip(self._played, pulled[len(self._heard) :], strict=True):
            again = Replay(unit.layer, self._groups, self._groups * self._size)
            try:
                for use, parts in zip(record.uses, grads, strict=True):
                    again.add(use.tensors, use.output, parts)
            except UnsplittableError as error:
                raise OutOfReachError(unit.places, MIXED) from error
            for place, row in zip(unit.places, self._again(again, unit.places), strict=True):
                rows[place] = row
        return rows

    def in_keras_layout(self, on_host: Callable[[Any], Any]) -> list[Any]:
        """The same, brought to the host as they lie and seen as (n, *shape) there."""
        rows = self.rows()
        for place, row in enumerate(rows):
            # In its place: not beside all that are on the host already, where that is a copy.
            rows[place] = None if row is None else on_host(row)
        return self._ways.in_keras_layout(rows)

    def exact(self, group: int) -> list[Any]:
        """The gradient of one group's loss by plain differentiation of this very pass."""
        alone = map_arrays(lambda grad: grad * _one_hot(group, grad), self.grads)
        return list(self._how.pulled_back(self.output, alone, self._values))

    def _by_rule(self, rule: Rule, uses: Sequence[tuple[Use, Any]], shape: Any) -> Any:
        parts = [
            rule.formulas[use.role](use.tensors, grad, self._groups, self._how.kernel_gradient)
            for use, grad in uses
            if use.role in rule.formulas
        ]
        return sum(parts[1:], parts[0]) if parts else _nothing(self._groups, shape, rule)

    def _are_apart(self, uses: Sequence[Use]) -> bool:
        """Whether what a layer takes may be that of one group after the other."""
        return all(tensor.shape[0] % self._groups == 0 for use in uses for tensor in use.tensors)

    def _joined(self, uses: Sequence[Use], grads: Sequence[Any]) -> list[tuple[Use, Any]]:
        """Uses of a layer at several times count as one, of more examples in each group."""
        alike: dict[Any, list[tuple[Use, Any]]] = {}
        for use, grad in zip(uses, grads, strict=True):
            if grad is not None:
                shapes = tuple(tuple(tensor.shape[1:]) for tensor in (*use.tensors, grad))
                alike.setdefault((use.role, shapes), []).append((use, grad))
        return [found[0] if len(found) == 1 else self._join(found) for found in alike.values()]

    def _join(self, found: Sequence[tuple[Use, Any]]) -> tuple[Use, Any]:
        def join(parts: Sequence[Any]) -> Any:
            wide = ops.concatenate([ops.reshape(t, (self._groups, -1, *t.shape[1:])) for t in parts], 1)
            return ops.reshape(wide, (-1, *wide.shape[2:]))

        tensors = tuple(map(join, zip(*(use.tensors for use, _ in found), strict=True)))
        return Use(found[0][0].role, tensors, None), join([grad for _, grad in found])

    def _again(self, again: Replay, places: Sequence[int]) -> Sequence[Any]:
        if not again.parts:
            return [ops.zeros((self._groups, *self._values[place].shape), "float32") for place in places]

        def of_group(leaves: Sequence[Any], part: Sequence[Any]) -> Any:
            values = list(self._values)
            for place, leaf in zip(places, leaves, strict=True):
                values[place] = leaf
            with self._loss.scope(values, self._others):
                return again(part)

        return self._how.group_by_group(of_group, [self._values[place] for place in places], again.parts)

    def _grouped(self, leaf: Any) -> Any:
        return None if leaf is None else ops.reshape(leaf, (self._groups, self._size, *leaf.shape[1:]))


def _merged(leaf: Any) -> Any:
    return ops.reshape(leaf, (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))


def _one_hot(group: int, grad: Any) -> Any:
    chosen = np.zeros((grad.shape[0], *[1] * (len(grad.shape) - 1)), np.float32)
    chosen[group] = 1.0
    return ops.convert_to_tensor(chosen, grad.dtype)


def _nothing(groups: int, shape: Any, rule: Rule) -> Any:
    stored = np.argsort(rule.axes)
    return ops.zeros([(groups, *shape)[axis] for axis in stored], "float32")
