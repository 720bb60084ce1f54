"""Labels that are classes: one that the model has no output for is refused on each backend, by whoever reads labels."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RULE = r"hold the class {}, but there are 3 outputs, for the classes 0 to 2\. Number classes from 0"


def with_one(y, label):
    """The labels, the last one another."""
    return np.append(y[:-1], label).astype(np.asarray(label).dtype)


def batches(x, y):
    return lambda: ((x[i : i + 16], y[i : i + 16]) for i in range(0, len(x), 16))


@pytest.mark.parametrize("label", [3, 0.5])
def test_prune_and_sensitivity_refuse_what_is_no_class(blobs, make_mlp, label):
    x, y = blobs
    wrong, message = with_one(y, label), RULE.format(label)
    for data in ((x, wrong), (x, wrong[:, None])):
        with pytest.raises(ValueError, match=message):
            kw.prune(make_mlp(), data, 0.5, quality="fast", num_grads=4, verbose=0)
    with pytest.raises(ValueError, match=message):
        kw.prune(make_mlp(), batches(x, wrong), 0.5, quality="fast", num_grads=96, verbose=0)
    with pytest.raises(ValueError, match=message):
        kw.sensitivity(make_mlp(), (x, y), eval_data=(x, wrong), levels=(0.5,), num_grads=4, verbose=0)


def test_the_callback_refuses_it_before_the_first_batch(blobs, make_mlp):
    x, y = blobs
    model, seen = make_mlp(), []
    watch = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: seen.append(batch))
    pruner = kw.WoodFisherPruning(0.5, end_epoch=1, data=(x, with_one(y, 5)), num_grads=4, verbose=0)
    with pytest.raises(ValueError, match=RULE.format(5)):
        model.fit(x, y, verbose=0, callbacks=[pruner, watch])
    assert not seen


def test_labels_of_an_output_among_several(rng):
    given = layers.Input((5,))
    model = keras.Model(given, {"a": layers.Dense(3, name="p")(given), "b": layers.Dense(4, name="q")(given)})
    model.compile("sgd", {"a": LOSS, "b": LOSS})
    x, y = rng.normal(size=(8, 5)).astype("float32"), {"a": np.full(8, 2), "b": np.full(8, 3)}
    kw.prune(model, (x, y), 0.5, quality="fast", num_grads=4, verbose=0)
    with pytest.raises(ValueError, match=r"The labels of the output '\w+' hold the class 4, but there are 4 outputs"):
        kw.prune(model, (x, y | {"b": np.full(8, 4)}), 0.5, quality="fast", num_grads=4, verbose=0)


def test_a_label_that_is_left_out_by_the_loss(blobs, make_mlp):
    x, y = blobs
    model = make_mlp(compile=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    kw.prune(model, (x, with_one(y, -1)), 0.5, loss=loss, quality="fast", num_grads=8, verbose=0)
    with pytest.raises(ValueError, match=RULE.format(-2)):
        kw.prune(model, (x, with_one(y, -2)), 0.5, loss=loss, quality="fast", num_grads=8, verbose=0)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "longdouble", "float16", "uint8", "bool"])
def test_every_real_number_is_taken(blobs, make_mlp, dtype):
    x, y = blobs
    found = kw.prune(make_mlp(), (x.astype(dtype), y.astype(">i4")), 0.5, quality="fast", num_grads=4, verbose=0)
    assert found.sparsity == 0.5


@pytest.mark.parametrize("dtype", ["complex64", "M8[s]", "str"])
def test_what_is_no_real_number_is_refused(blobs, make_mlp, dtype):
    x, y = blobs
    with pytest.raises(TypeError, match="isn't a dense array of real numbers"):
        kw.prune(make_mlp(), (x.astype("int32").astype(dtype), y), 0.5, verbose=0)


@pytest.mark.parametrize("loss", [LOSS, keras.losses.sparse_categorical_crossentropy])
def test_labels_of_each_time(rng, loss):
    """Five times, three classes: the last axis is that of the classes, with a plain function too."""
    model = keras.Sequential([layers.Input((5, 4)), layers.Dense(3, "softmax")])
    model.compile("sgd", loss)
    x, y = rng.normal(size=(8, 5, 4)).astype("float32"), rng.integers(0, 3, (8, 5))
    kw.prune(model, (x, y), 0.5, quality="fast", num_grads=4, verbose=0)
    y[2, 4] = 3
    with pytest.raises(ValueError, match=RULE.format(3)):
        kw.prune(model, (x, y), 0.5, quality="fast", num_grads=4, verbose=0)


@pytest.mark.parametrize("loss", [LOSS, "sparse_categorical_crossentropy"])
def test_one_hot_labels_where_numbers_of_classes_are_wanted(blobs, make_mlp, loss):
    x, y = blobs
    model = make_mlp()
    model.compile("sgd", loss)
    one_hot = np.eye(3, dtype="float32")[y]
    message = r"hold 3 numbers an example, as one-hot labels do.*categorical_crossentropy, or give numpy\.argmax"
    with pytest.raises(ValueError, match=message):
        kw.prune(model, (x, one_hot), 0.5, quality="fast", verbose=0)
    with pytest.raises(ValueError, match=message):
        kw.sensitivity(model, (x, one_hot), levels=[0.5], verbose=0)
    pruner = kw.WoodFisherPruning(0.5, end_epoch=1, data=(x, one_hot), num_grads=8, verbose=0)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, callbacks=[pruner], verbose=0)
