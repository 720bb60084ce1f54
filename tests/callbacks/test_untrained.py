"""Weights without a gradient from the compiled optimizer: refused where gradients are buffered, told of elsewhere."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw

BACKEND = keras.backend.backend()
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")


class Count(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.batches += 1


def fit(model, *data, **kwargs):
    """Trains with buffered gradients; gives the names of sparse variables, and the number of batches."""
    count = Count()
    settings = {"start_epoch": 1, "end_epoch": 1, "num_grads": 4, "verbose": 0} | kwargs
    pruner = kw.WoodFisherPruning(0.5, **settings)
    model.fit(*data, epochs=2, batch_size=24, verbose=0, callbacks=[pruner, count])
    return [v.name for v in kw.sparsity_report(model).variables if v.pruned], count.batches


def refused(model, *data, batches=0, **kwargs):
    """What the error says; no more than so many batches have begun, and nothing stays."""
    begun = Count()
    settings = {"start_epoch": 1, "end_epoch": 1, "num_grads": 4, "verbose": 0} | kwargs
    with pytest.raises(ValueError, match=r"exclude.*params|params.*exclude") as error:
        pruner = kw.WoodFisherPruning(0.5, **settings)
        model.fit(*data, epochs=2, batch_size=24, verbose=0, callbacks=[pruner, begun])
    assert begun.batches == batches
    assert "data=" in str(error.value)
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)
    return str(error.value)


def two_outputs(loss, weights=None, outputs=dict):
    inputs = keras.Input((12,))
    body = layers.Dense(8, activation="relu", name="body")(inputs)
    tower = layers.Dense(8, activation="relu", name="tower")(body)
    heads = {"first": layers.Dense(3, name="first")(body), "second": layers.Dense(3, name="second")(tower)}
    model = keras.Model(inputs, outputs(heads) if outputs is dict else list(heads.values()))
    model.compile(keras.optimizers.SGD(0.1), loss, loss_weights=weights)
    return model


@pytest.mark.parametrize(
    ("loss", "weights", "outputs"),
    [
        ({"first": LOSS}, None, dict),
        ([LOSS, None], None, list),
        ({"first": LOSS, "second": None}, None, list),
        ([LOSS, LOSS], [1.0, 0.0], list),
        ({"first": LOSS, "second": LOSS}, {"first": 1.0, "second": 0.0}, dict),
    ],
)
def test_an_output_without_a_loss(blobs, loss, weights, outputs):
    x, y = blobs
    labels = {"first": y, "second": y} if outputs is dict else [y, y]
    model = two_outputs(loss, weights, outputs)
    message = refused(model, x, labels)
    assert "tower/kernel, second/kernel" in message
    assert "body" not in message and "first" not in message
    # Alone, too; and without them it prunes.
    assert "second/kernel" in refused(model, x, labels, params=["second/kernel"])
    sparse, batches = fit(model, x, labels, exclude=["tower/kernel", "second/kernel"])
    assert sparse == ["body/kernel", "first/kernel"] and batches == 8


def test_outputs_that_have_a_loss_are_pruned(blobs):
    x, y = blobs
    for loss, weights, outputs in [(LOSS, None, list), ([LOSS, LOSS], [1.0, 0.5], list)]:
        sparse, _ = fit(two_outputs(loss, weights, outputs), x, [y, y])
        assert len(sparse) == 4


def test_samples_of_data_tell_of_them(blobs):
    x, y = blobs
    with pytest.warns(UserWarning, match=r"No gradient sample depends on tower/kernel, second/kernel: .*`exclude`"):
        fit(two_outputs({"first": LOSS}), x, {"first": y}, data=(x, {"first": y}))
    with pytest.warns(UserWarning, match=r"No gradient sample depends on tower/kernel, second/kernel"):
        kw.prune(two_outputs({"first": LOSS}), (x, {"first": y}), 0.5, quality="fast", verbose=0)
    with pytest.warns(UserWarning) as caught:
        kw.prune(two_outputs({"first": LOSS}), (x, {"first": y}), 0.5, method="woodfisher", stages=3, verbose=0)
    assert sum("No gradient sample depends on" in str(entry.message) for entry in caught) == 1, "not at each stage"


class Teacher(keras.Model):
    """A part of it gets no gradient, which no graph tells."""

    def __init__(self):
        super().__init__()
        self.teacher, self.student = layers.Dense(8, name="teacher"), layers.Dense(3, name="student")

    def call(self, x):
        return self.student(ops.stop_gradient(self.teacher(x)))


def test_what_only_a_step_tells(blobs):
    model = Teacher()
    model(blobs[0][:1])
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    if BACKEND == "jax":
        # Its gradients are zeros like any others.
        with pytest.warns(UserWarning, match=r"No gradient sample depends on teacher/\w+/kernel|teacher/kernel"):
            fit(model, *blobs)
    else:
        assert "teacher/kernel" in refused(model, *blobs, batches=1)
    sparse, _ = fit(model, *blobs, params=["re:.*student/kernel"])
    assert len(sparse) >= 1


class Gan(keras.Model):
    """Two networks with an optimizer each; the compiled one trains the generator, in one of so many steps."""

    def __init__(self, every=1):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((4,)), layers.Dense(12)], name="generator")
        self.critic = keras.Sequential([keras.Input((12,)), layers.Dense(1)], name="critic")
        self.built = True
        self.every, self.steps = every, 0

    def call(self, z):
        return self.critic(self.generator(z))

    def compile(self, critic_optimizer, **kwargs):
        super().compile(**kwargs)
        self.critic_optimizer = critic_optimizer

    def train_step(self, data):
        x = data[0] if isinstance(data, (tuple, list)) else data
        z = keras.random.normal((24, 4))
        self.steps += 1
        self._step(lambda: ops.mean(self(z)) - ops.mean(self.critic(x)), self.critic_optimizer, self.critic)
        if self.steps % self.every == 0:
            self._step(lambda: -ops.mean(self(z)), self.optimizer, self.generator)
        return {"steps": float(self.steps)}

    def _step(self, loss, optimizer, part):
        weights = part.trainable_weights
        if BACKEND == "torch":
            import torch

            self.zero_grad()
            loss().backward()
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in weights], weights)
        else:
            import tensorflow as tf

            with tf.GradientTape() as tape:
                value = loss()
            optimizer.apply(tape.gradient(value, weights), weights)


def gan(every=1):
    model = Gan(every)
    model.compile(keras.optimizers.SGD(0.01), optimizer=keras.optimizers.SGD(0.01), run_eagerly=True)
    return model


# A train step of one's own with two of Keras's optimizers can't be written for JAX.
if BACKEND != "jax":

    def test_a_second_optimizer(blobs):
        x = blobs[0]
        model = gan()
        message = refused(model, x)
        assert "critic_optimizer" in message and "critic/dense" in message
        # Named ones are taken, unless the first step shows that the other optimizer trains them.
        message = refused(model, x, params=["re:critic/.*kernel"], batches=1)
        assert "critic/dense" in message and "generator" not in message
        # By now it is known what it trains.
        message = refused(model, x, params=["re:.*kernel"])
        assert "critic/dense" in message and "generator" not in message
        sparse, _ = fit(model, x, params=["re:generator/.*kernel"])
        assert len(sparse) == 1 and "generator" in sparse[0]

    def test_what_is_trained_now_and_then(blobs):
        model = gan(every=2)
        sparse, _ = fit(model, blobs[0], params=["re:generator/.*kernel"], num_grads=2)
        assert len(sparse) == 1
        # Never trained at all, it can't be pruned.
        with pytest.raises(RuntimeError, match="or none that the compiled optimizer made"):
            fit(gan(every=100), blobs[0], params=["re:generator/.*kernel"], num_grads=2)


def test_magnitude_needs_no_gradient(blobs):
    x, y = blobs
    model = two_outputs({"first": LOSS})
    sparse, _ = fit(model, x, {"first": y}, method="magnitude")
    assert len(sparse) == 4
    assert np.isfinite(model.evaluate(x, {"first": y}, verbose=0))
