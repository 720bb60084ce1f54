"""How much anonymous memory pruning takes, over what its plan says, at limits down to a tenth of the gradients.

Each limit is a process of its own. Warm-up is one update with few gradients, which loads libraries and compiles; what
counts is the largest growth from then on. `--weights 25` builds a dense net of about 25 million weights instead of a
model from a file, with random data: its limit is `--limit`.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from common import compile_model, load, parser, record
from update_cost import AnonymousMemory

import keras_woodfisher as kw
from keras_woodfisher.oneshot.reconstruction import layerwise
from keras_woodfisher.options.sizes import parse_bytes
from keras_woodfisher.pruning import workspace
from keras_woodfisher.pruning.pruner import Pruner

_FRACTIONS = (2.0, 1.0, 0.5, 0.25, 0.1)
_WARM = 40


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, default=0.8)
    args.add_argument("--weights", type=int, help="millions of weights of a dense net, instead of a model")
    args.add_argument("--limit", action="append", help="memory limits; by default fractions of the gradients")
    args.add_argument("--no-disk", action="store_true", help="as if the temporary folder were full")
    args.add_argument("--one", help=argparse.SUPPRESS)
    args.add_argument("--quality", default="fast")
    args.add_argument("--reconstruct", type=int, help="reconstruct by so many examples, instead of by gradients")
    args.add_argument("--name", default="memory")
    args = args.parse_args()
    if args.one:
        print(json.dumps(_measure_reconstruction(args) if args.reconstruct else _measure(args)))
        return
    if args.reconstruct:
        _reconstruction(args)
        return
    model, _, _ = _load(args)
    size = 4 * args.num_grads * sum(t.size for t in Pruner(model, kw.options.PruningOptions(verbose=0)).targets)
    limits = args.limit or [str(int(size * fraction)) for fraction in _FRACTIONS]
    runs = [_run(limit) for limit in limits]
    record(
        args.name,
        {
            "num_grads": args.num_grads,
            "fisher_block_size": args.fisher_block_size,
            "gradients_bytes": size,
            "runs": runs,
            "largest_growth_over_plan": max(run["growth_over_plan"] for run in runs),
        },
    )


def _reconstruction(args: argparse.Namespace) -> None:
    """The same of a reconstruction; the limits are fractions of what one pass takes."""
    whole = _run("1TiB")
    limits = args.limit or [str(int(whole["plan"] * fraction)) for fraction in _FRACTIONS[2:]]
    runs = [whole, *(_run(limit) for limit in limits)]
    worst = max(run["growth_over_plan"] for run in runs)
    record(args.name, {"examples": args.reconstruct, "runs": runs, "largest_growth_over_plan": worst})


def _run(limit: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", limit]
    # A temporary folder of its own: what other processes put into the common one is none of this one's leavings.
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def _load(args: argparse.Namespace) -> tuple:
    if not args.weights:
        return load(args)
    layers, side = keras.layers, int((args.weights * 1e6 / 1.2) ** 0.5)
    model = keras.Sequential(
        [
            layers.Input((side // 10,)),
            layers.Dense(side, activation="relu"),
            layers.Dense(side, activation="relu"),
            layers.Dense(side // 10),
        ]
    )
    compile_model(model)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(512, side // 10)).astype("float32"), rng.integers(0, 10, 512).astype("int32")
    return model, data, data


def _measure(args: argparse.Namespace) -> dict:
    model, data, _ = _load(args)
    dense = model.get_weights() if not args.weights else None
    common = {
        "quality": args.quality,
        "damp": args.damp,
        "fisher_block_size": args.fisher_block_size,
        "verbose": 0,
        "memory_limit": args.one,
    }
    plans = []
    planned = workspace.Workspace.plan

    def keep(self: workspace.Workspace, *given: object) -> object:
        plans.append(planned(self, *given))
        return plans[-1]

    workspace.Workspace.plan = keep
    if args.no_disk:
        workspace.disk_room = lambda folder: 0
    kw.prune(model, data, 0.01, num_grads=_WARM, **common)
    if dense is not None:
        model.set_weights(dense)
    gc.collect()
    left = set(Path(tempfile.gettempdir()).iterdir())
    with AnonymousMemory() as memory:
        report = kw.prune(model, data, args.sparsity, num_grads=args.num_grads, **common)
    plan = plans[-1]
    assert set(Path(tempfile.gettempdir()).iterdir()) <= left
    return {
        "limit": parse_bytes("limit", args.one),
        "storage": plan.storage,
        "pages": plan.pages,
        "chunk": plan.chunk,
        "lanes": plan.lanes,
        "plan": plan.total,
        "growth": memory.growth,
        "growth_over_plan": memory.growth / plan.total,
        "seconds": {phase.name: round(phase.seconds, 2) for phase in report.phases},
    }


def _measure_reconstruction(args: argparse.Namespace) -> dict:
    model, data, _ = _load(args)
    dense = model.get_weights()
    common = {"method": "reconstruct", "quality": args.quality, "verbose": 0, "memory_limit": args.one}
    plans = []
    planned = layerwise.plan_chunks

    def keep(*given: object) -> object:
        plans.append(planned(*given))
        return plans[-1]

    layerwise.plan_chunks = keep
    kw.prune(model, data[0][:64], args.sparsity, num_examples=32, **common)
    growth = []
    # JAX compiles each operation for each number of examples: once in the first one.
    for _ in range(2):
        model.set_weights(dense)
        gc.collect()
        with AnonymousMemory() as memory:
            report = kw.prune(model, data[0], args.sparsity, num_examples=args.reconstruct, **common)
        growth.append(memory.growth)
    plan = plans[-1]
    return {
        "limit": plan.limit,
        "examples": report.reconstruction.examples,
        "chunk": plan.chunk,
        "plan": plan.bytes,
        "first_growth": growth[0],
        "growth": growth[1],
        "growth_over_plan": growth[1] / plan.bytes,
        "seconds": {phase.name: round(phase.seconds, 2) for phase in report.phases},
    }


if __name__ == "__main__":
    main()
