"""What the benchmarks share: a model, labelled arrays, accuracy, and a record of what was measured."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from threadpoolctl import threadpool_info

from keras_woodfisher.memory.store import MemoryStore

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark. Without a model, a small one is trained on scikit-learn's digits."""
    args = argparse.ArgumentParser(description=description)
    args.add_argument("--model", help="a .keras classifier whose output is logits")
    args.add_argument("--train", help="an .npz with x and y: gradients and fine-tuning")
    args.add_argument("--val", help="an .npz with x and y: accuracy is reported on it, and nothing is chosen by it")
    args.add_argument("--builtin", choices=("cnn", "transformer"), default="cnn", help="what to train without --model")
    args.add_argument("--num-grads", type=int, default=512)
    args.add_argument("--fisher-block-size", type=int, default=2000)
    args.add_argument("--damp", type=float, default=1e-5)
    args.add_argument("--seeds", type=int, default=3)
    return args


def load(args: argparse.Namespace, batchnorm: bool = False) -> tuple[keras.Model, tuple, tuple]:
    """The compiled model (that on digits with BatchNorm if wanted), the training arrays and the validation arrays."""
    if args.model is None:
        return _digits(args.builtin, batchnorm)
    model = keras.models.load_model(args.model, compile=False)
    compile_model(model)
    return model, _arrays(args.train), _arrays(args.val)


def compile_model(model: keras.Model, optimizer: object = "sgd") -> None:
    """Cross-entropy from logits, with accuracy."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])


def accuracy(model: keras.Model, data: tuple) -> float:
    """Accuracy in per cent."""
    return 100.0 * float(model.evaluate(*data, batch_size=500, verbose=0, return_dict=True)["accuracy"])


def stored(grads: np.ndarray) -> MemoryStore:
    """A store of samples (m, d)."""
    store = MemoryStore(grads.shape, len(grads))
    store.room(len(grads))[...] = grads
    store.keep(np.ones(len(grads), bool))
    return store


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


def median_spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float(low), float(high)


def interleaved(
    work: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each piece of work, run in turn so that a change of the machine's speed hits all alike.

    BLAS threads go on spinning for some 30 ms when their work is done. Where that is long beside what is timed, a pause
    (in seconds) keeps them from taking a core from whatever comes next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + rounds):
        for name, run in work.items():
            time.sleep(pause)
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def gemm_rate(size: int = 2000, rounds: int = 5) -> float:
    """The machine's float64 matrix product rate now, in flop/s (median)."""
    matrix = np.random.default_rng(0).normal(size=(size, size))
    seconds = interleaved({"gemm": lambda: matrix @ matrix}, rounds)["gemm"]
    return 2.0 * size**3 / float(np.median(seconds))


def record(name: str, result: dict) -> None:
    """Prints a result, and writes it to `results/NAME_BACKEND.json`."""
    result = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "blas": [(pool["internal_api"], pool.get("architecture")) for pool in threadpool_info()],
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{result['backend']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _arrays(path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["x"].astype("float32"), file["y"].astype("int32")


def _digits(kind: str, batchnorm: bool) -> tuple[keras.Model, tuple, tuple]:
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16.0).astype("float32").reshape(-1, 8, 8, 1), y.astype("int32")
    model = _cnn(batchnorm) if kind == "cnn" else _transformer()
    compile_model(model, keras.optimizers.Adam(2e-3))
    model.fit(x[:1200], y[:1200], epochs=15 if kind == "cnn" else 40, batch_size=64, verbose=0)
    return model, (x[:1200], y[:1200]), (x[1200:], y[1200:])


def _cnn(batchnorm: bool) -> keras.Model:
    layers = keras.layers
    norms = [layers.BatchNormalization()] if batchnorm else []
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            *norms,
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def _transformer(width: int = 64, blocks: int = 3) -> keras.Model:
    """Sixteen patches of 2 x 2 pixels, each a token; 4 heads, and a hidden layer of 4 times the width."""
    layers = keras.layers
    inputs = layers.Input((8, 8, 1))
    x = layers.Reshape((16, width))(layers.Conv2D(width, 2, strides=2)(inputs))
    places = keras.ops.cumsum(keras.ops.ones_like(x[..., 0], dtype="int32"), axis=1) - 1
    x = x + layers.Embedding(16, width)(places)
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4)(normal, normal)
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(hidden)
    pooled = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(pooled))
