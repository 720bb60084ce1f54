"""Averages of weights that an optimizer keeps, and whatever else it computes weights from, follow a correction."""

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends.keras_internals.optimizers import slot_lists, trained_variables
from releases import MultiOptimizer, Muon, OptimizerMap, ScheduleFreeAdamW

import keras_woodfisher as kw
from keras_woodfisher.model.weight_copies import copies_follow

# TensorFlow traces a step of all these for longer than it runs them.
EAGER = {"run_eagerly": keras.backend.backend() == "tensorflow"}


@keras.saving.register_keras_serializable("tests")
class Lookahead(keras.optimizers.Adam):
    """Every second step goes half way from slow weights to the fast ones (arXiv 1907.08610)."""

    def build(self, variables):
        super().build(variables)
        self.slow = self.add_optimizer_variables(variables, "slow")
        for slow, variable in zip(self.slow, variables, strict=True):
            slow.assign(ops.copy(variable))

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        super()._backend_update_step(grads, trainable_variables, learning_rate)
        for variable in trainable_variables:
            slow = self.slow[self._get_variable_index(variable)]
            now = ops.cast(ops.equal(self.iterations % 2, 1), "float32")
            slow.assign(slow + 0.5 * now * (variable - slow))
            variable.assign(now * slow + (1 - now) * variable)


RESTING = {
    "sgd": lambda: keras.optimizers.SGD(0.0, momentum=0.9, use_ema=True),
    "overwrite": lambda: keras.optimizers.Adam(0.0, use_ema=True, ema_overwrite_frequency=3),
    "lion": lambda: keras.optimizers.Lion(0.0, use_ema=True),
    "muon": lambda: Muon(0.0, use_ema=True, adam_lr_ratio=0.0),
    "accumulation": lambda: keras.optimizers.AdamW(0.0, use_ema=True, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Lion(0.0, use_ema=True, ema_overwrite_frequency=2), initial_scale=8.0
    ),
    "multi": lambda: MultiOptimizer(
        OptimizerMap(keras.optimizers.SGD(0.0, use_ema=True), {".*out/.*": keras.optimizers.RMSprop(0.0, use_ema=True)})
    ),
    "schedule_free": lambda: ScheduleFreeAdamW(0.0),
    "lookahead": lambda: Lookahead(0.0),
}
"""Of rate 0: training leaves weights as the last update made them."""


def kernels(model):
    return [ops.convert_to_numpy(model.get_layer(name).kernel) for name in ("hidden", "out")]


class Record(keras.callbacks.Callback):
    """The kernels before and after each step."""

    def __init__(self):
        super().__init__()
        self.before, self.after = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.before.append(kernels(self.model))

    def on_train_batch_end(self, batch, logs=None):
        self.after.append(kernels(self.model))


def pruner_of(**kwargs):
    settings = {"init_sparsity": 0.3, "start_epoch": 0.5, "end_epoch": 1.5, "num_grads": 2, "verbose": 0} | kwargs
    return kw.WoodFisherPruning(0.6, **settings)


@pytest.mark.parametrize("name", RESTING)
def test_a_correction_stays(make_mlp, blobs, name):
    model, record = make_mlp(RESTING[name](), **EAGER), Record()
    dense = kernels(model)
    model.fit(*blobs, epochs=3, batch_size=24, verbose=0, callbacks=[pruner_of(), record])
    for first, updated, last in zip(dense, record.before[6], kernels(model), strict=True):
        assert np.abs((updated - first)[updated != 0]).max() > 1e-3
        np.testing.assert_allclose(last, updated, atol=1e-6)
        np.testing.assert_array_equal(last == 0, updated == 0)


