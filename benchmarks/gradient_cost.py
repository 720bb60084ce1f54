"""Time of gradient samples over one batched forward and backward pass over the same examples.

The samples go into the same memory in each round. What memory costs that the system hands out for the first time is
told apart: it depends on the machine, and more on a virtual one.
"""

import argparse
import time
from typing import Any

import keras
import numpy as np
from batched import batched_pass
from common import interleaved, load, median_spread, parser, record

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner

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


class SameMemory(MemoryStore):
    """Takes other samples in place of those that are there."""

    def rewind(self) -> None:
        """Forgets all samples."""
        self._filled = 0


def _measured(model: keras.Model, train: tuple, b: int, args: argparse.Namespace) -> dict[str, Any]:
    rows = args.examples // b
    options = PruningOptions(num_grads=rows, grad_batch_size=b, verbose=0)
    pruner = Pruner(model, options)
    source = SampledGradients(model, pruner.targets, options, pruner.backend, open_examples(train))
    source.check(rows)
    kept = [~pruned for pruned in pruner.pruned]

    store = SameMemory((rows, sum(t.size for t in pruner.targets)), rows)

    def sample() -> np.ndarray:
        # Always the first draw: the same examples in each round.
        store.rewind()
        source.fill(store, kept, rows, 0, lambda number: None)
        return store.block(slice(0, store.shape[1]))

    def fresh_memory() -> None:
        np.empty((rows, store.shape[1]), np.float32).fill(1.0)

    def same_memory() -> None:
        store.block(slice(0, store.shape[1])).fill(1.0)

    chosen = np.random.default_rng(options.seed).permutation(len(train[0]))[: rows * b]
    x, y = train[0][chosen], train[1][chosen]
    variables = [target.variable for target in pruner.targets]
    passes = {size: batched_pass(model, variables, x, y, size) for size in BATCH_SIZES if size <= len(x)}
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
    work |= {"fresh": fresh_memory, "same": same_memory}
    seconds = interleaved(work, args.rounds, warm_up=1)
    base = np.array(seconds["pass"])
    return {
        "ratio": median_spread(list(np.array(seconds["sample"]) / base)),
        "pass_over_pass": median_spread(list(np.array(seconds["pass_again"]) / base)),
        "sample_seconds": median_spread(seconds["sample"]),
        "pass_seconds": median_spread(seconds["pass"]),
        "fresh_memory_seconds": median_spread(list(np.array(seconds["fresh"]) - seconds["same"])),
        "batch_size_of_pass": int(best),
        "first_call_minus_later_seconds": first - float(np.median(seconds["sample"])),
    }


if __name__ == "__main__":
    main()
