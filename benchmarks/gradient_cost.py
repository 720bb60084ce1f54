"""Time of gradient samples over one batched forward and backward pass over the same examples."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from common import interleaved, load, median_spread, parser, record
from keras import ops

from keras_woodfisher.options import PruningOptions
from keras_woodfisher.pruner import Pruner
from keras_woodfisher.sources import SampledGradients
from keras_woodfisher.stores.store import MemoryStore

BATCH_SIZES = (32, 64, 128)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--examples", type=int, default=512)
    args.add_argument("--rounds", type=int, default=9)
    args.add_argument("--averaged", type=int, nargs="+", default=[1, 16], help="examples averaged into one sample, b")
    args = args.parse_args()
    model, train, _ = load(args)
    result: dict[str, Any] = {"examples": args.examples, "rounds": args.rounds}
    for b in args.averaged:
        result[f"b={b}"] = _measured(model, train, b, args)
    ratios = {f"b={b}": result[f"b={b}"]["ratio"] for b in args.averaged}
    record("gradient_cost", {**result, "sampling_over_batched_pass": ratios})


def _measured(model: keras.Model, train: tuple, b: int, args: argparse.Namespace) -> dict[str, Any]:
    rows = args.examples // b
    options = PruningOptions(num_grads=rows, grad_batch_size=b, verbose=0)
    pruner = Pruner(model, options)
    source = SampledGradients(model, pruner.targets, options, pruner.backend, train)
    source.check(rows)
    kept = [~pruned for pruned in pruner.pruned]

    def sample() -> np.ndarray:
        # Always the first draw: the same examples in each round.
        store = MemoryStore((rows, sum(t.size for t in pruner.targets)), rows)
        source.fill(store, kept, rows, 0, lambda number: None)
        return store.block(slice(0, store.shape[1]))

    chosen = np.random.default_rng(options.seed).permutation(len(train[0]))[: rows * b]
    x, y = train[0][chosen], train[1][chosen]
    variables = [target.variable for target in pruner.targets]
    passes = {size: _pass_over(model, variables, x, y, size) for size in BATCH_SIZES if size <= len(x)}
    start = time.perf_counter()
    grads = sample()
    first = time.perf_counter() - start
    # Both take the same gradients: their means agree.
    mean, total = grads.mean(0), next(iter(passes.values()))()
    flat = np.concatenate([t.flatten(g) for t, g in zip(pruner.targets, total, strict=True)]) / len(x)
    assert np.linalg.norm(mean - flat) < 1e-4 * np.linalg.norm(flat)
    tried = interleaved({str(size): run for size, run in passes.items()}, 2, warm_up=1)
    best = min(tried, key=lambda size: min(tried[size]))
    work = {"pass": passes[int(best)], "sample": sample, "pass_again": passes[int(best)]}
    seconds = interleaved(work, args.rounds, warm_up=1)
    base = np.array(seconds["pass"])
    return {
        "ratio": median_spread(list(np.array(seconds["sample"]) / base)),
        "pass_over_pass": median_spread(list(np.array(seconds["pass_again"]) / base)),
        "sample_seconds": median_spread(seconds["sample"]),
        "pass_seconds": median_spread(seconds["pass"]),
        "batch_size_of_pass": int(best),
        "first_call_minus_later_seconds": first - float(np.median(seconds["sample"])),
    }


def _pass_over(
    model: keras.Model, variables: list, x: np.ndarray, y: np.ndarray, size: int
) -> Callable[[], list[np.ndarray]]:
    """Sums the gradients of batches, with each framework's own tools; the last batch may be cut short."""
    make = {"torch": _torch_pass, "tensorflow": _tensorflow_pass, "jax": _jax_pass}[keras.backend.backend()]
    step = make(model, variables)
    count = len(x) // size * size
    assert count == len(x), f"--examples must be a multiple of {size}"

    def run() -> list[np.ndarray]:
        parts = [step(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]
        return [sum(ops.convert_to_numpy(grad) for grad in grads) for grads in zip(*parts, strict=True)]

    return run


def _summed_loss(output: Any, y: Any) -> Any:
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, output, from_logits=True))


def _torch_pass(model: keras.Model, variables: list) -> Callable[..., Any]:
    import torch

    values = [v.value for v in variables]

    def step(x: np.ndarray, y: np.ndarray) -> Any:
        loss = _summed_loss(model(torch.from_numpy(x), training=False), torch.from_numpy(y))
        return torch.autograd.grad(loss, values)

    return step


def _tensorflow_pass(model: keras.Model, variables: list) -> Callable[..., Any]:
    import tensorflow as tf

    values = [v.value for v in variables]

    @tf.function(reduce_retracing=True)
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = _summed_loss(model(x, training=False), y)
        return tape.gradient(loss, values)

    return lambda x, y: step(tf.constant(x), tf.constant(y))


def _jax_pass(model: keras.Model, variables: list) -> Callable[..., Any]:
    import jax

    places = [next(i for i, v in enumerate(model.trainable_variables) if v is wanted) for wanted in variables]

    @jax.jit
    def step(chosen: Any, trainable: Any, fixed: Any, x: Any, y: Any) -> Any:
        def of_chosen(chosen: Any) -> Any:
            values = list(trainable)
            for place, value in zip(places, chosen, strict=True):
                values[place] = value
            output, _ = model.stateless_call(values, fixed, x, training=False)
            return _summed_loss(output, y)

        return jax.grad(of_chosen)(chosen)

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    chosen = [trainable[place] for place in places]
    return lambda x, y: step(chosen, trainable, fixed, x, y)


if __name__ == "__main__":
    main()
