"""The CPU kernel against a rank-one recurrence and against the machine's float64 GEMM rate.

Time of `diag(F^-1)` over some blocks, all in turn in one process, both with the same threads. The gradients are normal
numbers: speed doesn't depend on them. GEMM is one call with all threads of BLAS.
"""

import argparse

import keras
import numpy as np
from common import interleaved, median_spread, record
from keras_woodfisher_backends.numpy_backend import host_kernel
from recurrence import RankOneRecurrence

from keras_woodfisher.fisher import BlockFisher, block_slices

DAMP = 1e-2


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--shapes", nargs="+", default=["64x2000", "512x2000", "1024x2000"], help="m x B")
    args.add_argument("--blocks", type=int, default=8)
    args.add_argument("--rounds", type=int, default=7)
    args = args.parse_args()
    kernel = host_kernel()
    recurrence = RankOneRecurrence(kernel.workers)
    matrix = np.random.default_rng(1).normal(size=(2000, 2000))
    table = {}
    for shape in args.shapes:
        m, width = map(int, shape.split("x"))
        grads = np.random.default_rng(0).normal(size=(m, width * args.blocks)).astype(np.float32)
        blocks = block_slices([grads.shape[1]], width)
        ours = BlockFisher(grads, blocks, DAMP, [kernel])
        theirs = BlockFisher(grads, blocks, DAMP, [recurrence])
        truth = _dense(grads[:, blocks[0]])
        errors = {
            name: float(np.max(np.abs(fisher.inverse_diagonal()[blocks[0]] / truth - 1.0)))
            for name, fisher in (("kernel", ours), ("recurrence", theirs))
        }
        assert max(errors.values()) < 1e-3, errors
        work = {"kernel": ours.inverse_diagonal, "recurrence": theirs.inverse_diagonal, "gemm": lambda: matrix @ matrix}
        seconds = {name: np.array(times) for name, times in interleaved(work, args.rounds).items()}
        useful = args.blocks * (2.0 * m**2 * width + 2.0 * m**3 / 3.0) * seconds["gemm"] / (2.0 * 2000**3)
        table[shape] = {
            "recurrence_over_kernel": median_spread(list(seconds["recurrence"] / seconds["kernel"])),
            "share_of_gemm_rate": median_spread(list(useful / seconds["kernel"])),
            "milliseconds_a_block": median_spread(list(1e3 * seconds["kernel"] / args.blocks)),
            "largest_relative_error": errors,
        }
        print(shape, table[shape], flush=True)
    record("kernel_speed", {"workers": kernel.workers, "blocks": args.blocks, "shapes": table})


def _dense(grads: np.ndarray) -> np.ndarray:
    double = grads.astype(np.float64)
    return np.diag(np.linalg.inv(DAMP * np.eye(double.shape[1]) + double.T @ double / len(double)))


if __name__ == "__main__":
    assert keras.backend.backend()
    main()
