"""The training run's own gradients: right, in order, without a trace."""

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible
from releases import MultiOptimizer, OptimizerMap

import keras_woodfisher as kw
from keras_woodfisher.gradients.buffer import BufferedGradients
from keras_woodfisher.model.optimizer_variables import inner_optimizer
from keras_woodfisher.model.targets import find_targets

BACKEND = keras.backend.backend()


class Spy(keras.callbacks.Callback):
    """Reads the newest rows at the end of each epoch, and the weights after each step where asked to."""

    def __init__(self, pruner, count, weights=False):
        super().__init__()
        self._pruner, self._count, self._weights = pruner, count, weights
        self.rows, self.weights = [], []

    def on_train_batch_begin(self, batch, logs=None):
        if self._weights and not self.weights:
            self.weights.append([target.read() for target in self._targets()])

    def on_train_batch_end(self, batch, logs=None):
        if self._weights:
            self.weights.append([target.read() for target in self._targets()])

    def on_epoch_end(self, epoch, logs=None):
        assert self.model is not None
        self.rows.append(np.concatenate(list(self._pruner.run.buffer.ring.latest(self._count, 3))))

    def _targets(self):
        assert self.model is not None
        return self._pruner.run.targets


def late(count, epochs, **kwargs):
    """Buffers `count` gradients and prunes only after the last step."""
    return kw.WoodFisherPruning(0.5, start_epoch=epochs, end_epoch=epochs, num_grads=count, verbose=0, **kwargs)


def gradients_by_hand(model, x, y):
    """The mean gradient of the cross-entropy of one batch, in weight order: (d,)."""
    w1, b1, w2, b2 = (ops.convert_to_numpy(v).astype(np.float64) for v in model.trainable_variables)
    before = x @ w1 + b1
    hidden = np.maximum(before, 0.0)
    logits = hidden @ w2 + b2
    error = np.exp(logits - logits.max(1, keepdims=True))
    error = (error / error.sum(1, keepdims=True) - np.eye(3)[y]) / len(x)
    inner = (error @ w2.T) * (before > 0)
    return np.concatenate([(x.T @ inner).T.ravel(), (hidden.T @ error).T.ravel()])


STILL = {
    "sgd": lambda: keras.optimizers.SGD(0.0),
    "accumulation": lambda: keras.optimizers.SGD(0.0, gradient_accumulation_steps=3),
    "static_scale": lambda: keras.optimizers.SGD(0.0, loss_scale_factor=64.0),
    "dynamic_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=256.0),
    "clipped": lambda: keras.optimizers.SGD(0.0, clipnorm=1e-3),
    "multi": lambda: MultiOptimizer(OptimizerMap(keras.optimizers.SGD(0.0), {".*out/.*": keras.optimizers.Adam(0.0)})),
}


@pytest.mark.parametrize("name", STILL)
def test_rows_are_the_gradients_of_the_batches(make_mlp, blobs, name):
    x, y = blobs
    steps = 2 if name == "sgd" and several_steps_are_possible() else 1
    model = make_mlp(STILL[name](), steps_per_execution=steps)
    expected = [gradients_by_hand(model, x[i : i + 24], y[i : i + 24]) for i in range(0, 96, 24)]
    pruner = late(6, 2)
    spy = Spy(pruner, 6)
    model.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0, callbacks=[pruner, spy])
    # Four of the first epoch; then the ring of six has wrapped: the last two of the first epoch come first.
    np.testing.assert_allclose(spy.rows[0], expected, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(spy.rows[1], [*expected[2:], *expected], rtol=2e-4, atol=1e-7)
    assert pruner.sparsity == 0.5


def test_rows_follow_the_weights_and_sparse_gradients_are_dense(rng):
    model = keras.Sequential(
        [
            keras.layers.Input((5,), dtype="int32"),
            keras.layers.Embedding(9, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1)),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = rng.integers(0, 9, (24, 5)), rng.normal(size=(24, 2)).astype("float32")
    pruner = late(4, 1, params="__ALL__")
    spy = Spy(pruner, 4, weights=True)
    model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[pruner, spy])
    # With a learning rate of 1, each step moves the weights by the gradient (regularisers included). After the last
    # one the model was pruned, too.
    moves = [np.concatenate(weights) for weights in spy.weights]
    np.testing.assert_allclose(spy.rows[0][:3], -np.diff(moves, axis=0)[2:5], atol=2e-6)
    assert spy.rows[0].shape == (4, 9 * 4 + 20 * 2)


def test_training_is_the_same_to_the_last_digit(make_mlp, blobs):
    losses, states = [], []
    for callbacks in ([], [late(8, 3)]):
        keras.utils.set_random_seed(3)
        model = make_mlp(keras.optimizers.Adam(0.01))
        epochs = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
        model.fit(*blobs, batch_size=24, epochs=3, verbose=0, callbacks=[*callbacks, epochs])
        states.append(len(model.optimizer.variables))
    assert losses[:12] == losses[12:]
    assert states[0] == states[1]


@pytest.mark.parametrize("name", ["sgd", "dynamic_scale"])
def test_hook_and_ring_are_gone_afterwards(make_mlp, blobs, name):
    model = make_mlp(STILL[name]())
    stock = {id(v) for v in model.optimizer.variables}
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            ours = [v for v in self.model.optimizer.variables if "woodfisher" in v.name]
            seen.append({v.name.rsplit("_", 1)[0] for v in ours})
            # TensorFlow has none of these on a GPU.
            assert BACKEND != "tensorflow" or "int32" not in {v.dtype for v in ours}

    model.fit(*blobs, batch_size=24, epochs=1, verbose=0, callbacks=[late(4, 1), Look()])
    assert seen == [{"keras_woodfisher_gradients", "keras_woodfisher_gradients_seen", "keras_woodfisher_mask"}]
    assert stock <= {id(v) for v in model.optimizer.variables}
    assert not any("woodfisher" in v.name for v in model.optimizer.variables)
    for optimizer in (model.optimizer, inner_optimizer(model.optimizer)):
        assert not {"apply", "save_own_variables", "_keras_woodfisher_hidden"} & set(vars(optimizer))


def batches(blobs, number, size=8):
    x, y = blobs
    for index in range(number):
        rows = np.arange(index * size, (index + 1) * size) % len(x)
        yield x[rows], y[rows]


def test_buffer_that_could_not_be_foreseen_to_be_too_small(make_mlp, blobs):
    # The length of the epoch isn't known: what there is is used, with a warning.
    pruner = late(20, 1)
    with pytest.warns(UserWarning, match="Only 5 of num_grads=20 gradients have been buffered"):
        make_mlp().fit(batches(blobs, 5), epochs=1, verbose=0, callbacks=[pruner])
    assert pruner.sparsity == 0.5
    pruner = kw.WoodFisherPruning(0.5, init_sparsity=0.2, end_epoch=1, num_grads=4, verbose=0)
    with pytest.raises(RuntimeError, match="no training step came before this update"):
        make_mlp().fit(batches(blobs, 5), epochs=1, verbose=0, callbacks=[pruner])


def test_buffer_that_can_not_be_full_is_refused(make_mlp, blobs):
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: steps.append(batch))
    pruner = kw.WoodFisherPruning(0.5, init_sparsity=0.2, start_epoch=0.5, end_epoch=2, num_grads=4, verbose=0)
    with pytest.raises(
        ValueError, match=r"(?s)update at epoch 0.5: only 2 steps.*num_grads=2 would fit.*start_epoch to 1 "
    ):
        make_mlp().fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner, count])
    # A first update that prunes nothing needs none, and a dictionary asks for few at first.
    pruner = kw.WoodFisherPruning(0.5, end_epoch=2, num_grads={0.0: 4, 0.4: 9}, verbose=0)
    with pytest.raises(ValueError, match=r"num_grads=9 .* update at epoch 2: only 8 steps"):
        make_mlp().fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner, count])
    assert steps == []
    pruner = kw.WoodFisherPruning(0.5, end_epoch=2, num_grads={0.0: 4, 0.4: 8}, verbose=0)
    make_mlp().fit(*blobs, batch_size=24, epochs=2, verbose=0, callbacks=[pruner])
    assert pruner.sparsity == 0.5


