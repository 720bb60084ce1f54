"""Models with zeros, composed at random, for tests of what may be removed from them."""

import keras
import numpy as np
from keras import layers, ops

ACTIVATIONS = ("relu", "sigmoid", "gelu", "linear", "tanh", "relu6")


def composed(seed, depth=5, first=False):
    """A convolutional model of random blocks: sums, products, concatenations, depthwise and separable layers.

    Args:
        seed: Of everything.
        depth: How many blocks there are.
        first: Whether channels come first (not every backend has that on a CPU).
    """
    rng = np.random.default_rng(seed)
    with data_format("channels_first" if first else "channels_last"):
        axis = 1 if first else -1
        inputs = x = layers.Input((3, 8, 8) if first else (8, 8, 3))
        for _ in range(depth):
            x = _block(rng, x, axis)
        end = rng.integers(3)
        if end == 0:
            x = layers.GlobalAveragePooling2D()(x)
        elif end == 1:
            x = layers.GlobalMaxPooling2D()(layers.ZeroPadding2D(1)(x))
        else:
            x = layers.Flatten()(layers.AveragePooling2D(2, padding="same")(x))
        hidden = layers.Dense(6, activation=rng.choice(ACTIVATIONS))(layers.Dropout(0.2)(x))
        model = keras.Model(inputs, [layers.Dense(3)(hidden), layers.Dense(2, activation="softmax")(x)])
    scatter(model, rng)
    return model


class data_format:
    """Keras's default data format, for a while."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = keras.config.image_data_format()
        keras.config.set_image_data_format(self.name)

    def __exit__(self, *error):
        keras.config.set_image_data_format(self.before)


def _block(rng, x, axis):  # noqa: PLR0911 - one return a kind
    width = x.shape[axis]
    padding, activation = rng.choice(["same", "valid"]), rng.choice(ACTIVATIONS)
    if min(s for place, s in enumerate(x.shape[1:], 1) if place != axis % 4) < 4:
        padding = "same"
    kind = rng.integers(8)
    if kind == 0:  # a residual block
        y = _normed(rng, layers.Conv2D(5, 3, padding="same", use_bias=False)(x), axis, activation)
        y = layers.BatchNormalization(axis=axis)(layers.Conv2D(width, 1)(y))
        return layers.Activation(activation)(layers.Add()([x, y]) if rng.integers(2) else x + y)
    if kind == 1:  # branches side by side
        parts = [layers.Conv2D(4, 1, activation=activation)(x), layers.Conv2D(3, 3, padding="same")(x), x]
        return layers.Concatenate(axis=axis)(parts)
    if kind == 2:  # an inverted residual
        y = _normed(rng, layers.Conv2D(2 * width, 1, use_bias=False)(x), axis, activation)
        y = layers.DepthwiseConv2D(3, padding=padding, depth_multiplier=int(rng.integers(1, 3)))(y)
        return layers.Conv2D(6, 1)(layers.LeakyReLU()(y))
    if kind == 3:
        return layers.SeparableConv2D(6, 3, padding=padding, activation=activation, depth_multiplier=2)(x)
    if kind == 4:  # squeeze and excite
        s = layers.GlobalAveragePooling2D(keepdims=True)(x)
        s = layers.Conv2D(width, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="relu")(s))
        return ops.relu(layers.Multiply()([x, s]))
    if kind == 5:
        y = _normed(rng, layers.Conv2D(6, 3, padding=padding, strides=rng.integers(1, 3).item())(x), axis, activation)
        return layers.UpSampling2D(2)(y) if y.shape[2] < 4 else y
    if kind == 6:  # towards other sizes
        y = layers.Conv2DTranspose(5, 3, strides=2, padding="same", activation=activation)(x)
        return layers.Cropping2D(1)(layers.MaxPooling2D(2, padding="same")(y)) if y.shape[2] > 8 else y
    y = layers.Conv2D(8, 3, padding="same", groups=1)(x)
    return layers.Conv2D(4, 3, padding=padding, groups=2, activation=activation)(y)


def _normed(rng, x, axis, activation):
    x = layers.BatchNormalization(axis=axis)(x)
    return (
        layers.PReLU(shared_axes=[2, 3] if axis == 1 else [1, 2])(x)
        if rng.integers(4) == 0
        else layers.Activation(activation)(x)
    )


def scatter(model, rng, fraction=0.5):
    """Gives every variable random values (variances positive ones), and zeros to half of filters, or of channels."""
    for variable in model.weights:
        values = rng.normal(0, 0.5, variable.shape)
        if variable.name == "moving_variance":
            values = np.abs(values) + 0.5
        if "kernel" in variable.name:
            channels = rng.integers(4) == 0
            axis = -2 if channels or "Transpose" in variable.path else -1
            gone = rng.random(variable.shape[axis]) < fraction
            np.moveaxis(values, axis, 0)[gone] = 0
            depthwise = variable.path.split("/")[-2].startswith(("depthwise", "separable"))
            if depthwise and variable.name != "pointwise_kernel":
                values[..., rng.random(variable.shape[-2]) < fraction, :] = 0
        elif variable.name in ("bias", "beta"):
            values[rng.random(variable.shape[0]) < 0.3] = 0
        variable.assign(values)


def outputs(model, x):
    """All outputs of a model in inference, flat, as float64."""
    found = keras.tree.flatten(model(x, training=False))
    return np.concatenate([np.asarray(ops.convert_to_numpy(part), np.float64).reshape(-1) for part in found])


def assert_same(model, small, x, tolerance=1e-5):
    """The outputs are the same but for so much of their scale."""
    expected = outputs(model, x)
    assert np.isfinite(expected).all() and np.ptp(expected) > 0
    np.testing.assert_allclose(outputs(small, x), expected, atol=tolerance * np.abs(expected).max(), rtol=0)