def test_the_average_is_the_one_of_corrected_weights(make_mlp, blobs):
    model, record = make_mlp(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9), **EAGER), Record()
    model.fit(*blobs, epochs=3, batch_size=24, verbose=0, callbacks=[pruner_of(), record])
    steps = len(record.after)
    # The first step's weights begin the average.
    share = np.array([0.9 ** (steps - 1), *(0.1 * 0.9 ** (steps - 1 - step) for step in range(1, steps))])
    np.testing.assert_allclose(share.sum(), 1.0)
    for place, last in enumerate(kernels(model)):
        ends = np.array([after[place] for after in record.after])
        changes = np.zeros_like(ends)
        changes[:-1] = [new[place] - end for new, end in zip(record.before[1:], ends[:-1], strict=True)]
        later = np.cumsum(changes[::-1], axis=0)[::-1]
        kept = last != 0
        np.testing.assert_allclose(last[kept], np.tensordot(share, ends + later, 1)[kept], atol=1e-5)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swapped_averages_have_it(make_mlp, blobs, swap_on_epoch):
    model, record, seen = make_mlp(keras.optimizers.SGD(0.0, use_ema=True), **EAGER), Record(), []

    class Look(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            seen.append(kernels(self.model))

    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    settings = {"epochs": 2, "batch_size": 24, "validation_data": blobs, "verbose": 0}
    model.fit(*blobs, callbacks=[pruner_of(), swap, record, Look()], **settings)
    for first, other in ((record.before[2], seen[0]), (record.before[6], seen[-1]), (seen[-1], kernels(model))):
        for now, then in zip(other, first, strict=True):
            assert (then == 0).any()
            np.testing.assert_allclose(now, then, atol=1e-6)
            np.testing.assert_array_equal(now == 0, then == 0)


@pytest.mark.parametrize("method", ["woodfisher", "reconstruct", "reconstruct_kept"])
def test_what_is_pruned_in_one_shot_stays_so(make_mlp, blobs, method):
    model = make_mlp(keras.optimizers.SGD(0.0, use_ema=True), **EAGER)
    dense = keras.models.clone_model(model)
    dense.set_weights(model.get_weights())
    model.fit(*blobs, batch_size=24, verbose=0)
    for variable in model.trainable_variables:
        # On JAX, Keras itself hands one array twice to the next `fit` after one with averages.
        variable.assign(ops.copy(variable))
    if method == "reconstruct_kept":
        kw.prune(model, sparsity=0.6, method="magnitude", verbose=0)
        kw.reconstruct(model, blobs[0], dense=dense, verbose=0)
    else:
        kw.prune(model, blobs, 0.6, method=method, quality="fast", verbose=0)
    pruned = kernels(model)
    assert np.abs(pruned[0] - kernels(dense)[0])[pruned[0] != 0].max() > 1e-3
    model.fit(*blobs, epochs=2, batch_size=24, verbose=0, callbacks=[kw.KeepZeros()])
    for now, then in zip(kernels(model), pruned, strict=True):
        np.testing.assert_allclose(now, then, atol=1e-6)
        np.testing.assert_array_equal(now == 0, then == 0)


def test_ftrl_computes_the_changed_weights(make_mlp, blobs):
    settings = {"l1_regularization_strength": 0.01, "l2_regularization_strength": 0.02, "beta": 0.1}
    model = make_mlp(keras.optimizers.Ftrl(0.05, **settings))
    # A still pass: no gradient, so that the state alone gives the weights.
    still = {"sample_weight": np.zeros(96), "verbose": 0}
    model.fit(*blobs, batch_size=24, epochs=3, verbose=0)
    kernel = model.get_layer("hidden").kernel
    wanted = ops.convert_to_numpy(kernel) * 2 + 0.5 * np.sign(np.arange(16) - 7.5)
    wanted[:, 3] = 0.0
    with copies_follow(model, [kernel]):
        kernel.assign(wanted)
    model.fit(*blobs, **still)
    np.testing.assert_allclose(ops.convert_to_numpy(kernel), wanted, rtol=1e-3, atol=1e-4)


def test_a_change_that_fails_moves_nothing(make_mlp, blobs):
    model = make_mlp(keras.optimizers.SGD(0.0, use_ema=True), **EAGER)
    model.fit(*blobs, verbose=0)
    kernel = model.get_layer("hidden").kernel
    place = next(i for i, v in enumerate(trained_variables(model.optimizer)) if v is kernel)
    average = slot_lists(model.optimizer)["_model_variables_moving_average"][place]
    before = ops.convert_to_numpy(average)
    with pytest.raises(InterruptedError), copies_follow(model, [kernel]):
        kernel.assign(ops.zeros(kernel.shape))
        raise InterruptedError
    np.testing.assert_array_equal(ops.convert_to_numpy(average), before)
