"""`shrink` makes a pruned model smaller, and `shrink_report` says what that does, and what it can't do."""

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.graphs import graph_of, is_graph

from keras_woodfisher.deployment.shrinking.channels import GIVEN
from keras_woodfisher.deployment.shrinking.liveness import READ, Liveness
from keras_woodfisher.deployment.shrinking.rebuilding import own_constructor, rebuilt
from keras_woodfisher.deployment.shrinking.records import Sizes
from keras_woodfisher.deployment.shrinking.walk import Walk
from keras_woodfisher.reports.shrink_report import ShrinkReport, ShrunkLayer, StayingChannels


def shrink(model: keras.Model) -> keras.Model:
    """Removes the channels of a pruned model that are zero, constant or unread, and returns a smaller model.

    After pruning with `mask_type="filter"` or `"channel"` whole filters or input channels are zero, but layers are as
    large as before, and as slow. The new model has smaller layers and computes the same, anywhere.

        >>> report = kw.prune(model, sparsity=0.5, method="magnitude", mask_type="filter", exclude="out/kernel")
        >>> small = kw.shrink(model)
        >>> small.get_layer("hidden").units, small.count_params() < model.count_params()
        (8, True)
        >>> np.allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
        True

    A channel `c` of a layer whose filter is zero is a constant: its bias, then what BatchNorm and the activation make
    of that. A layer behind it gets `c * sum(kernel[..., c, :])` added to its bias, where it adds no zeros around its
    input or `c = 0`; of other constants that it reads one stays, and its kernel has the part of all. A channel that
    no layer reads goes, too. `shrink_report` lists what goes, and what stays and why.

    Args:
        model: A built functional or sequential model, pruned by whatever means. It isn't changed.

    Returns:
        A model of stock layers, with the same inputs, outputs, names, dtype policies, regularisers and `trainable`
        flags; compiled as the given one is, with an optimizer that begins anew. Outputs are equal up to rounding, in
        inference. In training what was a constant is one for good.

    Raises:
        TypeError: If it isn't a Keras model.
        ValueError: If it is a subclassed model, isn't built, or has a layer that can't be copied.
    """
    walk, alive = _analysed(model)
    return rebuilt(model, walk, alive)


def shrink_report(model: keras.Model) -> ShrinkReport:
    """What `shrink` does to a model, without doing it.

        >>> model.get_layer("out").set_weights([np.eye(16, 3), np.zeros(3)])
        >>> report = kw.shrink_report(model)
        >>> [(layer.name, layer.channels, layer.channels_left) for layer in report.layers][0]
        ('hidden', 16, 3)
        >>> report.parameters, report.parameters_left
        (163, 33)

    Args:
        model: As in `shrink`.

    Raises:
        TypeError, ValueError: As `shrink` does.
    """
    walk, alive = _analysed(model)
    layers = [_layer(walk, alive, sizes) for sizes in walk.sizes.values() if sizes.cuts]
    changed = tuple(layer for layer in layers if layer.parameters != layer.parameters_left)
    removed = sum(layer.parameters - layer.parameters_left for layer in changed)
    total = int(model.count_params())
    return ShrinkReport(changed, _staying(walk, alive), total, total - removed, _notes(model, walk, alive))


def _analysed(model: keras.Model) -> tuple[Walk, Liveness]:
    _check(model)
    walk = Walk(model)
    return walk, Liveness(walk)


def _check(model: keras.Model) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"shrink takes a Keras model, got {model!r}.")
    if isinstance(model, keras.Sequential) and graph_of(model) is None:
        raise ValueError(f"The model {model.name!r} isn't built yet. Call it on a batch of data first.")
    if not is_graph(model):
        raise ValueError(
            f"The model {model.name!r} ({type(model).__name__}) is called in Python code of its own, so it isn't known "
            "which layers read which. Shrink its functional or sequential parts, whose inputs and outputs stay as they "
            "are, and put them back: model.backbone = kw.shrink(model.backbone)."
        )


def _layer(walk: Walk, alive: Liveness, sizes: Sizes) -> ShrunkLayer:
    before = after = 0
    for variable in sizes.layer.variables:
        shape, left = list(variable.shape), list(variable.shape)
        for axis, sets in sizes.cuts.get(variable.name, ()):
            left[axis] = alive.count(sets)
        before, after = before + int(np.prod(shape)), after + int(np.prod(left))
    linear = walk.linears.get(id(sizes.layer))
    if linear is not None and alive.gets_bias(linear):
        after += alive.count(sizes.outputs)
    kind = type(sizes.layer).__name__
    return ShrunkLayer(sizes.layer.name, kind, len(sizes.outputs), alive.count(sizes.outputs), before, after)


def _staying(walk: Walk, alive: Liveness) -> tuple[StayingChannels, ...]:
    varied: dict[int, str] = {}
    for sets, why in walk.ties.varied:
        for channel in sets.tolist():
            varied.setdefault(alive.set_of(channel), why)
    counts: dict[tuple[str, str, str], int] = {}

    def count(name: str, kind: str, sets: np.ndarray) -> None:
        for channel in sets[alive.stays(sets)].tolist():
            root = alive.set_of(channel)
            why = alive.why[root]
            if why != GIVEN:
                why = varied.get(root, why) if why in reading else why
                counts[name, kind, why] = counts.get((name, kind, why), 0) + 1

    reading = {READ.format(linear.layer.name) for linear in walk.linears.values()}
    for key, sizes in walk.sizes.items():
        if len(sizes.constant):
            count(sizes.layer.name, "constant", sizes.outputs[sizes.constant])
        if key in walk.linears:
            count(sizes.layer.name, "unread", sizes.inputs[~walk.linears[key].reads.any(1)])
    return tuple(StayingChannels(name, kind, number, why) for (name, kind, why), number in counts.items())


def _notes(model: keras.Model, walk: Walk, alive: Liveness) -> tuple[str, ...]:
    notes = []
    added = [linear.layer.name for linear in walk.linears.values() if alive.gets_bias(linear)]
    if added:
        notes.append(f"layers that get a bias, for constants that go: {', '.join(added)}")
    if model.compiled:
        notes.append("the smaller model is compiled in the same way; its optimizer begins anew")
    if own_constructor(model):
        notes.append(
            f"the smaller model is a plain keras.Model, since {type(model).__name__} has a constructor of its own"
        )
    return tuple(notes)
