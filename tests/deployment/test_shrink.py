import keras
import numpy as np
import pytest
from graphs import assert_same, composed, outputs
from keras import layers

import keras_woodfisher as kw

IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype("float32")


def filled(model, seed=0):
    """A model with random weights everywhere, none of them zero."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        values = rng.normal(0, 0.5, variable.shape)
        variable.assign(np.abs(values) + 0.5 if variable.name == "moving_variance" else values)
    return model


def zero(model, layer, *filters, axis=-1):
    kernel = model.get_layer(layer).kernel
    values = np.array(keras.ops.convert_to_numpy(kernel))
    np.moveaxis(values, axis, 0)[list(filters)] = 0
    kernel.assign(values)


def chain(activation="relu", padding="valid", **first):
    """Two convolutions with BatchNorm between them, and a dense layer."""
    return filled(
        keras.Sequential(
            [
                layers.Input((8, 8, 3)),
                layers.Conv2D(6, 3, name="first", **first),
                layers.BatchNormalization(name="norm"),
                layers.Activation(activation),
                layers.Conv2D(4, 3, padding=padding, use_bias=False, name="second"),
                layers.Flatten(),
                layers.Dense(2, name="out"),
            ]
        )
    )


def channels(model):
    return {layer.name: layer.kernel.shape[-1] for layer in model.layers if hasattr(layer, "kernel")}


@pytest.mark.parametrize("seed", range(6))
def test_outputs_stay_the_same(seed):
    model = composed(seed)
    before = model.get_weights()
    small = kw.shrink(model)
    assert_same(model, small, IMAGES)
    report = kw.shrink_report(model)
    assert small.count_params() == report.parameters_left < report.parameters == model.count_params()
    assert all(np.array_equal(one, other) for one, other in zip(model.get_weights(), before, strict=True))
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]


def test_a_constant_goes_into_the_bias():
    model = chain("sigmoid")
    zero(model, "first", 1, 4)
    small = kw.shrink(model)
    assert channels(small) == {"first": 4, "second": 4, "out": 2}
    assert small.get_layer("second").use_bias and small.get_layer("norm").gamma.shape == (4,)
    assert_same(model, small, IMAGES)
    assert any("get a bias" in note and "second" in note for note in kw.shrink_report(model).notes)


def test_next_to_padding_one_constant_stays_for_all():
    model = chain("sigmoid", "same")
    zero(model, "first", 0, 1, 4)
    small = kw.shrink(model)
    assert channels(small)["first"] == 4
    assert_same(model, small, IMAGES)
    (stays,) = kw.shrink_report(model).staying
    assert (stays.layer, stays.kind, stays.channels) == ("first", "constant", 1)
    assert "second pads with zeros" in stays.why


def test_next_to_padding_zeros_go():
    model = chain("relu", "same")
    zero(model, "first", 0, 1)
    model.get_layer("norm").beta.assign([-9.0] * 2 + [1.0] * 4)
    small = kw.shrink(model)
    assert channels(small)["first"] == 4
    assert_same(model, small, IMAGES)


def test_what_no_layer_reads_goes():
    model = chain()
    zero(model, "second", 2, 3, axis=-2)
    small = kw.shrink(model)
    assert channels(small)["first"] == 4
    assert_same(model, small, IMAGES)


@pytest.mark.parametrize("both", [False, True])
def test_a_sum_keeps_what_is_constant_in_one_part_only(both):
    inputs = layers.Input((8, 8, 3))
    parts = [layers.Conv2D(5, 3, padding="same", name=name)(inputs) for name in ("one", "other")]
    model = filled(keras.Model(inputs, layers.Conv2D(2, 3, name="end")(layers.Add(name="sum")(parts))))
    zero(model, "one", 1, 3)
    if both:
        zero(model, "other", 3)
    small = kw.shrink(model)
    assert channels(small)["one"] == channels(small)["other"] == (4 if both else 5)
    assert_same(model, small, IMAGES)
    first = kw.shrink_report(model).staying[0]
    assert first.channels == (1 if both else 2) and "sum combines them" in first.why


def test_a_layer_keeps_one_channel():
    model = chain()
    zero(model, "first", *range(6))
    model.get_layer("second").kernel.assign(np.zeros((3, 3, 6, 4)))
    small = kw.shrink(model)
    assert channels(small) == {"first": 1, "second": 1, "out": 2}
    np.testing.assert_allclose(outputs(small, IMAGES), outputs(model, IMAGES), atol=1e-5)


def test_grouped_convolutions_lose_whole_groups():
    inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, name="first")(inputs)
    x = layers.Conv2D(6, 3, groups=3, name="grouped")(x)
    model = filled(keras.Model(inputs, layers.Conv2D(2, 1, name="end")(x)))
    zero(model, "grouped", 0, 1, 2)
    small = kw.shrink(model)
    assert channels(small) == {"first": 4, "grouped": 4, "end": 2} and small.get_layer("grouped").groups == 2
    assert_same(model, small, IMAGES)


def test_inner_models_and_shared_layers_become_smaller():
    shared = layers.Dense(4, activation="relu", name="shared")
    inner = keras.Sequential([layers.Input((6,)), layers.Dense(5, name="inside"), shared], name="inner")
    one, other = layers.Input((3,)), layers.Input((3,))
    wide = layers.Dense(6, name="wide")
    parts = [inner(wide(one)), inner(wide(other))]
    model = filled(keras.Model([one, other], layers.Dense(2, name="end")(layers.Concatenate()(parts))))
    for name, layer in (("wide", wide), ("inside", inner.get_layer("inside")), ("shared", shared)):
        values = np.array(keras.ops.convert_to_numpy(layer.kernel))
        values[:, :2] = 0
        layer.kernel.assign(values)
        assert name == layer.name
    small = kw.shrink(model)
    found = small.get_layer("inner")
    assert [layer.units for layer in found.layers] == [3, 2] and found.input_shape == (None, 4)
    assert_same(model, small, [IMAGES[:, 0, 0], IMAGES[:, 1, 1]])


def test_a_layer_without_a_rule_keeps_its_channels():
    inputs = layers.Input((8, 8, 3))
    x = layers.LayerNormalization(name="norm")(layers.Conv2D(6, 3, name="first")(inputs))
    model = filled(keras.Model(inputs, layers.Dense(2, name="end")(x)))
    zero(model, "first", 1, 4)
    assert channels(kw.shrink(model))["first"] == 6
    report = kw.shrink_report(model)
    assert report.layers == () and "nothing can be removed" in str(report)
    assert report.staying[0].channels == 2 and "norm (LayerNormalization) needs all" in report.staying[0].why
    assert report.as_dict()["staying"][0]["layer"] == "first"


def test_fit_goes_on():
    model = chain()
    zero(model, "first", 1)
    model.get_layer("norm").trainable = False
    model.compile(keras.optimizers.SGD(0.125), "mse")
    small = kw.shrink(model)
    assert float(small.optimizer.learning_rate) == 0.125 and not small.get_layer("norm").trainable
    small.fit(IMAGES, np.zeros((4, 2)), verbose=0)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float16"])
def test_other_precisions(dtype):
    inputs = layers.Input((8,), dtype="float32")
    x = layers.Dense(6, activation="gelu", dtype=dtype, name="first")(inputs)
    model = filled(keras.Model(inputs, layers.Dense(2, dtype=dtype, name="end")(x)))
    zero(model, "first", 1, 2)
    small = kw.shrink(model)
    assert channels(small)["first"] == 4 and small.get_layer("first").compute_dtype == dtype.replace("mixed_", "")
    assert_same(model, small, IMAGES[0, :, :, 0], 0.02)


def test_what_cannot_be_shrunk_is_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"Python code of its own.*model.backbone = kw.shrink"):
        kw.shrink(Own())
    with pytest.raises(ValueError, match="isn't built yet"):
        kw.shrink_report(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(TypeError, match="takes a Keras model, got 3"):
        kw.shrink(3)


def test_the_command(tmp_path, capsys):
    from keras_woodfisher.cli import main

    model = chain()
    zero(model, "first", 1, 4)
    model.save(tmp_path / "model.keras")
    assert main(["shrink", str(tmp_path / "model.keras"), str(tmp_path / "small.keras")]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert_same(model, keras.models.load_model(tmp_path / "small.keras"), IMAGES)
    assert main(["shrink", str(tmp_path / "model.keras"), str(tmp_path / "small.keras")]) == 1
    assert "exists" in capsys.readouterr().err
