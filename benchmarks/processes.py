"""What several processes that prune together hold, send and compute, measured, and foretold for larger models.

First it prunes a Dense net of some four million weights (num_grads=64, one thread a process) with one, two and four
processes of torch.distributed on this machine, counts the bytes that each hands to the engine, and compares them, the
growth of memory over the whole update (at most, as planned; and as expected) and the time of the blocks with the
formulas of `recipe/dry_run/process_costs.py`.

Then it deals out the blocks of real models over up to 64 processes with the package's own functions. One process
stands for all: it runs as many blocks of synthetic rows as take some seconds, on one core, and multiplies. Links are
modelled by their bandwidth alone, `8 x bytes / bandwidth`; memory and bytes are those of the process that has most. The
same is done for the cases that were measured, and the ratios are told.
"""

import argparse
import bisect
import gc
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES, WIDTH, SIDE = 64, 2000, 2000
BANDWIDTHS = (10e9, 100e9)
"""Bits a second."""


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes to measure with")
    args.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.child:
        _child(*args.child)
        return
    from common import record

    measured = [_measured(ranks) for ranks in args.ranks]
    record("processes", {"measured": measured, "simulated": _simulated(measured)})


def _measured(ranks: int) -> dict:
    """What the processes told, the largest of each figure."""
    with socket.socket() as found, tempfile.TemporaryDirectory() as folder:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        settings = os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", str(rank), str(ranks), str(port), str(file)], env=settings
            )
            for rank, file in enumerate(files)
        ]
        if any(process.wait() for process in started):
            raise RuntimeError("a process has failed; see above")
        told = [json.loads(file.read_text()) for file in files]
    largest = {name: max(one[name] for one in told) for name in told[0]}
    row = {"ranks": ranks, **largest, "blocks_seconds_sum": sum(one["blocks_seconds"] for one in told)}
    print(row, flush=True)
    return row


