"""One pruning update but for its gradients: time over that of the useful arithmetic, and memory beyond G.

The useful arithmetic is `2 m^2 B + 2 m^3 / 3` flops a block, at the float64 GEMM rate measured in the same run, in turn
with the updates.
"""

import threading
import time

import keras
import numpy as np
import psutil
from common import load, median_spread, parser, record
from samples import GivenGradients, gradients

from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.fisher import block_slices
from keras_woodfisher.pruning.pruner import Pruner


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, default=0.8)
    args.add_argument("--rounds", type=int, default=7)
    args = args.parse_args()
    model, train, _ = load(args)
    grads, kept = gradients(model, train, args.num_grads)
    dense = model.get_weights()
    size = args.fisher_block_size
    flops = sum(useful(len(grads), b.stop - b.start) for b in block_slices(kept, size))
    matrix = np.random.default_rng(0).normal(size=(2000, 2000))
    updates, gemms, growth = [], [], []
    for turn in range(args.rounds + 1):
        start = time.perf_counter()
        matrix @ matrix
        gemm = time.perf_counter() - start
        model.set_weights(dense)
        options = PruningOptions(num_grads=len(grads), fisher_block_size=size, damp=args.damp, verbose=0)
        pruner = Pruner(model, options)
        sparsity = [args.sparsity] * len(pruner.targets)
        with AnonymousMemory() as memory:
            start = time.perf_counter()
            done = pruner.update(sparsity, GivenGradients(grads), len(grads))
            seconds = time.perf_counter() - start
        seconds -= sum(phase.seconds for phase in done.phases if phase.name == "gradients")
        # What the first update allocates may stay with the process, so its memory counts, but not its time.
        growth.append(memory.growth / 2**20)
        if turn:
            updates.append(seconds)
            gemms.append(flops / (2.0 * 2000**3 / gemm))
    ratios = [update / gemm for update, gemm in zip(updates, gemms, strict=True)]
    settings = {key: getattr(args, key) for key in ("num_grads", "fisher_block_size", "damp", "sparsity", "rounds")}
    record(
        "update_cost",
        {
            **settings,
            "weights": sum(kept),
            "update_seconds": median_spread(updates),
            "useful_arithmetic_seconds": median_spread(gemms),
            "ratio_median_and_quartiles": median_spread(ratios),
            # Beyond the place where the gradients are kept.
            "extra_memory_mib_largest": max(growth) - grads.nbytes / 2**20,
            "gradients_mib": grads.nbytes / 2**20,
        },
    )


def useful(m: int, width: int) -> float:
    """Flops of one block."""
    return 2.0 * m**2 * width + 2.0 * m**3 / 3.0


class AnonymousMemory:
    """Largest growth of the process's anonymous memory, sampled each millisecond."""

    def __enter__(self) -> "AnonymousMemory":
        self._process = psutil.Process()
        self._before, self.growth = self._now(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.growth = max(self.growth, self._now() - self._before)

    def _now(self) -> int:
        info = self._process.memory_info()
        return info.rss - getattr(info, "shared", 0)


if __name__ == "__main__":
    assert keras.backend.backend()
    main()
