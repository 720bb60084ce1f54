"""The kernel of a GPU: against a rank-one recurrence on the same GPU (by torch), and the host's kernel.

Time of `diag(F^-1)` over some blocks, in turn in one process. The gradients are on the host; bringing them to the
GPU is part of the time of both. They are normal numbers: speed doesn't depend on them.
"""

import argparse
import time
from functools import partial

import keras
import numpy as np
from common import interleaved, median_spread, record, stored
from keras_woodfisher_backends import get_backend

from keras_woodfisher.memory.store import MemoryStore
from keras_woodfisher.pruning.fisher import BlockFisher, block_slices

DAMP = 1e-2
SHAPES = ("64x2000", "512x2000", "1024x2000", "512xall")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--shapes", nargs="+", default=SHAPES, help="m x B, or m x all: one block")
    args.add_argument("--weights", type=int, default=270_896, help="d; by default as many as a ResNet-20 has")
    args.add_argument("--device", default="gpu:0")
    args.add_argument("--rounds", type=int, default=3)
    args = args.parse_args()
    backend = get_backend(keras.backend.backend())
    torch = keras.backend.backend() == "torch"
    kernel, host = backend.kernel(args.device), backend.kernel("cpu")
    table = {}
    for shape in args.shapes:
        m = int(shape.partition("x")[0])
        width = args.weights if shape.endswith("all") else int(shape.partition("x")[2])
        count = args.weights // width
        grads = np.random.default_rng(0).normal(size=(m, width * count)).astype(np.float32)
        blocks = block_slices([grads.shape[1]], width)
        store = stored(grads)
        work = {"kernel": partial(_diagonal, store, blocks, kernel), "host": partial(_diagonal, store, blocks, host)}
        if torch:
            work["recurrence"] = partial(_recurrence, grads, width, args.device)
        start = time.perf_counter()
        first = work["kernel"]()
        first_call = time.perf_counter() - start
        truth = work["host"]()
        found = {"kernel": first} | ({"recurrence": work["recurrence"]()} if torch else {})
        errors = {name: float(np.max(np.abs(diagonal / truth - 1.0))) for name, diagonal in found.items()}
        assert max(errors.values()) < 1e-3, errors
        times = {name: np.array(values) for name, values in interleaved(work, args.rounds, warm_up=1).items()}
        table[shape] = {
            "blocks": count,
            "milliseconds_a_block": {name: median_spread(list(1e3 * t / count)) for name, t in times.items()},
            "times_the_kernel": {
                name: median_spread(list(t / times["kernel"])) for name, t in times.items() if name != "kernel"
            },
            "first_call_seconds": first_call,
            "distance_to_the_host_kernel": errors,
        }
        print(shape, table[shape], flush=True)
    record("gpu_speed", {"device": _name(args.device), "weights": args.weights, "shapes": table})


def _diagonal(grads: MemoryStore, blocks: list[slice], kernel: object) -> np.ndarray:
    return BlockFisher(grads, blocks, DAMP, [kernel]).inverse_diagonal()


def _recurrence(grads: np.ndarray, width: int, device: str) -> np.ndarray:
    import torch
    from recurrence_torch import rank_one_diagonal

    blocks = grads.reshape(len(grads), -1, width)
    host = torch.empty((blocks.shape[1], len(grads), width), pin_memory=True)
    host.copy_(torch.from_numpy(blocks).movedim(1, 0))
    diagonal = rank_one_diagonal(host.to(device.replace("gpu", "cuda"), non_blocking=True), DAMP)
    return diagonal.double().cpu().numpy().ravel()


def _name(device: str) -> str:
    if keras.backend.backend() != "torch":
        return device
    import torch

    return torch.cuda.get_device_name(device.replace("gpu", "cuda"))


if __name__ == "__main__":
    main()
