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
from nets import EPOCHS, digits, trained
from threadpoolctl import threadpool_info

from keras_woodfisher.memory.store import MemoryStore

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark. Without a model, a small one is trained, without data on scikit-learn's digits."""
    args = argparse.ArgumentParser(description=description)
    args.add_argument("--model", help="a .keras classifier whose output is logits")
    args.add_argument("--train", help="an .npz with x and y: gradients and fine-tuning")
    args.add_argument("--val", help="an .npz with x and y: accuracy is reported on it, and nothing is chosen by it")
    args.add_argument("--builtin", choices=tuple(EPOCHS), default="cnn", help="what to train without --model")
    args.add_argument("--num-grads", type=int, default=512)
    args.add_argument("--fisher-block-size", type=int, default=2000)
    args.add_argument("--damp", type=float, default=1e-5)
    args.add_argument("--seeds", type=int, default=3)
    return args


def load(args: argparse.Namespace, batchnorm: bool = False) -> tuple[keras.Model, tuple, tuple]:
    """The compiled model (a built-in one with BatchNorm if wanted), the training arrays and the validation arrays."""
    if args.model is None:
        given = (_arrays(args.train), _arrays(args.val)) if args.train else None
        model = trained(args.builtin, given and given[0], batchnorm)
        compile_model(model)
        return (model, *(given or digits()))
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
