"""Prunes a small CNN on handwritten digits in several ways, and prints their accuracy side by side.

Run it with KERAS_BACKEND=torch, tensorflow or jax. Everything it needs is made or shipped with scikit-learn.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_woodfisher as kw

SPARSITIES = (0.8, 0.9, 0.95)
FINE_TUNING_EPOCHS = 4


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1,200 training images and 597 test images, 8 x 8."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16.0).astype("float32").reshape(-1, 8, 8, 1), y.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def build() -> keras.Model:
    """A CNN with 38,160 prunable weights."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def compile_model(model: keras.Model) -> None:
    """A fresh optimizer, so that each way of pruning starts alike."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])


def fine_tune(model: keras.Model, train: tuple, sparsity: float, method: str) -> None:
    """Prunes step by step while training goes on."""
    keras.utils.set_random_seed(1)
    compile_model(model)
    pruner = kw.WoodFisherPruning(
        sparsity,
        init_sparsity=0.5,
        end_epoch=FINE_TUNING_EPOCHS / 2,
        update_frequency=0.5,
        method=method,
        data=train,
        num_grads=256,
        verbose=0,
    )
    model.fit(*train, batch_size=64, epochs=FINE_TUNING_EPOCHS, callbacks=[pruner], verbose=0)


def main() -> None:
    """Trains, prunes and compares."""
    keras.utils.set_random_seed(0)
    train, test = digits()
    model = build()
    compile_model(model)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}: training a CNN on digits ...")
    model.fit(*train, batch_size=64, epochs=15, verbose=0)
    dense = model.get_weights()

    def accuracy() -> float:
        return 100.0 * model.evaluate(*test, batch_size=200, verbose=0, return_dict=True)["accuracy"]

    print(f"dense accuracy: {accuracy():.1f} %\n")
    report = None
    rows = []
    for sparsity in SPARSITIES:
        row = []
        # Reconstruction needs no labels.
        for method, data, quality in (
            ("magnitude", None, "balanced"),
            ("woodfisher", train, "balanced"),
            ("reconstruct", train[0], "balanced"),
            ("reconstruct", train[0], "best"),
        ):
            model.set_weights(dense)
            report = kw.prune(model, data, sparsity, method=method, quality=quality, verbose=0)
            row.append(accuracy())
        for method in ("magnitude", "woodfisher"):
            model.set_weights(dense)
            fine_tune(model, train, sparsity, method)
            row.append(accuracy())
        rows.append((sparsity, *row))
        if sparsity == SPARSITIES[-1]:
            print(f"Reconstruction in one shot at {sparsity:.0%}:\n{report}\n")
    print("test accuracy in %    one shot                                       fine-tuned with the callback")
    print("sparsity              magnitude  WoodFisher  reconstruct    best      magnitude  WoodFisher")
    for sparsity, *row in rows:
        cells = [f"{value:{width}.1f}" for value, width in zip(row, (11, 12, 13, 8, 15, 12), strict=True)]
        print(f"{sparsity:<20.0%}" + "".join(cells))


if __name__ == "__main__":
    main()
