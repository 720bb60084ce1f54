"""The CPU kernel against a rank-one recurrence and against the machine's float64 GEMM rate.

Time of `diag(F^-1)` over some blocks, all in turn in one process, both with the same threads. The gradients are normal
numbers: speed doesn't depend on them. GEMM is one call with all threads of BLAS. A single block is one recurrence whose
products use all threads.
"""

import argparse
from functools import partial

import keras
import numpy as np
from common import interleaved, median_spread, record, stored
from keras_woodfisher_backends.kernel.block_kernel import BlockKernel
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
from recurrence import RankOneRecurrence

from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

DAMP = 1e-2
SHAPES = ("64x2000", "512x2000", "1024x2000", "1024x10000", "512xall")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--shapes", nargs="+", default=SHAPES, help="m x B, or m x all: one block")
    args.add_argument("--weights", type=int, default=270_896, help="d; by default as many as a ResNet-20 has")
    args.add_argument("--most-mib", type=int, default=1200, help="fewer blocks where the gradients take more")
    args.add_argument("--rounds", type=int, default=7)
    args.add_argument("--name", default="kernel_speed")
    args = args.parse_args()
    kernel = host_kernel()
    recurrence = RankOneRecurrence(kernel.lanes)
    single = np.random.default_rng(1).normal(size=(2000, 2000)).astype(np.float32)
    double = single.astype(np.float64)
    gemms = {"gemm": lambda: double @ double, "gemm_float32": lambda: single @ single}
    table = {}
    for shape in args.shapes:
        m = int(shape.partition("x")[0])
        width = args.weights if shape.endswith("all") else int(shape.partition("x")[2])
        count = max(1, min(args.weights, args.most_mib * 2**18 // m) // width)
        grads = stored(np.random.default_rng(0).normal(size=(m, width * count)).astype(np.float32))
        blocks = block_slices([grads.shape[1]], width)
        kernels = {"kernel": kernel, "recurrence": recurrence}
        # A new one each time: it computes its diagonal only once.
        work = {name: partial(_diagonal, grads, blocks, one) for name, one in kernels.items()}
        errors = _errors(grads.block(blocks[0]), {name: run()[blocks[0]] for name, run in work.items()})
        assert max(errors.values()) < 1e-3, errors
        # The recurrence over one block takes many seconds, the others are short.
        seconds = interleaved(work | gemms, args.rounds if m * width < 10**7 else 3, warm_up=1, pause=0.1)
        times = {name: np.array(values) for name, values in seconds.items()}
        rate = 2.0 * 2000**3 / times["gemm"]
        useful = count * (2.0 * m**2 * width + 2.0 * m**3 / 3.0) / times["kernel"]
        table[shape] = {
            "blocks": count,
            "recurrence_over_kernel": median_spread(list(times["recurrence"] / times["kernel"])),
            "share_of_gemm_rate": median_spread(list(useful / rate)),
            "milliseconds_a_block": median_spread(list(1e3 * times["kernel"] / count)),
            "gemm_gflops": {
                "float64": float(np.median(rate)) / 1e9,
                "float32": 16.0 / np.median(times["gemm_float32"]),
            },
            "largest_relative_error": errors,
        }
        print(shape, table[shape], flush=True)
    record(args.name, {"lanes": kernel.lanes, "weights": args.weights, "shapes": table})


def _diagonal(grads: MemoryStore, blocks: list[slice], kernel: BlockKernel) -> np.ndarray:
    return BlockFisher(grads, blocks, DAMP, [kernel]).inverse_diagonal()


def _errors(grads: np.ndarray, diagonals: dict[str, np.ndarray]) -> dict[str, float]:
    """Against the dense float64 inverse; of a block that is too large for one, some columns by singular values."""
    double = grads.astype(np.float64)
    if grads.shape[1] <= 4000:
        truth, chosen = (
            np.diag(np.linalg.inv(DAMP * np.eye(grads.shape[1]) + double.T @ double / len(double))),
            slice(None),
        )
    else:
        chosen = np.arange(0, grads.shape[1], grads.shape[1] // 500)
        values, left = np.linalg.eigh(double @ double.T)
        rows = left.T @ double[:, chosen]
        truth = (1.0 - (rows**2 / (values + len(double) * DAMP)[:, None]).sum(0)) / DAMP
    return {name: float(np.max(np.abs(diagonal[chosen] / truth - 1.0))) for name, diagonal in diagonals.items()}


if __name__ == "__main__":
    assert keras.backend.backend()
    main()
