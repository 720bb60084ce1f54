"""The dry run of a recipe: how long it takes, and how well it foretells bytes and seconds of gradients and updates."""

import time
from pathlib import Path

import numpy as np
from common import load, median_spread, parser, record

import keras_woodfisher as kw
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--recipe", help="by default the tutorial's, or on digits the one for MNIST")
    args.add_argument("--steps-per-epoch", type=int, default=188)
    args.add_argument("--rounds", type=int, default=3)
    args = args.parse_args()
    model, train, _ = load(args)
    recipe = kw.load_recipe(args.recipe or RECIPES / ("3_tutorial.yaml" if args.model else "1_one_shot_mnist.yaml"))
    without = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        kw.check_recipe(recipe, model, args.steps_per_epoch, verbose=0)
        without.append(time.perf_counter() - start)
    ratios, seconds = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        found = kw.check_recipe(recipe, model, args.steps_per_epoch, data=train, verbose=0)
        seconds.append(time.perf_counter() - start)
        entry = next(entry for entry in found.modifiers if entry.updates)
        samples = sum(update.num_grads for update in entry.updates)
        most = max(update.num_grads for update in entry.updates)
        foretold = entry.cost.gradient_seconds * most / samples
        taken, size = _collect(model, train, most)
        ratios.append(foretold / taken)
    record(
        "recipe_check",
        {
            "check_seconds_without_data": median_spread(without),
            "check_seconds_with_data": median_spread(seconds),
            "gradients": most,
            "bytes_of_all_weights": size,
            "ratio_median_and_quartiles": median_spread(ratios),
        },
    )


def _collect(model: object, data: tuple, rows: int) -> tuple[float, int]:
    """Seconds and bytes of so many gradients, compilation apart."""
    options = PruningOptions(num_grads=rows, verbose=0)
    pruner = Pruner(model, options)
    source = SampledGradients(model, pruner.targets, options, pruner.backend, open_examples(data))
    kept = [np.ones(target.size, bool) for target in pruner.targets]
    size = sum(target.size for target in pruner.targets)
    chunk = pruner.backend.chunk_groups(1)
    source.fill(MemoryStore((chunk, size), chunk), kept, chunk, 0, lambda number: None)
    start = time.perf_counter()
    source.fill(MemoryStore((rows, size), chunk), kept, rows, 1, lambda number: None)
    return time.perf_counter() - start, 4 * rows * size


if __name__ == "__main__":
    main()
