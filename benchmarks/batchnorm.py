"""Accuracy after one-shot pruning with and without BatchNorm re-estimation, over seeds of gradients and augmentation.

Gradients are those of cropped and flipped images, and statistics are measured on them: what the net was trained on.
"""

import time

import numpy as np
from common import accuracy, load, parser, record
from nets import augmented
from samples import GivenGradients, gradients

import keras_woodfisher as kw
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    args.add_argument("--methods", nargs="+", default=["independent", "joint"])
    args.add_argument("--num-examples", type=int, default=2048, help="to measure statistics on")
    args = args.parse_args()
    model, (x, y), val = load(args, batchnorm=True)
    dense = model.get_weights()
    before: dict = {}
    after: dict = {}
    seconds, dense_losses = [], []
    for seed in range(args.seeds):
        # The small CNN on digits was trained on plain images.
        images = augmented(x, seed) if args.model else x
        data = images, y
        model.set_weights(dense)
        grads, _ = gradients(model, data, args.num_grads, seed)
        for method in args.methods:
            for sparsity in args.sparsity:
                model.set_weights(dense)
                _prune(model, method, sparsity, grads, args)
                rows = [table.setdefault(method, {}).setdefault(str(sparsity), []) for table in (before, after)]
                rows[0].append(round(accuracy(model, val), 2))
                start = time.perf_counter()
                kw.reestimate_batchnorm(model, data, num_examples=args.num_examples, seed=seed, verbose=0)
                seconds.append(time.perf_counter() - start)
                rows[1].append(round(accuracy(model, val), 2))
                print(method, seed, sparsity, rows[0][-1], rows[1][-1], flush=True)
        model.set_weights(dense)
        report = kw.reestimate_batchnorm(model, data, dense=model, num_examples=args.num_examples, seed=seed, verbose=0)
        dense_losses.append(report.dense_loss)
    model.set_weights(dense)
    settings = {name: getattr(args, name) for name in ("num_grads", "fisher_block_size", "damp", "seeds")}
    record(
        "batchnorm",
        {
            **settings,
            "num_examples": args.num_examples,
            "dense": accuracy(model, val),
            "dense_loss_own_and_measured": dense_losses,
            "seconds_of_one_re_estimation": float(np.median(seconds)),
            "mean_before": _means(before),
            "mean": _means(after),
            "each": after,
        },
    )


def _prune(model: object, method: str, sparsity: float, grads: np.ndarray, args: object) -> None:
    options = PruningOptions(
        update=method,
        num_grads=args.num_grads,
        fisher_block_size=args.fisher_block_size,
        damp=args.damp,
        verbose=0,
    )
    pruner = Pruner(model, options)
    pruner.update([sparsity] * len(pruner.targets), GivenGradients(grads), args.num_grads)


def _means(table: dict) -> dict:
    return {method: {s: round(float(np.mean(v)), 2) for s, v in row.items()} for method, row in table.items()}


if __name__ == "__main__":
    main()
