"""Loops of the user's own: the callbacks hold zeros there, or say why they can't."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from kills import X, Y, network
from leftovers import left_in

import keras_woodfisher as kw

BACKEND = keras.backend.backend()
BATCHES = [(X[i : i + 24], Y[i : i + 24]) for i in range(0, len(X), 24)]


def pruner(**more):
    settings = {"start_epoch": 1, "end_epoch": 2, "update_frequency": 1, "data": (X, Y), "num_grads": 8, "verbose": 0}
    return kw.WoodFisherPruning(0.6, **settings | more)


def told(model, callback, step, epochs=3, done=lambda: None, begun=lambda: None):
    """Calls the callback as `fit` does, around steps; `done` puts state into variables, `begun` takes it from them."""
    callbacks = keras.callbacks.CallbackList([callback], model=model, epochs=epochs, steps=len(BATCHES))
    callbacks.on_train_begin()
    seen = []
    begun()
    for epoch in range(epochs):
        callbacks.on_epoch_begin(epoch)
        for number, batch in enumerate(BATCHES):
            callbacks.on_train_batch_begin(number)
            begun()
            step(*batch)
            done()
            callbacks.on_train_batch_end(number, {})
            seen.append(kw.sparsity_report(model).sparsity)
        callbacks.on_epoch_end(epoch, {})
        begun()
    done()
    callbacks.on_train_end()
    return seen


class InState:
    """A step of JAX, as Keras's guide has it."""

    def __init__(self, model):
        import jax

        self.model, self.optimizer = model, model.optimizer
        self.optimizer.build(model.trainable_variables)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def measured(trained, others, x, y):
            outputs, others = model.stateless_call(trained, others, x, training=True)
            return loss(y, outputs), others

        differentiated = jax.value_and_grad(measured, has_aux=True)

        def step(trained, others, slots, x, y):
            (_, others), grads = differentiated(trained, others, x, y)
            return *self.optimizer.stateless_apply(slots, grads, trained), others

        self.compiled = step

    def take(self):
        parts = self.model.trainable_variables, self.model.non_trainable_variables, self.optimizer.variables
        self.state = [[variable.value for variable in part] for part in parts]

    def __call__(self, x, y):
        trained, slots, others = self.compiled(*self.state, x, y)
        self.state = [trained, others, slots]

    def put(self, weights_only=False):
        parts = self.model.trainable_variables, self.model.non_trainable_variables, self.optimizer.variables
        for part, values in list(zip(parts, self.state, strict=True))[: 2 if weights_only else 3]:
            for variable, value in zip(part, values, strict=True):
                variable.assign(value)


@pytest.mark.skipif(BACKEND != "jax", reason="only on JAX is state kept beside the variables")
@pytest.mark.parametrize("kind", ["pruner", "zeros"])
@pytest.mark.parametrize("put", ["each time", "at the end", "weights only"])
def test_a_state_beside_the_variables_is_put_back_or_refused(kind, put):
    model = network(sparsity=0.6 if kind == "zeros" else 0.0)
    step = InState(model)
    callback = kw.KeepZeros() if kind == "zeros" else pruner()
    if put == "each time":
        seen = told(model, callback, step, done=step.put, begun=step.take)
        assert seen[-1] == pytest.approx(0.6, abs=1e-2) and seen == sorted(seen)
        return
    took = []

    def once():
        if not took:
            took.append(step.take())

    back = (lambda: step.put(weights_only=True)) if put == "weights only" else lambda: None
    with pytest.raises(
        ValueError, match="reads and writes the model's variables, and this loop trains in a state of its"
    ):
        told(model, callback, step, done=back, begun=once)


def test_steps_that_only_add_up_gradients():
    model = network(keras.optimizers.Adam(0.01, gradient_accumulation_steps=16), sparsity=0.6)
    seen = told(model, kw.KeepZeros(), model.train_on_batch)
    assert seen[0] == seen[-1] == pytest.approx(0.6, abs=1e-2)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only on TensorFlow does a traced step keep hold of masks")
def test_a_step_that_was_traced_with_masks_lets_weights_grow_afterwards():
    import tensorflow as tf

    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        grads = tape.gradient(value, model.trainable_variables)
        model.optimizer.apply(grads, model.trainable_variables)

    seen = told(model, pruner(), step)
    assert seen[-1] == pytest.approx(0.6, abs=1e-2) and seen == sorted(seen)
    for batch in BATCHES:
        step(*map(tf.convert_to_tensor, batch))
    assert kw.sparsity_report(model).sparsity < 0.1


def test_a_part_of_training_that_begins_anew_is_refused():
    model, callback = network(), pruner(total_epochs=4)
    fit = {"batch_size": 24, "verbose": 0, "callbacks": [callback]}
    model.fit(X, Y, epochs=1, **fit)
    with pytest.raises(ValueError, match=r"ended after epoch 1 of .* Give initial_epoch=1, and epochs=2"):
        model.fit(X, Y, epochs=1, **fit)
    model.fit(X, Y, initial_epoch=1, epochs=4, **fit)
    assert kw.sparsity_report(model).sparsity == pytest.approx(0.6, abs=1e-2)
    # Anew, with other weights.
    network().fit(X, Y, epochs=1, **fit)


