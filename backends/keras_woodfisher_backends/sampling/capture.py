"""Gradients of many groups of examples from one pass: the input of each layer and the gradient of its output.

For `z = op(x, kernel)` the kernel's gradient for one example needs only that example's rows of `x` and
`dL/dz`, which a batched forward and backward pass gives for all examples at once (Goodfellow, arXiv
1510.01799; for convolutions Rochette et al., arXiv 1912.06015).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from keras import ops, tree

from keras_woodfisher_backends.keras_internals.models import layers_of, mask_of, own_weights, set_mask
from keras_woodfisher_backends.nest import arrays, map_arrays
from keras_woodfisher_backends.protocol import Loss
from keras_woodfisher_backends.sampling.layer_rules import Rule, rule_of


class Differentiation(Protocol):
    """What capturing needs of a framework."""

    def watch(self, tensor: Any) -> None:
        """Makes sure that the gradient with respect to a tensor can be asked for."""
        ...

    def gradients(
        self, measure: Callable[[Any, Any], Any], batch: Any, output: Any, tensors: Sequence[Any]
    ) -> Sequence[Any]:
        """The gradient of the sum of all groups' losses with respect to each tensor; None if it doesn't depend on it.

        Args:
            measure: The loss of one group, `measure(batch, output)`.
            batch: Leaves (n, b, ...).
            output: Leaves (n, b, ...), which depend on the tensors.
            tensors: What was watched.
        """
        ...

    def kernel_gradient(self, x: Any, grad: Any, layer: Any, groups: int) -> Any:
        """See `KernelGradient`."""
        ...


class Capture:
    """Knows which layers own `variables`, and listens to them during one pass.

    Args:
        model: The Keras model.
        variables: The variables to differentiate.

    Attributes:
        names: For each variable, the path of the layer that owns it.
        unknown: Names of the layers of variables without a rule; capturing needs a rule for each variable.
    """

    def __init__(self, model: Any, variables: Sequence[Any]):
        owners: dict[int, list[Any]] = {id(variable): [] for variable in variables}
        for layer in layers_of(model):
            for variable in own_weights(layer):
                if id(variable) in owners:
                    owners[id(variable)].append(layer)
        self._layers: list[Any] = []
        self._rules: list[tuple[int, Rule]] = []
        self.names = [v.path.rpartition("/")[0] or v.path for v in variables]
        self.unknown: list[str] = []
        for variable, name in zip(variables, self.names, strict=True):
            found = owners[id(variable)]
            rule = rule_of(found[0], variable) if len(found) == 1 else None
            if rule is None:
                self.unknown += [name] if name not in self.unknown else []
                continue
            if not any(layer is found[0] for layer in self._layers):
                self._layers.append(found[0])
            place = next(i for i, layer in enumerate(self._layers) if layer is found[0])
            self._rules.append((place, rule))

    def sample(self, how: Differentiation, loss: Loss, values: Any, others: Any, batch: Any) -> list[Any]:
        """The gradient of each of n groups, as `in_keras_layout` takes them."""
        groups, size = arrays(batch)[0].shape[:2]
        calls: list[list[tuple[Any, Any]]] = [[] for _ in self._layers]
        with _listening(self._layers, calls, how):
            output = loss.predict(values, others, map_arrays(_merged, batch))
        # Losses leave out what masks hide; Keras hangs them on outputs.
        masks = map_arrays(lambda leaf: _grouped(mask_of(leaf), groups, size), output)
        output = map_arrays(lambda leaf: _grouped(leaf, groups, size), output)

        def measure(group: Any, output: Any) -> Any:
            examples, hidden = group
            for leaf, mask in zip(tree.flatten(output), tree.flatten(hidden), strict=True):
                if mask is not None:
                    set_mask(leaf, mask)
            return loss.measure(examples, output)

        found = iter(how.gradients(measure, (batch, masks), output, [z for call in calls for _, z in call]))
        pairs = [[(x, next(found)) for x, _ in call] for call in calls]
        rows = []
        for (place, rule), value in zip(self._rules, values, strict=True):
            parts = [
                rule.gradient(x, grad, groups, how.kernel_gradient) for x, grad in pairs[place] if grad is not None
            ]
            rows.append(sum(parts[1:], parts[0]) if parts else _nothing(groups, value.shape, rule))
        return rows

    def in_keras_layout(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Views (n, *shape) of arrays that lie in weight order."""
        return [row.transpose(rule.axes) for row, (_, rule) in zip(rows, self._rules, strict=True)]


def _merged(leaf: Any) -> Any:
    return ops.reshape(leaf, (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))


def _grouped(leaf: Any, groups: int, size: int) -> Any:
    return None if leaf is None else ops.reshape(leaf, (groups, size, *leaf.shape[1:]))


def _nothing(groups: int, shape: Any, rule: Rule) -> Any:
    stored = np.argsort(rule.axes)
    return ops.zeros([(groups, *shape)[axis] for axis in stored], "float32")


_HOOKED = "call", "activation"


@contextmanager
def _listening(owners: Sequence[Any], calls: Sequence[list], how: Differentiation) -> Iterator[None]:
    """Records (input, pre-activation output) of each call of each layer, and leaves no trace."""
    # Users may have given a layer a `call` of its own. On torch, an activation that is a layer isn't in the dictionary.
    before = [{name: vars(layer)[name] for name in _HOOKED if name in vars(layer)} for layer in owners]
    try:
        for layer, call in zip(owners, calls, strict=True):
            _listen(layer, call, how)
        yield
    finally:
        for layer, own in zip(owners, before, strict=True):
            for name in _HOOKED:
                vars(layer).pop(name, None)
            vars(layer).update(own)


def _listen(layer: Any, record: list, how: Differentiation) -> None:
    original, activation = layer.call, getattr(layer, "activation", None)
    inputs: list[Any] = []

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.append(x)
        output = original(x, *args, **kwargs)
        return listen(output) if activation is None else output

    def listen(z: Any) -> Any:
        how.watch(z)
        record.append((inputs.pop(), z))
        return z if activation is None else activation(z)

    # Past Keras's __setattr__, which would track them.
    vars(layer)["call"] = call
    if activation is not None:
        vars(layer)["activation"] = listen
