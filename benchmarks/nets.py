"""Small nets that benchmarks train in minutes: on scikit-learn's digits, or on the images that are given.

As a command it trains one and writes it, for `--model` of the other benchmarks.
"""

import argparse

import keras
import numpy as np

EPOCHS = {"cnn": 15, "transformer": 40, "mobilenet": 14, "lstm": 60, "gru": 60}
"""What there is, and how long it is trained."""


def digits() -> tuple[tuple, tuple]:
    """Training and validation arrays of scikit-learn's digits, (N, 8, 8, 1) from 0 to 1."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16.0).astype("float32").reshape(-1, 8, 8, 1), y.astype("int32")
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def trained(
    kind: str, train: tuple | None = None, batchnorm: bool = False, verbose: int = 0, seed: int = 0
) -> keras.Model:
    """A trained net whose output is logits.

    Args:
        kind: One of `EPOCHS`.
        train: Images (N, H, W, C), from 0 to 255, and labels; without, digits. Images are cropped and flipped.
        batchnorm: Whether the convolutional net has BatchNorm.
        verbose: As in `fit`.
        seed: Of weights and of the order of examples.
    """
    keras.utils.set_random_seed(seed)
    x, y = train or digits()[0]
    make = {"cnn": _cnn, "transformer": transformer, "mobilenet": mobilenet, "lstm": _recurrent, "gru": _recurrent}
    options = {"cnn": {"batchnorm": batchnorm}, "gru": {"layer": keras.layers.GRU}}.get(kind, {})
    model = make[kind](x.shape[1:], int(y.max()) + 1, **options)
    rate = 2e-3
    if kind in ("mobilenet", "lstm", "gru"):
        rate = keras.optimizers.schedules.CosineDecay(4e-3, EPOCHS[kind] * -(-len(x) // 64))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    if train is None:
        model.fit(x, y, epochs=EPOCHS[kind], batch_size=64, verbose=verbose)
        return model
    for epoch in range(EPOCHS[kind]):
        model.fit(augmented(x, epoch), y, initial_epoch=epoch, epochs=epoch + 1, batch_size=64, verbose=verbose)
    return model


def augmented(x: np.ndarray, seed: int, pad: int = 4) -> np.ndarray:
    """Black padding, random crop and random flip, one draw an image."""
    rng = np.random.default_rng(seed)
    count, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, (2, count))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    columns = np.where(rng.random(count)[:, None] < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _cnn(shape: tuple, classes: int, batchnorm: bool) -> keras.Model:
    layers = keras.layers
    norms = [layers.BatchNormalization()] if batchnorm else []
    return keras.Sequential(
        [
            layers.Input(shape),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            *norms,
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes),
        ]
    )


def transformer(shape: tuple, classes: int, width: int = 64, blocks: int = 3) -> keras.Model:
    """Patches of 2 x 2 pixels, each a token; 4 heads, and a hidden layer of 4 times the width."""
    layers = keras.layers
    inputs = layers.Input(shape)
    tokens = (shape[0] // 2) * (shape[1] // 2)
    x = layers.Reshape((tokens, width))(layers.Conv2D(width, 2, strides=2)(inputs))
    places = keras.ops.cumsum(keras.ops.ones_like(x[..., 0], dtype="int32"), axis=1) - 1
    x = x + layers.Embedding(tokens, width)(places)
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4)(normal, normal)
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(hidden)
    pooled = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(classes)(pooled))


def mobilenet(shape: tuple, classes: int) -> keras.Model:
    """Inverted residuals with clipped activations, as in MobileNetV2 (arXiv 1801.04381) and EfficientNet-Lite."""
    layers = keras.layers

    def normed(x: object, clipped: bool = True) -> object:
        x = layers.BatchNormalization()(x)
        return layers.ReLU(6.0)(x) if clipped else x

    inputs = layers.Input(shape)
    x = layers.Rescaling(1 / 127.5, -1.0)(inputs)
    x = normed(layers.Conv2D(24, 3, strides=2, padding="same", use_bias=False)(x))
    for filters, strides, times in ((16, 1, 1), (24, 2, 2), (40, 2, 3), (80, 1, 2), (112, 2, 2)):
        for block in range(times):
            before, width = x, x.shape[-1]
            x = normed(layers.Conv2D(4 * width, 1, use_bias=False)(x))
            step = strides if block == 0 else 1
            x = normed(layers.DepthwiseConv2D(3, strides=step, padding="same", use_bias=False)(x))
            x = normed(layers.Conv2D(filters, 1, use_bias=False)(x), clipped=False)
            if before.shape == x.shape:
                x = layers.Add()([before, x])
    x = normed(layers.Conv2D(448, 1, use_bias=False)(x))
    return keras.Model(inputs, layers.Dense(classes)(layers.GlobalAveragePooling2D()(x)))


def _recurrent(shape: tuple, classes: int, layer: type[keras.Layer] | None = None) -> keras.Model:
    """Two layers of 64 units that read an image row by row."""
    layers = keras.layers
    layer = layer or layers.LSTM
    return keras.Sequential(
        [
            layers.Input(shape),
            layers.Reshape((shape[0], shape[1] * shape[2])),
            layer(64, return_sequences=True),
            layer(64),
            layers.Dense(classes),
        ]
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--builtin", choices=tuple(EPOCHS), required=True)
    args.add_argument("--train", help="an .npz with x and y; without, scikit-learn's digits")
    args.add_argument("--out", required=True, help="the .keras file to write")
    args = args.parse_args()
    train = None
    if args.train:
        with np.load(args.train, allow_pickle=False) as file:
            train = file["x"].astype("float32"), file["y"].astype("int32")
    trained(args.builtin, train, verbose=2).save(args.out)


if __name__ == "__main__":
    main()
