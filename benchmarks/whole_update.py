"""One whole pruning update, gradients included, over what it can't do without.

That is one batched forward and backward pass over the same examples, and the useful arithmetic of the inverse
(`2 m^2 B + 2 m^3 / 3` flops a block) at the float64 GEMM rate; all of it is measured in turn in one process. What the
first update takes longer than the later ones is compilation, and is told apart.
"""

import time

import keras
import numpy as np
from batched import batched_pass
from common import load, median_spread, parser, record
from update_cost import useful

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.fisher import block_slices
from keras_woodfisher.pruning.pruner import Pruner

BATCH_SIZE = 64


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, default=0.8)
    args.add_argument("--rounds", type=int, default=7)
    args = args.parse_args()
    model, train, _ = load(args)
    m = args.num_grads
    dense = model.get_weights()
    options = PruningOptions(num_grads=m, fisher_block_size=args.fisher_block_size, damp=args.damp, verbose=0)
    pruner = Pruner(model, options)
    source = SampledGradients(model, pruner.targets, options, pruner.backend, open_examples(train))
    source.check(m)
    sizes = [target.size for target in pruner.targets]
    flops = sum(useful(m, b.stop - b.start) for b in block_slices(sizes, args.fisher_block_size))
    chosen = np.random.default_rng(options.seed).permutation(len(train[0]))[:m]
    run_pass = batched_pass(model, [t.variable for t in pruner.targets], train[0][chosen], train[1][chosen], BATCH_SIZE)
    matrix = np.random.default_rng(0).normal(size=(2000, 2000))

    def update() -> tuple:
        model.set_weights(dense)
        again = Pruner(model, options)
        return again.update([args.sparsity] * len(sizes), source, m).phases

    times: dict[str, list[float]] = {"pass": [], "gemm": [], "update": []}
    phases: dict[str, list[float]] = {}
    for turn in range(args.rounds + 1):
        for name, run in (("gemm", lambda: matrix @ matrix), ("pass", run_pass), ("update", update)):
            start = time.perf_counter()
            outcome = run()
            times[name].append(time.perf_counter() - start)
        if turn:
            for phase in outcome:
                phases.setdefault(phase.name, []).append(phase.seconds)
    first = times["update"][0]
    gemm, passed, updates = (np.array(times[name][1:]) for name in ("gemm", "pass", "update"))
    arithmetic = flops / (2.0 * 2000**3 / gemm)
    settings = {key: getattr(args, key) for key in ("num_grads", "fisher_block_size", "damp", "sparsity", "rounds")}
    record(
        "whole_update",
        {
            **settings,
            "weights": sum(sizes),
            "ratio_median_and_quartiles": median_spread(list(updates / (passed + arithmetic))),
            "update_seconds": median_spread(list(updates)),
            "pass_seconds": median_spread(list(passed)),
            "useful_arithmetic_seconds": median_spread(list(arithmetic)),
            "phase_seconds": {name: float(np.median(seconds)) for name, seconds in phases.items()},
            "first_update_minus_later_seconds": first - float(np.median(updates)),
        },
    )


if __name__ == "__main__":
    assert keras.backend.backend()
    main()
