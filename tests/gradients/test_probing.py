"""Faults of labels and losses that one example alone hides: found before any work, in each entry point."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import layers, ops
from sampling import SEED, source_of

import keras_woodfisher as kw
from keras_woodfisher.gradients.loss import has_loss
from keras_woodfisher.gradients.probing import check_examples_alone

N = 40
WITHIN = "loss of one example alone doesn't depend.*compares the examples of a batch.*grad_batch_size=1 .*=32"
STRETCHED = r"labels of shape \(n,\), which don't fit the outputs of shape \(n, 3\).*Give what `fit` takes"


class OwnLoss(keras.losses.Loss):
    def call(self, y, z):
        return ops.mean(ops.square(y - z), axis=-1)


def own_function(y, z):
    return ops.mean(ops.square(z - y))


class OwnModel(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred))


def compiled(loss, outputs=3, shape=(5,), kind=keras.Model):
    inputs = layers.Input(shape)
    model = kind(inputs, layers.Dense(outputs)(layers.Dense(4, "tanh")(inputs)))
    model.compile("sgd", **({} if loss is None else {"loss": loss}))
    return model


def numbers(*shape):
    return np.random.default_rng(0).uniform(0.1, 0.9, shape).astype("float32")


def check(backend, model, data, b=1):
    source_of(backend, model, data, 4, b=b)[0].check(4)


def fits(model, data):
    """Whether Keras trains with it, in batches of more examples than any axis has."""
    try:
        model.fit(data[0], data[1], sample_weight=data[2] if len(data) > 2 else None, batch_size=20, verbose=0)
    except Exception:  # noqa: BLE001 - each framework has its own
        return False
    return True


LOSSES = ["mse", "mae", "huber", "log_cosh", "poisson", "kl_divergence", "cosine_similarity", "hinge"]
LOSSES += ["categorical_hinge", "dice", "binary_crossentropy", "categorical_crossentropy", OwnLoss(), own_function]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: getattr(loss, "__name__", None))
def test_labels_that_only_one_example_stretches_are_refused(backend, loss):
    model, x = compiled(loss), numbers(N, 5)
    with pytest.raises(ValueError, match=rf"^{STRETCHED.join(['(data holds ', ')'])}|must have the same"):
        check(backend, model, (x, numbers(N)))
    check(backend, model, (x, numbers(N, 3)))


@pytest.mark.parametrize(
    "outputs, shape, labels, weights",
    [
        (3, (5,), (3,), ()),
        (3, (5,), (3,), (1,)),
        (3, (5,), (3,), (3,)),
        (3, (5,), (3,), (2,)),
        (3, (5,), (1,), None),
        (3, (5,), (2,), None),
        (3, (5,), (), None),
        (1, (5,), (), None),
        (1, (5,), (), (1,)),
        (1, (5,), (3,), None),
        (3, (4, 5), (4, 3), (4,)),
        (3, (4, 5), (4, 3), (3,)),
        (3, (4, 5), (4, 3), ()),
        (3, (4, 5), (4,), None),
        (3, (4, 5), (3,), None),
    ],
)
def test_what_fit_refuses_is_refused(backend, outputs, shape, labels, weights):
    data = [numbers(N, *shape), numbers(N, *labels)] + ([] if weights is None else [numbers(N, *weights)])
    model = compiled("mse", outputs, shape)
    refused = r"which don't fit the outputs|can't be computed"
    fitting = fits(model, data)
    for b in (1, 3):
        with nullcontext() if fitting else pytest.raises(ValueError, match=refused):
            check(backend, model, tuple(data), b)


def test_labels_that_an_own_compute_loss_stretches(backend):
    model = compiled(None, kind=OwnModel)
    with pytest.raises(ValueError, match=STRETCHED):
        check(backend, model, (numbers(N, 5), numbers(N)))


class Subclassed(keras.Model):
    def __init__(self, outputs):
        super().__init__()
        self.dense = layers.Dense(outputs)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("outputs", [1, 3])
def test_subclassed_models(backend, outputs):
    model = Subclassed(outputs)
    model.compile("sgd", "mse")
    model(numbers(2, 5))
    check(backend, model, (numbers(N, 5), numbers(N, outputs)))
    if outputs > 1:
        with pytest.raises(ValueError, match=STRETCHED):
            check(backend, model, (numbers(N, 5), numbers(N)))


PRUNING = {"init_sparsity": 0.0, "final_sparsity": 0.5, "params": "__ALL_PRUNABLE__", "num_grads": 4}
POSITIONS = {"start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 0.5}
RECIPE = {"modifiers": [{"MFACPruningModifier": PRUNING | POSITIONS}]}
FINE = numbers(N, 5), numbers(N, 3)
ENTRIES = {
    "fast": lambda model, data: kw.prune(model, data, 0.5, quality="fast", num_grads=4, verbose=0),
    "calibrated": lambda model, data: kw.prune(model, data, 0.5, num_grads=4, calibration=8, verbose=0),
    "other examples": lambda model, data: kw.prune(model, FINE, 0.5, num_grads=4, calibration=data, verbose=0),
    "sensitivity": lambda model, data: kw.sensitivity(model, data, [0.5], num_grads=4, verbose=0),
    "measured": lambda model, data: kw.sensitivity(model, eval_data=data, method="magnitude", verbose=0),
    "callback": lambda model, data: model.fit(
        *FINE, verbose=0, callbacks=[kw.WoodFisherPruning(0.5, end_epoch=1, num_grads=4, data=data, verbose=0)]
    ),
    "recipe in one shot": lambda model, data: kw.load_recipe(RECIPE).apply(model, data, verbose=0),
    "recipe": lambda model, data: model.fit(
        *FINE, verbose=0, callbacks=kw.load_recipe(RECIPE).callbacks(model, data, verbose=0)
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_them_before_any_work(entry):
    model = compiled("mse")
    before = model.get_weights()
    # Groups of several examples have a loss that can't be computed at all.
    with pytest.raises(ValueError, match=rf"{STRETCHED}|examples in data can't be computed"):
        ENTRIES[entry](model, (numbers(N, 5), numbers(N)))
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_dry_run_names_labels_that_do_not_fit():
    checked = kw.check_recipe(kw.load_recipe(RECIPE), compiled("mse"), 2, data=(numbers(N, 5), numbers(N)), verbose=0)
    assert ["which don't fit the outputs" in problem.message for problem in checked.problems] == [True]


def similarities(z):
    z = z / ops.sqrt(ops.sum(ops.square(z), -1, keepdims=True))
    return ops.matmul(z, ops.transpose(z)) / 0.1


def contrastive(y, z):
    """InfoNCE of two views, the halves of an output."""
    both = similarities(ops.concatenate([z[:, :2], z[:, 2:]]))
    size = z.shape[0]
    return ops.mean(ops.sparse_categorical_crossentropy(ops.arange(size), both[:size, size:], from_logits=True))


def supervised(y, z):
    """Supervised contrastive: not a number where no other example has the same label."""
    others = 1.0 - ops.eye(z.shape[0])
    same = ops.cast(ops.equal(y[:, None], y[None]), "float32") * others
    logs = similarities(z) - ops.log(ops.sum(ops.exp(similarities(z)) * others, 1, keepdims=True))
    return -ops.mean(ops.sum(same * logs, 1) / ops.sum(same, 1))


def hardest(y, z):
    """Triplets of each anchor with its farthest relative and its nearest stranger."""
    distances = ops.sum(ops.square(z[:, None] - z[None]), -1)
    same = ops.cast(ops.equal(y[:, None], y[None]), "float32")
    return ops.mean(ops.relu(ops.max(distances * same, 1) - ops.min(distances + 1e6 * same, 1) + 1.0))


class Pairs(layers.Layer):
    def call(self, x):
        return similarities(x)


def diagonal(y, z):
    """As CLIP has it: the model itself compares the examples."""
    return ops.mean(ops.sparse_categorical_crossentropy(ops.arange(z.shape[0]), z, from_logits=True))


@pytest.fixture
def labelled():
    x = numbers(N, 5)
    return x, np.arange(N, dtype="int32") % 2


@pytest.mark.parametrize("loss", [contrastive, supervised, hardest, diagonal])
def test_a_loss_within_the_batch_asks_for_larger_samples(backend, loss, labelled):
    model = compiled(loss, 4)
    if loss is diagonal:
        model = keras.Model(model.inputs, Pairs()(model.outputs[0]))
        model.compile("sgd", loss)
    with pytest.raises(ValueError, match=WITHIN):
        check(backend, model, labelled)
    check(backend, model, labelled, b=8)


def test_a_loss_within_the_batch_is_refused_before_the_first_batch(labelled):
    model = compiled(hardest, 4)
    before = model.get_weights()
    with pytest.raises(ValueError, match=WITHIN):
        pruner = kw.WoodFisherPruning(0.5, start_epoch=1, end_epoch=2, num_grads=4, data=labelled, verbose=0)
        model.fit(*labelled, epochs=3, verbose=0, callbacks=[pruner])
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_samples_of_several_examples_have_a_loss_within_the_batch(labelled):
    report = kw.prune(compiled(hardest, 4), labelled, 0.5, quality="fast", num_grads=4, grad_batch_size=8, verbose=0)
    assert report.samples == 4


def test_a_flat_loss_is_not_taken_for_one_within_the_batch(backend, labelled):
    x, y = labelled
    flat = compiled(lambda y, z: ops.mean(ops.relu(z - 100.0)), 4)
    check(backend, flat, (x, y))
    with pytest.raises(ValueError, match=r"No usable gradient sample: 4 of 4.*samples.*grad_batch_size=1"):
        kw.prune(flat, (x, y), 0.5, quality="fast", num_grads=4, verbose=0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "compiled_with", "found"),
    [
        (keras.Model, None, False),
        (keras.Model, {}, False),
        (keras.Model, {"loss": "mse"}, True),
        (OwnModel, None, False),
        (OwnModel, {}, True),
    ],
)
def test_a_loss_is_compiled_or_computed_by_a_compiled_model(kind, compiled_with, found):
    inputs = layers.Input((5,))
    model = kind(inputs, layers.Dense(3)(inputs))
    if compiled_with is not None:
        model.compile("sgd", **compiled_with)
    assert has_loss(model) == found


@pytest.mark.once
@pytest.mark.parametrize(("size", "far", "refused"), [(1.0, 0.1, True), (1e6, 500.0, False), (1e6, 1e4, True)])
def test_losses_of_any_size_are_compared_to_three_digits(size, far, refused):
    """A loss of two examples that depends on the outputs, where that of one doesn't."""

    def measure(batch, prediction):
        return size + far * (len(batch[1]) > 1) * ops.tanh(50.0 * ops.mean(prediction))

    groups = [(numbers(1, 3), np.zeros(1), None) for _ in range(2)]
    context = pytest.raises(ValueError, match="compares the examples of a batch") if refused else nullcontext()
    with context:
        check_examples_alone(lambda x: 0.1 * ops.tanh(x), measure, groups)


def test_one_flat_example_is_not_taken_for_a_loss_within_the_batch(backend, labelled):
    x, y = labelled
    model = compiled(lambda y, z: ops.mean(ops.relu(z + 100.0 * (2.0 * ops.cast(y, z.dtype)[:, None] - 1.0))), 1)
    for labels in (y, 1 - y):
        check(backend, model, (x, labels))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_a_saturated_net_is_not_taken_for_one_within_the_batch(backend, labelled, reduction):
    x, y = labelled
    model = compiled(keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction), 2)
    # Sure of all but one, which is drawn late.
    x = np.where(y[:, None] > 0, x, -x)
    x[np.random.default_rng(SEED).permutation(N)[25]] = 0.0
    model.set_weights([np.full((5, 4), 1e3), np.zeros(4), np.tile([1e3, -1e3], (4, 1)), np.zeros(2)])
    check(backend, model, (x, model.predict(x, verbose=0).argmax(1)))
