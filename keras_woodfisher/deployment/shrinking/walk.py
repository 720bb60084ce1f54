"""Goes through the graph of a model in the order of its calls, and learns what is known of each channel."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import layers
from keras_woodfisher_backends.keras_internals.graphs import Call, calls_of, graph_of, is_graph

from keras_woodfisher.deployment.shrinking import elementwise, layer_rules, merging, shaping
from keras_woodfisher.deployment.shrinking.channels import UNKNOWN, Channels
from keras_woodfisher.deployment.shrinking.kernels import CONVOLUTIONS, DEPTHWISE, SEPARABLE, TRANSPOSED
from keras_woodfisher.deployment.shrinking.notes import Notes
from keras_woodfisher.model.quantized import mode_of

Rule = Callable[[Notes, Call, list[Channels]], Channels]


def _named(pattern: str) -> list[Any]:
    """Layers of this Keras, `{}` standing for 1 to 3 dimensions."""
    names = [pattern.format(rank) for rank in (1, 2, 3)]
    return [found for name in dict.fromkeys(names) if (found := getattr(layers, name, None))]


_BY_RULE: list[tuple[Rule, Iterable[Any]]] = [
    (layer_rules.linear, (layers.Dense, *CONVOLUTIONS, *TRANSPOSED, *SEPARABLE)),
    (layer_rules.depthwise, DEPTHWISE),
    (layer_rules.batch_normalized, (layers.BatchNormalization,)),
    (layer_rules.activation, (layers.Activation, *elementwise.LAYERS)),
    (layer_rules.prelu, (layers.PReLU,)),
    (layer_rules.rescaled, (layers.Rescaling,)),
    (merging.combined, (layers.Add, layers.Average, layers.Maximum, layers.Minimum, layers.Multiply, layers.Subtract)),
    (merging.concatenated, (layers.Concatenate,)),
    (
        shaping.unchanged,
        (
            *(layers.Dropout, layers.GaussianDropout, layers.GaussianNoise, layers.AlphaDropout, layers.Identity),
            *(layers.ActivityRegularization, *_named("SpatialDropout{}D")),
        ),
    ),
    (
        shaping.over_places,
        [
            layer
            for pattern in ("MaxPooling{}D", "AveragePooling{}D", "AdaptiveMaxPooling{}D", "AdaptiveAveragePooling{}D")
            for layer in (*_named(pattern), *_named("Cropping{}D"), *_named("UpSampling{}D"))
        ],
    ),
    (shaping.padded, _named("ZeroPadding{}D")),
    (shaping.global_pooled, [*_named("GlobalMaxPooling{}D"), *_named("GlobalAveragePooling{}D")]),
    (shaping.flattened, (layers.Flatten,)),
    (shaping.reshaped, (layers.Reshape,)),
    (shaping.permuted, (layers.Permute,)),
    (shaping.repeated, (layers.RepeatVector,)),
]
_LAYER_RULES = {layer: rule for rule, kinds in _BY_RULE for layer in kinds}
_OPERATION_RULES: dict[str, Rule] = {
    **dict.fromkeys(elementwise.OPERATIONS, layer_rules.operation),
    **{name: merging.combined for name in merging.FUNCTIONS if name != "Average"},
    "Concatenate": merging.concatenated,
}


class Walk(Notes):
    """Notes of a functional or sequential model after all of its calls.

    Args:
        model: The model; its inputs and outputs keep their channels.
    """

    def __init__(self, model: keras.Model):
        super().__init__()
        self._layers: dict[int, Any] = {}
        for found in self._run(model, [UNKNOWN] * len(graph_of(model).inputs)):
            self.ties.need(found.sets, "they are an output of the model")
        self._keep_what_is_fixed()

    def _run(self, graph: Any, given: list[Channels]) -> list[Channels]:
        """The outputs of a model for what its inputs are known to be."""
        inner = graph_of(graph)
        known = dict(zip(map(id, inner.inputs), given, strict=True))
        for call in calls_of(graph):
            self._layers[id(call.operation)] = call.operation
            inputs = [known[id(tensor)] for tensor in call.inputs]
            known |= zip(map(id, call.outputs), self._outputs(call, inputs), strict=True)
        return [known[id(tensor)] for tensor in inner.outputs]

    def _outputs(self, call: Call, given: list[Channels]) -> list[Channels]:
        if is_graph(call.operation):
            return self._enter(call, given)
        rule = _rule_of(call.operation)
        if rule is None or len(call.outputs) > 1:
            self.barrier(call, given)
            return [UNKNOWN] * len(call.outputs)
        return [rule(self, call, given)]

    def _enter(self, call: Call, given: list[Channels]) -> list[Channels]:
        """An inner model: as if its calls stood here."""
        model, inner = call.operation, graph_of(call.operation)
        shapes = [tuple(tensor.shape) for tensor in call.inputs], [tuple(tensor.shape) for tensor in inner.inputs]
        fits = [len(one) == len(other) for one, other in zip(*shapes, strict=False)]
        plain = len(call.args) == 1 and isinstance(call.args[0], dict) == isinstance(inner.input, dict)
        if not (plain and len(shapes[0]) == len(shapes[1]) and all(fits)):
            for found in given:
                self.ties.need(found.sets, f"the way in which {model.name} is called isn't known")
            given = [UNKNOWN] * len(inner.inputs)
        known = self.entrances.setdefault(id(model), given)
        for found, other in zip(given, known, strict=True):
            if found.axis == other.axis:
                self.ties.tie(other.sets, found.sets)
            else:
                for sets in (found.sets, other.sets):
                    self.ties.need(sets, f"{model.name} is called with channels along different axes")
        return self._run(model, given)

    def _keep_what_is_fixed(self) -> None:
        """Layers with a call that can't change, and those whose weights something else has, too."""
        owners: dict[int, set[int]] = {}
        for key, layer in self._layers.items():
            for variable in [] if is_graph(layer) else getattr(layer, "variables", ()):
                owners.setdefault(id(variable), set()).add(key)
        shared = {key for keys in owners.values() if len(keys) > 1 for key in keys}
        for key, sizes in self.sizes.items():
            if key in self.fixed | shared:
                why = "shares its weights with another layer" if key in shared else "can't change in all of its calls"
                for sets in (sizes.inputs, sizes.outputs):
                    self.ties.need(sets, f"{sizes.layer.name} {why}")


def _rule_of(operation: Any) -> Rule | None:
    if isinstance(operation, keras.Layer):
        changed = mode_of(operation) is not None or getattr(operation, "lora_enabled", False)
        return None if changed else _LAYER_RULES.get(type(operation))
    stock = type(operation).__module__.startswith("keras.")
    return _OPERATION_RULES.get(type(operation).__name__) if stock else None
