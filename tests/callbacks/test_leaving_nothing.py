"""What callbacks leave in a model when one of them fails, what others see of them meanwhile, and copies of them."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from leftovers import left_in
from releases import MultiOptimizer, OptimizerMap

import keras_woodfisher as kw
from keras_woodfisher.recipe.one_shot_callback import OneShotPruning

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=8.0),
    "multi": lambda: MultiOptimizer(
        OptimizerMap(keras.optimizers.SGD(0.05, momentum=0.9), {".*out/.*": keras.optimizers.Adam(0.01)})
    ),
}


def pruner_of(data=None, **kwargs):
    settings = {"init_sparsity": 0.2, "start_epoch": 0.5, "end_epoch": 1.5, "num_grads": 2, "verbose": 0} | kwargs
    return kw.WoodFisherPruning(0.5, data=data, **settings)


class Data:
    """Examples that don't fit the model any more once training has begun."""

    def __init__(self, blobs):
        self._blobs, self.spoilt = blobs, False

    def __call__(self):
        x, y = self._blobs
        yield (x[:, :3] if self.spoilt else x), y


class Spoil(keras.callbacks.Callback):
    def __init__(self, data):
        super().__init__()
        self._data = data

    def on_train_batch_begin(self, batch, logs=None):
        self._data.spoilt = True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_failed_update_takes_everything_out(make_mlp, blobs, name):
    model, data = make_mlp(OPTIMIZERS[name]()), Data(blobs)
    # Others that prune, hold and freeze in the same run leave with it.
    callbacks = [
        pruner_of(data, params=["hidden/kernel"]),
        pruner_of(params=["out/kernel"]),
        kw.TrainableParams(["hidden/bias"], trainable=False),
        kw.SetLearningRate(0.02) if name != "multi" else kw.SetWeightDecay(0.1),
    ]
    with pytest.raises(ValueError, match="shape"):
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[*callbacks, Spoil(data)])
    assert left_in(model) == []
    assert model.get_layer("hidden").bias.trainable
    # It trains on as any model, with the same callbacks, too.
    model.fit(*blobs, batch_size=24, verbose=0)
    data.spoilt = False
    model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=callbacks)
    assert kw.sparsity_report(model).sparsity == 0.5
    assert left_in(model) == []


def failures(blobs):
    x, y = blobs
    late = kw.KeepZeros(["hidden/kernel"], start_epoch=1)
    return [
        ([pruner_of(), kw.KeepZeros(["nothing"])], KeyError, "nothing"),
        ([pruner_of(), late], ValueError, "at the same time"),
        ([pruner_of(), kw.TrainableParams(["out/kernel"], False)], ValueError, "is frozen at epoch 0"),
        ([pruner_of(), kw.SetLearningRate(0.1), kw.TrainableParams(["typo"])], KeyError, "typo"),
        ([kw.KeepZeros(), OneShotPruning((x[:, :3], y), 0, {"sparsity": 0.5})], ValueError, "shape"),
    ]


def test_a_callback_that_refuses_takes_the_others_out(make_mlp, blobs):
    model = make_mlp("adam")
    for callbacks, error, message in failures(blobs):
        with pytest.raises(error, match=message):
            model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=callbacks)
        assert left_in(model) == []
        assert len(model.trainable_variables) == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_others_see_a_stock_optimizer(make_mlp, blobs, name):
    model, seen = make_mlp(OPTIMIZERS[name]()), []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            lines = []
            self.model.summary(print_fn=lambda text, line_break=None: lines.append(text))
            tree = self.model.get_state_tree(value_format="numpy_array")
            seen.append(([line for line in lines if "ptimizer" in line], len(keras.tree.flatten(tree))))
            assert "woodfisher" not in str(tree)

    model.fit(*blobs, batch_size=24, verbose=0, callbacks=[Look()])
    model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[pruner_of(), Look()])
    assert "ptimizer params" in str(seen[0])
    assert seen == [seen[0]] * 3


def callbacks_of(blobs):
    return [
        pruner_of(),
        kw.KeepZeros(start_epoch=1.5),
        kw.TrainableParams(["hidden/bias"], trainable=False),
        kw.SetLearningRate(0.02),
        kw.SetWeightDecay(0.1),
        OneShotPruning(blobs[0], 0, {"sparsity": 0.1}),
    ]


def test_used_callbacks_can_be_copied(make_mlp, blobs):
    model, callbacks = make_mlp("adam"), callbacks_of(blobs)
    hows = [copy.deepcopy, copy.copy, lambda callback: pickle.loads(pickle.dumps(callback))]
    copies = []

    class Copy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            copies.extend([how(callback) for callback in callbacks] for how in hows)

    model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[*callbacks, Copy()])
    copies.extend([how(callback) for callback in callbacks] for how in hows)
    assert callbacks[0].report().sparsity == 0.5
    for group in copies:
        assert [type(one) for one in group] == [type(one) for one in callbacks]
        assert [one.get_config() for one in group[:-1]] == [one.get_config() for one in callbacks[:-1]]
        assert all(one.model is None for one in group)
        with pytest.raises(RuntimeError, match="once training has begun"):
            group[0].report()
    for group in copies[1], copies[-1]:
        model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=group)
        assert group[0].report().sparsity == 0.5
        assert left_in(model) == []


def test_copies_share_their_data(blobs):
    generator = iter([blobs])
    data = lambda: generator  # noqa: E731 (it can't be pickled, nor can what it returns)
    pruner = pruner_of(data)
    assert copy.deepcopy(pruner).task.data is data
    assert copy.deepcopy(pruner_of(blobs)).task.data is blobs


class Penalty(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


def test_a_loss_of_layers_can_be_buffered_and_the_message_says_so(blobs):
    inputs = keras.Input((12,))
    model = keras.Model(inputs, Penalty()(keras.layers.Dense(4, name="hidden")(inputs)))
    model.compile(keras.optimizers.SGD(0.01))
    with pytest.raises(ValueError, match=r"isn't compiled with a loss.*or leave out `data`") as refused:
        model.fit(blobs[0], epochs=2, verbose=0, callbacks=[pruner_of(blobs[0])])
    assert "loss=" not in str(refused.value)
    model.fit(blobs[0], epochs=2, batch_size=24, verbose=0, callbacks=[pruner_of()])
    kernel = ops.convert_to_numpy(model.get_layer("hidden").kernel)
    assert np.count_nonzero(kernel == 0) == 24
