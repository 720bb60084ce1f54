"""How far the masks of several backends agree: compare_masks.py torch.npz tensorflow.npz jax.npz."""

import itertools
import sys

import numpy as np


def main(paths: list[str]) -> dict[str, float]:
    """Prints and returns, for each pair of files and each mask, the share of weights that agree."""
    files = {path: np.load(path, allow_pickle=False) for path in paths}
    worst = {}
    for one, other in itertools.combinations(paths, 2):
        for name in sorted(set(files[one].files) & set(files[other].files)):
            share = float((files[one][name] == files[other][name]).mean())
            worst[name] = min(share, worst.get(name, 1.0))
            print(f"{name}: {one} / {other}: {100 * share:.4f} %")
    return worst


if __name__ == "__main__":
    main(sys.argv[1:])
