"""Prunes a saved classifier in one shot: one_shot.py model.keras data.npz 0.8 pruned.keras

The .npz holds `x` and `y` (class numbers); the model's output is logits, or whatever its own compiled loss takes.
"""

import argparse

import keras
import numpy as np

import keras_woodfisher as kw


def main() -> None:
    """Loads, prunes, reports and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("sparsity", type=float)
    parser.add_argument("out")
    parser.add_argument("--num-grads", type=int, help="gradient samples of a stage")
    args = parser.parse_args()
    model = keras.models.load_model(args.model)
    with np.load(args.data, allow_pickle=False) as file:
        data = file["x"].astype("float32"), file["y"].astype("int32")
    # A model that was saved without being compiled has no loss of its own.
    loss = None if model.compiled else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    print(kw.prune(model, data, args.sparsity, loss=loss, num_grads=args.num_grads))
    model.save(args.out)


if __name__ == "__main__":
    main()
