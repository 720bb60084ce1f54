"""`keras-woodfisher demo`: one-shot pruning of a small CNN on digits: magnitude, WoodFisher, reconstruction.

`examples/quickstart.py` goes on from here: the same data, and the callback while training.
"""

import time
from argparse import Namespace
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.cli.answer import Answer, table
from keras_woodfisher.cli.prune import verbosity

_SPARSITIES = (0.8, 0.9, 0.95)
_EPOCHS = 15
_METHODS: dict[str, dict[str, Any]] = {"magnitude": {}, "woodfisher": {"num_grads": 512}, "reconstruct": {}}
_TRAIN = 1200


def run(args: Namespace) -> Answer:
    """Trains, prunes and compares."""
    start = time.perf_counter()
    train, test = _digits()
    keras.utils.set_random_seed(0)
    model = _cnn()
    model.fit(*train, batch_size=64, epochs=_EPOCHS, verbose=2 if verbosity(args) else 0)
    trained = model.get_weights()

    def accuracy() -> float:
        return float(model.evaluate(*test, batch_size=200, verbose=0, return_dict=True)["accuracy"])

    dense = accuracy()
    rows = []
    for sparsity in _SPARSITIES:
        row = {"sparsity": sparsity}
        for method, options in _METHODS.items():
            model.set_weights(trained)
            kw.prune(model, train, sparsity, method=method, verbose=0, **options)
            row[method] = accuracy()
        rows.append(row)
    seconds = time.perf_counter() - start
    document = {"command": "demo", "backend": keras.backend.backend(), "dense": dense, "rows": rows, "seconds": seconds}
    return Answer(_text(document), document)


def _digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test images, 8 x 8, with their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The demo needs scikit-learn, which isn't installed. Install it with: pip install 'keras-woodfisher[demo]'."
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = (images[order] / 16.0).astype("float32").reshape(-1, 8, 8, 1)
    y = labels[order].astype("int32")
    return (x[:_TRAIN], y[:_TRAIN]), (x[_TRAIN:], y[_TRAIN:])


def _cnn() -> keras.Model:
    """A compiled CNN with 38,160 prunable weights."""
    model = keras.Sequential(
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
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def _text(document: dict[str, Any]) -> str:
    rows = [
        (f"{row['sparsity']:.0%}", *(f"{100 * row[method]:.1f}" for method in _METHODS)) for row in document["rows"]
    ]
    return "\n".join(
        [
            f"A small CNN on handwritten digits, pruned in one shot on {document['backend']}: test accuracy in %, "
            f"{100 * document['dense']:.1f} before pruning.",
            "",
            table(("sparsity", "magnitude", "WoodFisher", "reconstruction"), rows),
            "",
            f"It took {document['seconds']:.0f} s.",
        ]
    )
