"""Accuracy after one-shot pruning of groups, 2:4 by default: magnitude beside woodfisher, over seeds of the samples."""

import numpy as np
from common import accuracy, load, parser, record

import keras_woodfisher as kw


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--masks", nargs="+", default=["2:4"], help="N:M, block4, filter or channel")
    args.add_argument("--sparsity", type=float, default=0.5)
    args.add_argument("--exclude", nargs="+", default=[], help="variables to leave out, such as the last layer's")
    args = args.parse_args()
    model, train, val = load(args)
    dense, table, zeros = model.get_weights(), {}, {}
    for mask in args.masks:
        for method in ("magnitude", "woodfisher"):
            row = table.setdefault(mask, {}).setdefault(method, [])
            for seed in range(args.seeds if method == "woodfisher" else 1):
                model.set_weights(dense)
                report = kw.prune(
                    model,
                    train,
                    args.sparsity,
                    quality="fast",
                    method=method,
                    mask_type=mask,
                    exclude=args.exclude,
                    num_grads=args.num_grads,
                    fisher_block_size=args.fisher_block_size,
                    damp=args.damp,
                    seed=seed,
                    verbose=0,
                )
                zeros.setdefault(mask, {})[method] = round(report.sparsity, 4)
                row.append(round(accuracy(model, val), 2))
                print(mask, method, seed, row[-1], flush=True)
    model.set_weights(dense)
    means = {mask: {method: round(float(np.mean(v)), 2) for method, v in row.items()} for mask, row in table.items()}
    settings = {key: getattr(args, key) for key in ("num_grads", "fisher_block_size", "damp", "seeds", "sparsity")}
    outcome = {"dense": accuracy(model, val), "mean": means, "each": table, "fraction_of_zeros": zeros}
    record("structured", {**settings, **outcome})


if __name__ == "__main__":
    main()
