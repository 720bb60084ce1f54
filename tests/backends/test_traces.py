"""What is compiled outlives a call, but not its model."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_woodfisher_backends.sampling.traces import trace_of
from sampling import NAME

import keras_woodfisher as kw


class Traced(layers.Layer):
    """Counts how often it is traced."""

    traces = 0

    def call(self, x):
        kind = type(x).__name__
        type(self).traces += "Tracer" in kind or kind == "SymbolicTensor"
        return ops.tanh(x)


def built():
    model = keras.Sequential([layers.Input((6,)), layers.Dense(8), Traced(), layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data(rng, count=40):
    return rng.normal(size=(count, 6)).astype("float32"), rng.integers(0, 3, count).astype("int32")


def compilations(function):
    """Whatever is compiled while a function runs."""
    if NAME == "jax":
        import jax

        found = []

        def heard(name, seconds, **about):
            if "backend_compile" in name:
                found.append(about)

        jax.monitoring.register_event_duration_secs_listener(heard)
        try:
            function()
        finally:
            jax.monitoring.unregister_event_duration_listener(heard)
        return len(found)
    before = Traced.traces
    function()
    return Traced.traces - before


@pytest.mark.parametrize("options", [{"quality": "fast", "method": "woodfisher"}, {"quality": "fast", "loss": "mse"}])
def test_a_second_prune_compiles_nothing(rng, options):
    model, (x, y) = built(), data(rng)
    y = y if "loss" not in options else np.eye(3, dtype="float32")[y]
    kw.prune(model, data=(x, y), sparsity=0.3, num_grads=20, verbose=0, **options)
    model.predict(x, verbose=0)
    assert compilations(lambda: kw.prune(model, data=(x, y), sparsity=0.5, num_grads=20, verbose=0, **options)) == 0


def test_a_changed_layer_or_loss_is_compiled_anew(rng):
    model, (x, y) = built(), data(rng)
    options = {"data": (x, y), "quality": "fast", "num_grads": 20, "verbose": 0}

    kw.prune(model, sparsity=0.2, **options)
    first = compilations(lambda: kw.prune(model, sparsity=0.3, **options))
    model.layers[0].activation = keras.activations.relu
    changed = compilations(lambda: kw.prune(model, sparsity=0.4, **options))
    other = compilations(
        lambda: kw.prune(model, sparsity=0.5, loss=keras.losses.SparseCategoricalCrossentropy(), **options)
    )
    assert first == 0
    assert NAME == "torch" or (changed > 0 and other > 0)


def test_a_dead_model_is_kept_by_nothing(rng):
    model, (x, y) = built(), data(rng)
    kw.prune(model, data=(x, y), sparsity=0.3, quality="fast", num_grads=20, verbose=0)
    alive = weakref.ref(model)
    del model
    keras.utils.clear_session()
    gc.collect()
    assert alive() is None


def test_the_one_that_was_not_used_for_longest_goes_first():
    model, made = built(), []

    def ask(key):
        trace_of(model, key, lambda function: made.append(key) or function)

    for key in [*range(8), *range(8)]:
        ask(key)
    assert made == list(range(8)), "eight are kept"
    for key in (0, 8, 0, 1):
        ask(key)
    assert made == [*range(8), 8, 1]
