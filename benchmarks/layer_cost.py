"""Time of gradient samples over one batched pass forward and back, for nets of one kind of layer each.

Seconds of the processor count, not of the clock, and the samples go into the same memory each time.
"""

import time
from collections.abc import Callable

import keras
import numpy as np
from batched import batched_pass
from common import parser, record
from gradient_cost import SameMemory
from keras import layers

from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner

SEQUENCE = (20, 16)
VIDEO = (6, 12, 12, 3)


class Subclass(layers.Dense):
    """A subclass of a known layer."""


NETS: dict[str, tuple[tuple, Callable[[], list]]] = {
    "lstm": (SEQUENCE, lambda: [layers.LSTM(32, return_sequences=True), layers.LSTM(32)]),
    "gru": (SEQUENCE, lambda: [layers.GRU(32, return_sequences=True), layers.GRU(32)]),
    "simple_rnn": (SEQUENCE, lambda: [layers.SimpleRNN(32, return_sequences=True), layers.SimpleRNN(32)]),
    "bidirectional": (SEQUENCE, lambda: [layers.Bidirectional(layers.LSTM(32))]),
    "time_distributed": (SEQUENCE, lambda: [layers.TimeDistributed(layers.Dense(32, "relu")), layers.LSTM(32)]),
    "conv_lstm": (VIDEO, lambda: [layers.ConvLSTM2D(8, 3, padding="same"), layers.GlobalAveragePooling2D()]),
    "subclass": (SEQUENCE, lambda: [Subclass(64, "relu"), Subclass(64, "relu"), layers.GlobalAveragePooling1D()]),
    "dense": (SEQUENCE, lambda: [layers.Dense(64, "relu"), layers.Dense(64, "relu"), layers.GlobalAveragePooling1D()]),
}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--examples", type=int, default=256)
    args.add_argument("--rounds", type=int, default=7)
    args.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    args = args.parse_args()
    record("layer_cost", {"sampling_over_batched_pass": {n: ratio(n, args.examples, args.rounds) for n in args.nets}})


def ratio(name: str, count: int, rounds: int) -> float:
    """The least time of samples over the least time of passes, whichever batch size is fastest."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    shape, make = NETS[name]
    model = keras.Sequential([layers.Input(shape), *make(), layers.Dense(10)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.normal(size=(count, *shape)).astype("float32"), rng.integers(0, 10, count).astype("int32")
    options = PruningOptions(num_grads=count, verbose=0)
    pruner = Pruner(model, options)
    source = SampledGradients(model, pruner.targets, options, pruner.backend, open_examples((x, y)))
    kept = [~pruned for pruned in pruner.pruned]
    store = SameMemory((count, sum(target.size for target in pruner.targets)), count)

    def sample() -> None:
        store.rewind()
        source.fill(store, kept, count, 0, lambda number: None)

    variables = [target.variable for target in pruner.targets]
    passes = [batched_pass(model, variables, x, y, size) for size in {min(count, 64), count}]
    return least(sample, rounds) / min(least(run, rounds) for run in passes)


def least(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the processor, after one call that may compile."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
