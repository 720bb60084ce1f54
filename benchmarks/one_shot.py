"""Accuracy after one-shot pruning: magnitude, independent and joint update, over seeds of the gradient samples."""

import keras
import numpy as np
from common import accuracy, load, parser, record
from nets import augmented
from samples import GivenGradients, gradients

from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    args.add_argument("--methods", nargs="+", default=["magnitude", "independent", "joint"])
    args.add_argument("--augment", action="store_true", help="gradients of cropped and flipped images")
    args.add_argument("--masks", help="write the masks of the first seed to this .npz, for compare_masks.py")
    args.add_argument("--name", default="one_shot")
    args = args.parse_args()
    model, train, val = load(args)
    dense = model.get_weights()
    table: dict[str, dict[str, list[float]]] = {}
    masks = {}
    for seed in range(args.seeds):
        data = (augmented(train[0], seed), train[1]) if args.augment else train
        # One draw serves every method and sparsity, as the same call of `prune` would take it anew.
        model.set_weights(dense)
        grads, _ = gradients(model, data, args.num_grads, seed)
        for method in args.methods:
            if method == "magnitude" and seed:
                continue
            for sparsity in args.sparsity:
                model.set_weights(dense)
                _prune(model, method, sparsity, grads, args)
                row = table.setdefault(method, {}).setdefault(str(sparsity), [])
                row.append(round(accuracy(model, val), 2))
                print(method, seed, sparsity, row[-1], flush=True)
                if seed == 0:
                    masks[f"{method}_{sparsity}"] = _zeros(model)
    model.set_weights(dense)
    if args.masks:
        np.savez_compressed(args.masks, **masks)
    means = {m: {s: round(float(np.mean(v)), 2) for s, v in row.items()} for m, row in table.items()}
    settings = {key: getattr(args, key) for key in ("num_grads", "fisher_block_size", "damp", "seeds", "augment")}
    record(args.name, {**settings, "dense": accuracy(model, val), "mean": means, "each": table})


def _prune(model: keras.Model, method: str, sparsity: float, grads: np.ndarray, args: object) -> None:
    """What `kw.prune` does after it took its gradients."""
    options = PruningOptions(
        method="magnitude" if method == "magnitude" else "woodfisher",
        update="joint" if method == "magnitude" else method,
        num_grads=args.num_grads,
        fisher_block_size=args.fisher_block_size,
        damp=args.damp,
        verbose=0,
    )
    pruner = Pruner(model, options)
    source = None if method == "magnitude" else GivenGradients(grads)
    pruner.update([sparsity] * len(pruner.targets), source, args.num_grads)


def _zeros(model: keras.Model) -> np.ndarray:
    return np.concatenate([target.read() == 0 for target in find_targets(model, "__ALL_PRUNABLE__")])


if __name__ == "__main__":
    main()