def test_buffer_that_a_gpu_has_no_room_for_is_refused(make_mlp):
    """12 x 16 and 16 x 3 weights: 4 gradients of 240 numbers are 3,840 bytes, a quarter of 15,360."""
    model = make_mlp()

    class Gpu:
        free = 15_360

        def devices(self):
            return ["cpu", "cuda:0", "cuda:1"]

        def free_memory(self, device):
            return self.free if device == "cuda:0" else 0

    buffered = BufferedGradients(model, find_targets(model, "__ALL_PRUNABLE__"), 4, Gpu())
    buffered.check(4)
    Gpu.free -= 4
    with pytest.raises(MemoryError, match=r"num_grads=4 takes .* for 240 weights on cuda:0, .* num_grads=3 would fit"):
        buffered.check(4)


def test_resumed_run_waits_for_its_gradients(make_mlp, blobs):
    model, log = make_mlp(), []

    class Log(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            log.append(logs["sparsity"])

    def pruner():
        return kw.WoodFisherPruning(0.6, end_epoch=3, num_grads=3, inter_func="linear", verbose=0)

    with pytest.warns(UserWarning, match="Training ended before end_epoch"):
        broken = pruner()
        broken.set_params({})
        model.fit(*blobs, batch_size=24, epochs=3, verbose=0, callbacks=[broken, Stop(1), Log()])
    assert log == [0.0] * 4 + [0.2] * 4
    log.clear()
    # The update of epoch 2 comes once there are three gradients; nothing else moves.
    model.fit(*blobs, batch_size=24, epochs=4, initial_epoch=2, verbose=0, callbacks=[pruner(), Log()])
    np.testing.assert_allclose(log, [0.2] * 3 + [0.4] + [0.6] * 4)
    with pytest.raises(ValueError, match=r"num_grads=9 .* only 4 steps"):
        late_run = kw.WoodFisherPruning(0.8, end_epoch=3, num_grads=9, verbose=0)
        model.fit(*blobs, batch_size=24, epochs=3, initial_epoch=2, verbose=0, callbacks=[late_run])


class Stop(keras.callbacks.Callback):
    """Stops after an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self._last = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self._last:
            self.model.stop_training = True


def test_a_step_without_a_gradient_of_a_variable_leaves_zeros(make_mlp, backend):
    model = make_mlp()
    targets = find_targets(model, "__ALL_PRUNABLE__")
    source = BufferedGradients(model, targets, 3, backend)
    source.attach()
    first = targets[0].variable
    gradient = np.arange(first.shape[0] * first.shape[1], dtype="float32").reshape(first.shape) + 1.0
    source.ring.keep(inner_optimizer(model.optimizer), {id(first): ops.convert_to_tensor(gradient)})
    (row,) = np.concatenate(list(source.ring.latest(3)))
    source.detach()
    np.testing.assert_array_equal(row[: targets[0].size], targets[0].flatten(gradient))
    assert not row[targets[0].size :].any()
