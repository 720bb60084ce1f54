"""How an update without its gradients grows with d, m and B, on one core with one thread of BLAS.

An update is `diag(F^-1)` of all blocks and the joint update of the weights. Its gradients are normal numbers, since
speed doesn't depend on them: one page of samples (m, c), of at most `--page-mib`, stands for every c columns of G. So
nothing is read from disk, though at 25 million weights G itself would exceed the limit of 4 GiB, and the growth of
memory is measured. Where an update would take longer than `--most-seconds`, as many blocks are run as fit into them,
their time is multiplied, and the row says `"extrapolated": true`.

Each row is compared with the smallest one of its series, and with its useful arithmetic (`2 m^2 B + 2 m^3 / 3` flops a
block, m and B exchanged where B is smaller) at the float64 GEMM rate of one core, measured beside it.
"""

import argparse
import time

import keras
import numpy as np
from common import gemm_rate, record
from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
from keras_woodfisher_backends.kernel.threads import blas_threads
from update_cost import AnonymousMemory, useful

from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

DAMP = 1e-2
LIMIT = 4 * 2**30
WEIGHTS = (270_000, 1_000_000, 4_000_000, 25_000_000)
FIXED = 100_000
"""Weights where m or B grows: whole blocks of each size."""


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--most-seconds", type=float, default=15.0, help="of one update; what is longer is extrapolated")
    args.add_argument("--page-mib", type=int, default=512)
    args.add_argument("--sparsity", type=float, default=0.5, help="part of the weights that is pruned, drawn at random")
    args = args.parse_args()
    series = {
        "d, m=64": [(d, 64, 2000) for d in WEIGHTS],
        "d, m=512": [(d, 512, 2000) for d in WEIGHTS],
        "m": [(FIXED, m, 2000) for m in (64, 128, 256, 512, 1024)],
        "B": [(FIXED, 512, width) for width in (500, 1000, 2000, 5000, 10000)],
    }
    table: dict[str, list[dict]] = {}
    with blas_threads(1):
        for name, shapes in series.items():
            rows = table[name] = []
            for shape in shapes:
                rows.append(_measure(*shape, args))
                rows[-1]["over_smallest"] = rows[-1]["seconds"] / rows[0]["seconds"]
                print(name, rows[-1], flush=True)
    record("growth", {"sparsity": args.sparsity, "memory_limit_bytes": LIMIT, "series": table})


def _measure(weights: int, m: int, width: int, args: argparse.Namespace) -> dict:
    columns = min(weights, args.page_mib * 2**18 // m)
    page = np.random.default_rng(0).standard_normal((m, max(width, columns - columns % width)), np.float32)
    blocks = -(-weights // width)
    few = min(blocks, 4)
    # The first one warms up.
    _update(page, few * width, width, args.sparsity)
    run = min(blocks, max(few, int(few * args.most_seconds / _update(page, few * width, width, args.sparsity))))
    before = gemm_rate()
    with AnonymousMemory() as memory:
        seconds = _update(page, min(weights, run * width), width, args.sparsity) * blocks / run
    rate = (before + gemm_rate()) / 2
    held = page.nbytes + memory.growth
    assert held < LIMIT, held
    return {
        "weights": weights,
        "num_grads": m,
        "fisher_block_size": width,
        "blocks": blocks,
        "blocks_run": run,
        "extrapolated": run < blocks,
        "seconds": seconds,
        "over_useful_arithmetic": seconds / (blocks * useful(*sorted((m, width))) / rate),
        "gemm_gflops": rate / 1e9,
        "memory_mib": held / 2**20,
    }


def _update(page: np.ndarray, weights: int, width: int, sparsity: float) -> float:
    """Seconds of an update of so many weights."""
    rng = np.random.default_rng(1)
    values, prune = rng.standard_normal(weights, np.float32), rng.random(weights, np.float32) < sparsity
    fisher = BlockFisher(RepeatedPage(page, weights), block_slices([weights], width), DAMP, [host_kernel()])
    start = time.perf_counter()
    fisher.update(values, prune, fisher.inverse_diagonal(), joint=True)
    return time.perf_counter() - start


class RepeatedPage(MemoryStore):
    """Gradients of which one page is there; it stands for all others.

    Args:
        page: (m, c), c a multiple of the block size.
        weights: d.
    """

    def __init__(self, page: np.ndarray, weights: int):
        super().__init__((0, 0), 1)
        self._array, self._filled = page, len(page)
        self._weights = weights

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        return len(self), self._weights

    def block(self, block: slice) -> np.ndarray:
        """The columns of the page that stand for the block."""
        start = block.start % self._array.shape[1]
        return super().block(slice(start, start + block.stop - block.start))


if __name__ == "__main__":
    assert keras.backend.backend()
    main()
