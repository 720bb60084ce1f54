"""`prune`: one call, every kind of model and data."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_woodfisher as kw

NAME = keras.backend.backend()
LOSS = "sparse_categorical_crossentropy"


def mlp(name="mlp"):
    return keras.Sequential(
        [
            layers.Input((12,)),
            layers.Dense(16, "relu", name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, "softmax", name="out"),
        ],
        name=name,
    )


def functional():
    inputs = layers.Input((12,))
    x = layers.Dense(16, "relu")(inputs)
    return keras.Model(inputs, layers.Dense(3, "softmax")(layers.concatenate([x, inputs])))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(16, "relu")
        self.head = layers.Dense(3, "softmax")

    def call(self, x):
        return self.head(self.hidden(x))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 12), "float32"))
    return model


def kernels(model):
    return [ops.convert_to_numpy(w) for w in model.trainable_weights if len(w.shape) == 2]


def masks(model):
    return np.concatenate([kernel.ravel() == 0 for kernel in kernels(model)])


def same_weights(model, weights):
    for variable, values in zip(model.weights, weights, strict=True):
        variable.assign(values)
    return model


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("make", [mlp, functional, subclassed])
def test_models_of_every_kind(blobs, make, compiled):
    model = make()
    if compiled:
        model.compile("adam", LOSS)
    before = [k.copy() for k in kernels(model)]
    report = kw.prune(model, blobs, 0.6, quality="fast", num_grads=24, loss=None if compiled else LOSS, verbose=0)
    total = sum(k.size for k in before)
    assert report.pruned == masks(model).sum() == int(np.floor(0.6 * total + 0.5))
    assert report.weights == total
    assert [phase.name for phase in report.phases] == ["gradients", "inverse", "update"]
    assert all(phase.seconds >= 0 and phase.peak_bytes >= 0 for phase in report.phases)
    assert report.samples == 24
    assert "total" in str(report)
    # What is left was corrected.
    assert any((new[new != 0] != old[new != 0]).any() for new, old in zip(kernels(model), before, strict=True))
    if not compiled:
        assert not model.compiled
    model.compile("adam", LOSS)
    model.fit(*blobs, epochs=1, verbose=0)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // 16

    def __getitem__(self, index):
        part = slice(16 * index, 16 * (index + 1))
        return self.x[part], self.y[part]


def kinds_of_data(x, y):
    ones = np.ones(len(x), "float32")
    yield "arrays in a list", [x, y]
    yield "float64 arrays", (x.astype("float64"), y.astype("int64"))
    yield "with sample weights", (x, y, ones)
    yield "tensors", (ops.convert_to_tensor(x), ops.convert_to_tensor(y))
    yield "PyDataset", Batches(x, y)
    yield "callable", lambda: iter([(x[:40], y[:40]), (x[40:], y[40:])])
    if NAME == "torch":
        import torch

        pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        yield "DataLoader", torch.utils.data.DataLoader(pairs, batch_size=16)
    if NAME == "tensorflow":
        import tensorflow as tf

        yield "tf.data", tf.data.Dataset.from_tensor_slices((x, y)).batch(16)


def test_data_of_every_kind_gives_the_same_weights(blobs):
    # All 96 examples are used, so that their order is irrelevant.
    model = mlp()
    model.compile("adam", LOSS)
    weights = [ops.convert_to_numpy(w).copy() for w in model.weights]
    kw.prune(model, blobs, 0.5, quality="fast", num_grads=96, damp=1e-3, verbose=0)
    truth = [k.copy() for k in kernels(model)]
    for kind, data in kinds_of_data(*blobs):
        kw.prune(same_weights(model, weights), data, 0.5, quality="fast", num_grads=96, damp=1e-3, verbose=0)
        for found, right in zip(kernels(model), truth, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4, err_msg=kind)


def test_a_generator_is_refused(blobs):
    model = mlp()
    model.compile("adam", LOSS)
    with pytest.raises(TypeError, match=r"can be read only once.*data=lambda"):
        kw.prune(model, (batch for batch in [blobs]), 0.5, verbose=0)


def test_the_seed_chooses_the_examples(blobs):
    model = mlp()
    model.compile("adam", LOSS)
    weights = [ops.convert_to_numpy(w).copy() for w in model.weights]
    found = []
    for seed in (3, 3, 4):
        kw.prune(same_weights(model, weights), blobs, 0.5, quality="fast", num_grads=12, seed=seed, verbose=0)
        found.append(masks(model))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_devices_agree(blobs):
    model = mlp()
    model.compile("adam", LOSS)
    weights = [ops.convert_to_numpy(w).copy() for w in model.weights]
    found = []
    for devices in (None, "cpu", "cpu:0", ["cpu", "cpu:0"]):
        same_weights(model, weights)
        kw.prune(
            model, blobs, 0.5, quality="fast", num_grads=32, fisher_block_size=20, available_gpus=devices, verbose=0
        )
        found.append(masks(model))
    assert all((other == found[0]).mean() >= 0.999 for other in found)
    with pytest.raises(ValueError, match="no device 'cuda:7' here"):
        kw.prune(model, blobs, 0.5, available_gpus="cuda:7", verbose=0)


def test_everything_else_is_left_alone(blobs):
    model = mlp()
    model.compile("adam", LOSS, metrics=["accuracy"])
    model.fit(*blobs, epochs=1, verbose=0)
    untouched = [v for v in model.variables if v is not model.layers[0].kernel and v is not model.layers[2].kernel]
    untouched += [*model.optimizer.variables, *model.metrics_variables]
    before = [ops.convert_to_numpy(v).copy() for v in untouched]
    kw.prune(model, blobs, 0.5, quality="fast", num_grads=16, verbose=0)
    for variable, values in zip(untouched, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), values, err_msg=variable.path)


def test_zeros_that_are_there_count(blobs):
    model = mlp()
    model.compile("adam", LOSS)
    kw.prune(model, blobs, 0.5, quality="fast", num_grads=16, verbose=0)
    first, weights = masks(model), [k.copy() for k in kernels(model)]
    report = kw.prune(model, blobs, 0.5, quality="fast", num_grads=16, verbose=0)
    assert report.phases == () and report.sparsity == 0.5
    for now, then in zip(kernels(model), weights, strict=True):
        np.testing.assert_array_equal(now, then)
    kw.prune(model, blobs, 0.8, quality="fast", num_grads=16, verbose=0)
    assert masks(model)[first].all()
    assert masks(model).mean() == 0.8


def test_how_many_samples_by_default(blobs):
    model = mlp()
    model.compile("adam", LOSS)
    assert kw.prune(model, blobs, 0.1, quality="fast", verbose=0).samples == 96
    assert kw.prune(model, blobs, 0.2, quality="fast", grad_batch_size=5, verbose=0).samples == 19


def test_magnitude_needs_neither_data_nor_loss():
    model = mlp()
    report = kw.prune(model, sparsity=0.5, method="magnitude", global_sparsity=False, verbose=0)
    assert [v.sparsity for v in report.variables] == [0.5, 0.5]
    assert report.phases == ()


@pytest.mark.parametrize(
    "error, message, kwargs",
    [
        (ValueError, "needs data: examples x for reconstruction", {"data": None}),
        (ValueError, "isn't compiled with a loss", {"loss": None}),
        (ValueError, r"sparsity must lie in \[0, 1\), got 80", {"sparsity": 80}),
        (ValueError, "num_grads=97 with .* needs 97 examples.*num_grads=96 would fit", {"num_grads": 97}),
        (KeyError, "params names 'nothing'", {"params": ["nothing"]}),
        (
            MemoryError,
            "num_grads=10000000000 .*would fit",
            {"num_grads": 10**10, "data": lambda: iter([(np.ones((2, 12), "float32"), np.zeros(2, "int32"))])},
        ),
    ],
)
def test_errors_come_before_any_work_and_change_nothing(blobs, error, message, kwargs):
    model = mlp()
    before = [k.copy() for k in kernels(model)]
    with pytest.raises(error, match=message):
        kw.prune(model, **({"data": blobs, "sparsity": 0.5, "loss": LOSS, "quality": "fast", "verbose": 0} | kwargs))
    for now, then in zip(kernels(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_progress_is_shown(blobs, capsys):
    model = mlp()
    kw.prune(model, blobs, 0.5, loss=LOSS, quality="fast", num_grads=16, verbose=1)
    shown = capsys.readouterr().out
    assert all(f"WoodFisher pruning: {name}" in shown for name in ("gradients", "inverse", "update"))
    assert "16/16" in shown
    kw.prune(model, blobs, 0.6, loss=LOSS, quality="fast", num_grads=16, verbose=0)
    assert capsys.readouterr().out == ""


def test_constraints_of_weights_hold_after_the_correction(blobs):
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(8, kernel_constraint="non_neg"), keras.layers.Dense(3)]
    )
    kernel = model.layers[0].kernel
    kernel.assign(np.abs(keras.ops.convert_to_numpy(kernel)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = kw.prune(model, blobs, 0.7, loss=loss, quality="fast", num_grads=16, damp=1e-7, verbose=0)
    values = keras.ops.convert_to_numpy(kernel)
    assert values.min() >= 0
    assert report.sparsity >= 0.7 - 1 / 120