def test_parts_of_training_with_batches_of_other_sizes():
    model, callback = network(), pruner(total_epochs=4, start_epoch=0, end_epoch=3, method="magnitude", data=None)
    model.run_eagerly = True
    for epoch, size in enumerate((48, 12, 48)):
        fit = {"batch_size": size, "verbose": 0, "callbacks": [callback]}
        model.fit(X, Y, initial_epoch=epoch, epochs=epoch + 1, **fit)
        with pytest.raises(ValueError, match=rf"ended after epoch {epoch + 1} of .* Give initial_epoch={epoch + 1}, "):
            model.fit(X, Y, initial_epoch=epoch, epochs=epoch + 1, **fit)
    model.fit(X, Y, initial_epoch=3, epochs=4, verbose=0, callbacks=[callback])
    assert kw.sparsity_report(model).sparsity == pytest.approx(0.6, abs=1e-2)


@pytest.mark.parametrize("method", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("first", [True, False])
def test_training_that_diverges_in_its_last_batch_ends_as_without_pruning(method, first):
    x = X.copy()
    x[-3:] = np.nan
    model, stop = network(), keras.callbacks.TerminateOnNaN()
    callback = kw.WoodFisherPruning(0.6, end_epoch=1, method=method, num_grads=4, start_epoch=1, verbose=0)
    callbacks = [callback, stop] if first else [stop, callback]
    with pytest.warns(
        UserWarning, match=r"The update at epoch 1 was left out\. The model's weights aren't finite"
    ) as caught:
        history = model.fit(x, Y, batch_size=24, shuffle=False, verbose=0, callbacks=callbacks)
    assert np.isnan(history.history["loss"]).all()
    assert sum("was left out" in str(entry.message) for entry in caught) == 1
    assert not any(hasattr(variable.constraint, "mask") for variable in model.trainable_variables)
    assert np.isnan(ops.convert_to_numpy(model.trainable_variables[0])).any()


def sharing(sparsity):
    """Two models with one layer, each pruned."""
    inputs = keras.Input((12,))
    shared = keras.layers.Dense(16, name="shared")(inputs)
    models = [keras.Model(inputs, keras.layers.Dense(3, name=name)(shared)) for name in ("one", "other")]
    for model in models:
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        if sparsity:
            kw.prune(model, sparsity=sparsity, method="magnitude", verbose=0)
    return models


def driven(model, callback):
    callbacks = keras.callbacks.CallbackList([callback], model=model, epochs=3, steps=1)
    callbacks.on_train_begin()
    return callbacks


@pytest.mark.parametrize("grows", [False, True])
def test_models_that_share_a_layer_each_keep_their_zeros(grows):
    models = sharing(0.0 if grows else 0.5)
    settings = {"start_epoch": 0, "end_epoch": 2, "init_sparsity": 0.2, "method": "magnitude", "verbose": 0}
    second = kw.WoodFisherPruning(0.6, **settings) if grows else kw.KeepZeros()
    lists = [driven(*pair) for pair in zip(models, (kw.KeepZeros(), second), strict=True)]
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for epoch in range(3):
            for event in ("on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end"):
                for callbacks, model in zip(lists, models, strict=True):
                    getattr(callbacks, event)(epoch if "epoch" in event else 0)
                    if event == "on_train_batch_begin":
                        model.train_on_batch(X, Y)
            # The last step was the second model's: this one's must know its masks, too.
            models[0].train_on_batch(X, Y)
            seen.append([kw.sparsity_report(model).sparsity for model in models])
    if grows:
        np.testing.assert_allclose([pair[1] for pair in seen], [0.2, 0.55, 0.6], atol=1e-2)
    else:
        assert seen[0] == seen[2] and min(seen[0]) >= 0.5
    for callbacks in lists:
        callbacks.on_train_end()
    assert not any(left_in(model) for model in models)


def test_what_cant_be_held_in_two_trainings_is_refused():
    models = sharing(0.0)
    first = driven(models[0], pruner(start_epoch=0))
    with pytest.raises(ValueError, match=r"callbacks of two trainings prune '.*shared/kernel' at the same time"):
        driven(models[1], pruner(start_epoch=0))
    first.on_train_end()
    # One model: which of them is a leftover can't be told.
    first = driven(models[0], kw.KeepZeros())
    driven(models[0], kw.KeepZeros()).on_train_end()
    with pytest.raises(ValueError, match=r"The masks of KeepZeros were removed before its training had ended: a `fit`"):
        first.on_epoch_begin(0)
    first = driven(models[0], kw.KeepZeros())
    models[0].fit(X, Y, verbose=0)
    with pytest.warns(UserWarning, match="The masks of KeepZeros were removed before its training"):
        first.on_train_end()
    assert not any(left_in(model) for model in models)


@pytest.mark.parametrize("inner", ["plain", "held"])
def test_a_fit_within_a_fit_leaves_the_masks_of_the_outer_one(inner):
    model = network(sparsity=0.6)
    model.run_eagerly = True
    zeros = kw.sparsity_report(model).pruned

    class Within(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            callbacks = [] if inner == "plain" else [kw.KeepZeros(["out/kernel"])]
            self.model.fit(X, Y, batch_size=96, verbose=0, callbacks=callbacks)
            assert kw.sparsity_report(self.model).pruned == zeros

    model.fit(X, Y, batch_size=96, epochs=2, verbose=0, callbacks=[kw.KeepZeros(), Within()])
    assert kw.sparsity_report(model).pruned == zeros
    assert left_in(model) == []
