"""Largest relative error of diag(F^-1) over the blocks, against a dense float64 inverse of the same gradients."""

import keras
import numpy as np
from common import load, parser, record
from keras_woodfisher_backends import get_backend
from samples import gradients

import keras_woodfisher as kw
from keras_woodfisher.pruning.fisher import block_slices


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--pruned", type=float, default=0.0, help="first prune the model so far, in one shot")
    args.add_argument("--devices", nargs="+", default=["cpu", "cpu:0"])
    args = args.parse_args()
    model, train, _ = load(args)
    if args.pruned:
        kw.prune(model, train, args.pruned, quality="fast", num_grads=args.num_grads, verbose=0)
    grads, kept = gradients(model, train, args.num_grads)
    blocks = block_slices(kept, args.fisher_block_size)
    backend = get_backend(keras.backend.backend())
    worst = dict.fromkeys(args.devices, 0.0)
    for block in blocks:
        exact = _dense_inverse_diagonal(grads[:, block], args.damp)
        for device in args.devices:
            found = backend.kernel(device).inverse_diagonal(grads[:, block], args.damp)
            worst[device] = max(worst[device], float(np.abs(found / exact - 1.0).max()))
    settings = {key: getattr(args, key) for key in ("num_grads", "fisher_block_size", "damp", "pruned")}
    record("kernel_accuracy", {**settings, "blocks": len(blocks), "largest_relative_error": worst})


def _dense_inverse_diagonal(grads: np.ndarray, damp: float) -> np.ndarray:
    double = grads.astype(np.float64)
    fisher = double.T @ double / len(double)
    fisher.flat[:: fisher.shape[0] + 1] += damp
    return np.diag(np.linalg.inv(fisher))


if __name__ == "__main__":
    main()
