"""Accuracy and loss right after one update: by magnitude, with the papers' ridge of 1e-5, and with damp="auto".

On five nets, whose gradients have scales that are far from each other: a CNN and a transformer on digits, an MLP that
is sure of all its training examples, one on pixels from 0 to 255, and the model that is given. Updates are as the
callback makes them (64 samples) and as `quality="fast"` does (512). Nothing is chosen by what is evaluated.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from common import compile_model, load, parser, record
from nets import digits, trained

import keras_woodfisher as kw

_SAMPLES = 64, 512
_PAPERS = 1e-5


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    args.add_argument("--given-only", action="store_true", help="leave out the nets that are trained here")
    args = args.parse_args()
    rows = []
    for name, seed, model, train, val in _nets(args):
        dense = model.get_weights()
        for sparsity in args.sparsities:
            kw.prune(model, sparsity=sparsity, method="magnitude", verbose=0)
            row = {"net": name, "seed": seed, "sparsity": sparsity, "magnitude": _evaluated(model, val)}
            for number in _SAMPLES:
                for damp in (_PAPERS, "auto"):
                    model.set_weights(dense)
                    options = {"quality": "fast", "num_grads": number, "damp": damp, "seed": seed, "verbose": 0}
                    (stage,) = kw.prune(model, train, sparsity, **options).stages
                    found = _evaluated(model, val) | {"damp": stage.damp, "by_magnitude": stage.by_magnitude}
                    row[f"{damp}, {number} samples"] = found
            model.set_weights(dense)
            print(row, flush=True)
            rows.append(row)
    record("damping_given" if args.given_only else "damping", {"rows": rows})


def _nets(args: Any) -> Iterator[tuple[str, int, keras.Model, tuple, tuple]]:
    """Name, seed, model, training and validation arrays."""
    for seed in range(args.seeds):
        if args.model:
            yield "given", seed, *load(args)
        if args.given_only:
            continue
        for kind in ("cnn", "transformer"):
            model = trained(kind, seed=seed)
            compile_model(model)
            yield kind, seed, model, *digits()
        yield "sure", seed, *_mlp(seed, *_clusters())
        (x, y), (x_val, y_val) = digits()
        yield "0 to 255", seed, *_mlp(seed, (255.0 * x, y), (255.0 * x_val, y_val))


def _clusters() -> tuple[tuple, tuple]:
    """Forty clusters in 32 dimensions, in ten classes; 6,000 points to train on and 2,000 others."""
    rng = np.random.default_rng(5)
    centres, cluster = rng.normal(size=(40, 32)), rng.integers(0, 40, 8000)
    x, y = (centres[cluster] + 0.75 * rng.normal(size=(8000, 32))).astype("float32"), (cluster % 10).astype("int32")
    return (x[:6000], y[:6000]), (x[6000:], y[6000:])


def _mlp(seed: int, train: tuple, val: tuple) -> tuple[keras.Model, tuple, tuple]:
    """Trained for 60 epochs, until its loss on training examples is about 1e-5."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    hidden = [layers.Dense(128, activation="relu") for _ in range(2)]
    model = keras.Sequential([layers.Input(train[0].shape[1:]), layers.Flatten(), *hidden, layers.Dense(10)])
    compile_model(model, keras.optimizers.Adam(1e-3))
    model.fit(*train, epochs=60, batch_size=64, verbose=0)
    return model, train, val


def _evaluated(model: keras.Model, data: tuple) -> dict[str, Any]:
    found = model.evaluate(*data, batch_size=500, verbose=0, return_dict=True)
    return {"accuracy": 100.0 * float(found["accuracy"]), "loss": float(found["loss"])}


if __name__ == "__main__":
    main()