def _child(rank: str, size: str, port: str, file: str) -> None:
    import torch

    torch.set_num_threads(1)
    if int(size) > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(size)
        )
    import keras
    import numpy as np
    from keras_woodfisher_backends.kernel.threads import blas_threads
    from keras_woodfisher_backends.ranks.joint import current_ranks
    from keras_woodfisher_backends.ranks.shares import column_edges, row_share
    from update_cost import AnonymousMemory

    import keras_woodfisher as kw
    from keras_woodfisher.memory.free_memory import give_back_memory
    from keras_woodfisher.pruning.fisher import block_slices

    sent = _Counted(current_ranks())
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, SIDE)).astype("float32")
    y = rng.integers(0, 4, SAMPLES)
    model = keras.Sequential([keras.Input((SIDE,)), keras.layers.Dense(SIDE, "relu"), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    options = {"quality": "fast", "num_grads": SAMPLES, "damp": 1e-6, "fisher_block_size": WIDTH, "verbose": 0}
    # The same plan on each machine.
    options["memory_limit"] = "8GiB"
    with blas_threads(1):
        # What is imported and allocated once isn't this update's.
        kw.prune(model, (x, y), 0.1, **options)
        sent.bytes = 0
        gc.collect()
        give_back_memory()
        with AnonymousMemory() as memory:
            kw.prune(model, (x, y), 0.5, **options)
    ranks = current_ranks()
    told = sent.report() | {"peak": memory.growth}
    sizes = [SIDE * SIDE, SIDE * 4]
    kept = [round(0.9 * size) for size in sizes]
    d = sum(kept)
    edges = column_edges([block.stop for block in block_slices(kept, WIDTH)], ranks.size)
    share = row_share(SAMPLES, ranks.rank, ranks.size)
    rows, columns = share.stop - share.start, edges[ranks.rank + 1] - edges[ranks.rank]
    formula = 4 * rows * (d - columns) + 16 * columns * (ranks.size - 1)
    told |= {"sent_formula": formula, "sent_over_formula": told["sent"] / max(formula, 1)}
    told |= {f"peak_over_{name}": told["peak"] / told[name] for name in ("plan", "expected")}
    Path(file).write_text(json.dumps(told))
    os._exit(0)


class _Counted:
    """Counts the bytes that a process hands to its engine for others, and measures its phases."""

    def __init__(self, ranks) -> None:
        from keras_woodfisher.pruning.workspace import Workspace
        from keras_woodfisher.reports.meter import Meter

        self.bytes = 0
        self.phases: list = []
        own = Meter.phase
        counted = self

        def phase(meter, *args):
            context = own(meter, *args)
            counted.meter = meter
            return context

        Meter.phase = phase
        plan = Workspace.plan

        def planned(space, *args):
            counted.plan = plan(space, *args)
            return counted.plan

        Workspace.plan = planned
        transport = ranks.transport
        if transport is None:
            return
        gather, exchange = transport.all_gather, transport.all_to_all

        def all_gather(data):
            counted.bytes += data.nbytes * (ranks.size - 1)
            return gather(data)

        def all_to_all(parts, lengths, most):
            counted.bytes += sum(part.nbytes for rank, part in enumerate(parts) if rank != ranks.rank)
            return exchange(parts, lengths, most)

        transport.all_gather, transport.all_to_all = all_gather, all_to_all

    def report(self) -> dict:
        phases = {phase.name: phase for phase in self.meter.phases}
        return {
            "sent": self.bytes,
            "plan": self.plan.total,
            "expected": self.plan.expected,
            "gradients_seconds": phases["gradients"].seconds,
            "blocks_seconds": phases["inverse"].seconds + phases["update"].seconds,
        }


def _shapes() -> dict[str, list[int]]:
    """Weights of the kernels of models, one after the other."""
    import keras

    resnet = keras.applications.ResNet50(weights=None)
    kernels = [math.prod(variable.shape) for variable in resnet.weights if variable.path.endswith("kernel")]
    bert = 12 * [768 * 768] * 4 + 12 * [768 * 3072] * 2
    return {
        "ResNet-50": kernels,
        "BERT-base": bert,
        # Hidden size, inner size and layers as in models of this size that are in use.
        "1 B": 22 * ([2048 * 2048] * 2 + [2048 * 256] * 2 + [2048 * 5632] * 3),
        "7 B": 32 * ([4096 * 4096] * 4 + [4096 * 11008] * 3),
    }


def _block_seconds(samples: int, seconds: float = 3.0) -> float:
    """Seconds of one core for the scores and the correction of a block of synthetic rows."""
    import numpy as np
    from keras_woodfisher_backends.kernel.numpy_operators import host_kernel
    from keras_woodfisher_backends.kernel.threads import blas_threads

    from keras_woodfisher.memory.store import MemoryStore
    from keras_woodfisher.pruning.fisher import BlockFisher

    rng = np.random.default_rng(0)
    number = 4
    store = MemoryStore((samples, number * WIDTH), samples)
    store.room(samples)[...] = rng.standard_normal((samples, number * WIDTH), np.float32)
    store.keep(np.ones(samples, bool))
    blocks = [slice(k * WIDTH, (k + 1) * WIDTH) for k in range(number)]
    weights = rng.standard_normal(number * WIDTH)
    prune = rng.random(number * WIDTH) < 0.5
    done, spent = 0, 0.0
    with blas_threads(1):
        while spent < seconds:
            start = time.perf_counter()
            fisher = BlockFisher(store, blocks, 1e-2, [host_kernel().with_lanes(1)])
            fisher.inverse_diagonal()
            fisher.update(weights, prune, None, True)
            if done:
                spent += time.perf_counter() - start
            done += number
    return spent / (done - number)


def _simulated(measured: list[dict]) -> list[dict]:
    from keras_woodfisher_backends.ranks.shares import column_edges, row_share

    from keras_woodfisher.pruning.fisher import block_slices

    models = _shapes()
    cases = [
        ("measured net", [round(0.9 * SIDE * SIDE), round(0.9 * SIDE * 4)], SAMPLES, row["ranks"]) for row in measured
    ]
    cases += [("ResNet-50", models["ResNet-50"], 512, ranks) for ranks in (1, 8, 64)]
    cases += [("BERT-base", models["BERT-base"], 512, ranks) for ranks in (8, 64)]
    cases += [("1 B", models["1 B"], 64, ranks) for ranks in (8, 64)]
    cases += [("7 B", models["7 B"], 64, ranks) for ranks in (64,)]
    seconds = {samples: _block_seconds(samples) for samples in {case[2] for case in cases}}
    rows = []
    for name, kernels, samples, ranks in cases:
        blocks = block_slices(kernels, WIDTH)
        stops = [block.stop for block in blocks]
        edges, d = column_edges(stops, ranks), stops[-1]
        widths = [
            [
                b.stop - b.start
                for b in blocks[bisect.bisect_right(stops, edges[r]) : bisect.bisect_right(stops, edges[r + 1])]
            ]
            for r in range(ranks)
        ]
        shares = [row_share(samples, rank, ranks) for rank in range(ranks)]
        own = [
            (share.stop - share.start, stop - start)
            for share, start, stop in zip(shares, edges[:-1], edges[1:], strict=True)
        ]
        sent = max(4 * m * (d - c) + 16 * c * (ranks - 1) for m, c in own)
        held = max(4 * (m * d + (samples * c if ranks > 1 else 0)) for m, c in own)
        row = {
            "model": name,
            "weights": d,
            "num_grads": samples,
            "ranks": ranks,
            "held": held,
            "sent": sent,
            "link_seconds": {f"{int(bits / 1e9)} Gb/s": 8 * sent / bits for bits in BANDWIDTHS},
            "blocks_seconds": max(sum(each) for each in widths) / WIDTH * seconds[samples],
        }
        if name == "measured net":
            there = next(one for one in measured if one["ranks"] == ranks)
            row["measured_over_this"] = {
                "sent": there["sent"] / max(sent, 1),
                "blocks_seconds": there["blocks_seconds"] / row["blocks_seconds"],
            }
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
