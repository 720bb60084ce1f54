"""Seconds and memory to reconstruct one large Dense layer, and what a whole language model would take by them.

Inputs are made up: correlated, with a spectrum that falls and a few channels that are far larger than the others, as
those of language models are. What isn't run is computed from what is: the decomposition and the products with k^3, all
else with k^2 o. The passes through the model itself, which any method needs, aren't part of it.
"""

import argparse
import time

import numpy as np
from common import gemm_rate, record
from keras_woodfisher_backends.least_squares.arithmetic import arithmetic_for
from keras_woodfisher_backends.least_squares.kept_values import least_squares
from keras_woodfisher_backends.least_squares.normal_equations import ROWS, NormalEquations
from keras_woodfisher_backends.least_squares.support import sparse_support
from update_cost import AnonymousMemory

from keras_woodfisher.oneshot.reconstruction.problem import SUPPORT_RIDGE, VALUE_RIDGE, most_rows

_MODELS = {
    "1 B: 22 blocks, width 2048, hidden 5632": (
        22,
        {(2048, 2048): 2, (2048, 256): 2, (2048, 5632): 2, (5632, 2048): 1},
    ),
    "7 B: 32 blocks of 4096 / 11008": (32, {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}),
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--shapes", nargs="+", default=["1024x1024", "2048x2048", "4096x4096", "4096x11008"])
    args.add_argument("--sparsity", type=float, default=0.5)
    args.add_argument("--rows", type=int, help="by default as many as a layer is shown at most")
    args = args.parse_args()
    found = []
    for text in args.shapes:
        inputs, outputs = map(int, text.split("x"))
        found.append(_measured(inputs, outputs, args.sparsity, args.rows or int(most_rows(inputs))))
        print(found[-1], flush=True)
    models = {name: _hours(found, blocks, layers) for name, (blocks, layers) in _MODELS.items()}
    result = {"sparsity": args.sparsity, "float64_gemm_flops": gemm_rate(), "layers": found, "hours_on_this": models}
    record("large_layers", result)


def _measured(inputs: int, outputs: int, sparsity: float, rows: int) -> dict:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(inputs, inputs)).astype("float32") / np.sqrt(inputs)
    mixing *= np.linspace(1.0, 0.03, inputs, dtype="float32")[:, None]
    mixing[:, rng.choice(inputs, inputs // 200, replace=False)] *= 20.0
    dense = (rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype("float32")
    seconds = dict.fromkeys(("rows", "support", "values"), 0.0)
    shape = 1, inputs, outputs
    arithmetic = arithmetic_for(shape)
    with AnonymousMemory() as memory:
        equations = NormalEquations.empty(shape)
        for _ in range(0, rows, ROWS):
            seen = rng.normal(size=(1, ROWS, inputs)).astype("float32") @ mixing
            targets = seen @ dense
            start = time.perf_counter()
            equations.add(seen, targets, arithmetic)
            seconds["rows"] += time.perf_counter() - start
        start = time.perf_counter()
        mean = equations.gram.diagonal(0, 1, 2).mean()
        wanted = dense[None].astype("float64")
        keep = round((1 - sparsity) * dense.size)

        def project(values: np.ndarray) -> np.ndarray:
            sizes = np.abs(values)
            return sizes >= np.partition(sizes, -keep, None)[-keep]

        def ridged(ridge: float) -> tuple[np.ndarray, np.ndarray]:
            return equations.gram + ridge * mean * np.eye(inputs), equations.cross + ridge * mean * wanted

        kept, near = sparse_support(*ridged(SUPPORT_RIDGE), wanted, project, arithmetic=arithmetic)
        seconds["support"] = time.perf_counter() - start
        start = time.perf_counter()
        solved = least_squares(*ridged(VALUE_RIDGE), kept, near, arithmetic)
        seconds["values"] = time.perf_counter() - start
    by_magnitude = np.where(project(wanted), wanted, 0.0)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "rows": rows,
        "dtype": np.dtype(arithmetic.dtype).name,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "total": round(sum(seconds.values()), 2),
        "peak_mib": memory.growth // 2**20,
        "output_error": equations.error(solved),
        "output_error_of_magnitude": equations.error(by_magnitude),
    }


def _hours(found: list[dict], blocks: int, layers: dict[tuple[int, int], int]) -> float:
    """A model's hours: of each layer those of the largest one that was measured, by its arithmetic."""
    largest = max(found, key=lambda row: row["inputs"] * row["outputs"])
    rate = largest["total"] / _work(largest["inputs"], largest["outputs"])
    return blocks * sum(times * _work(*shape) for shape, times in layers.items()) * rate / 3600.0


def _work(inputs: int, outputs: int) -> float:
    return inputs**2 * (most_rows(inputs) + 9.0 * inputs + 80.0 * outputs)


if __name__ == "__main__":
    main()
