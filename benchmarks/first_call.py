"""What a first and a second `prune` cost beside one plain trace and compile of the gradient of the same loss.

Each is done in a process of its own, in seconds of the processor: what is compiled once serves whoever comes next.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
from batched import batched_pass
from common import record
from nets import mobilenet, transformer

from keras_woodfisher import prune
from keras_woodfisher.model.targets import find_targets

NETS = {"mobilenet": (mobilenet, (32, 32, 3)), "transformer": (transformer, (8, 8, 1))}
SPARSITIES = (0.1, 0.15, 0.2)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    args.add_argument("--quality", default="fast", choices=("fast", "balanced"))
    args.add_argument("--method", default="woodfisher", choices=("woodfisher", "reconstruct"))
    args.add_argument("--part", nargs=2, metavar=("WHAT", "NET"), help="in a process of its own: plain or prune")
    args = args.parse_args()
    if args.part:
        what, net = args.part
        print(json.dumps(_plain(net) if what == "plain" else _prunes(net, args.quality, args.method)))
        return
    result = {}
    for net in args.nets:
        plain, prunes = (_apart([*sys.argv, "--part", what, net]) for what in ("plain", "prune"))
        compile_seconds = plain[0] - plain[1]
        result[net] = {
            "plain_calls": plain,
            "prune_calls": prunes,
            "first_minus_last_over_plain": (prunes[0] - prunes[-1]) / compile_seconds,
            "second_minus_last_over_plain": (prunes[1] - prunes[-1]) / compile_seconds,
        }
    record("first_call", {"quality": args.quality, "method": args.method, "nets": result})


def _apart(arguments: list[str]) -> list[float]:
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _net(name: str) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    make, shape = NETS[name]
    model = make(shape, 10)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, rng.normal(size=(512, *shape)).astype("float32"), rng.integers(0, 10, 512).astype("int32")


def _plain(name: str) -> list[float]:
    model, x, y = _net(name)
    variables = [target.variable for target in find_targets(model, "__ALL_PRUNABLE__")]
    run = batched_pass(model, variables, x[:64], y[:64], 64)
    return [_seconds(run) for _ in range(3)]


def _prunes(name: str, quality: str, method: str) -> list[float]:
    model, x, y = _net(name)

    def to(sparsity: float) -> None:
        prune(model, data=(x, y), sparsity=sparsity, quality=quality, method=method, verbose=0)

    return [_seconds(lambda sparsity=sparsity: to(sparsity)) for sparsity in SPARSITIES]


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
