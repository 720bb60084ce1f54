"""What holding the zeros adds to a training step: two copies of a model, trained in turn, one with KeepZeros."""

import keras
import numpy as np
from common import compile_model, interleaved, load, median_spread, parser, record

import keras_woodfisher as kw


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--batch-size", type=int, default=128)
    args.add_argument("--rounds", type=int, default=60)
    args.add_argument("--sparsity", type=float, default=0.9)
    args = args.parse_args()
    model, train, _ = load(args)
    kw.prune(model, sparsity=args.sparsity, method="magnitude", verbose=0)
    x, y = train[0][: args.batch_size], train[1][: args.batch_size]
    plain, held = _copy(model), _copy(model)
    other = _copy(model)
    callbacks = keras.callbacks.CallbackList([kw.KeepZeros()], model=held, epochs=1, steps=args.rounds)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    seconds = interleaved(
        {
            "plain": lambda: plain.train_on_batch(x, y),
            "held": lambda: held.train_on_batch(x, y),
            "plain_again": lambda: other.train_on_batch(x, y),
        },
        args.rounds,
        warm_up=5,
    )
    sparsity = kw.sparsity_report(held).sparsity
    callbacks.on_train_end()
    assert sparsity >= args.sparsity - 1e-4, sparsity
    base = np.array(seconds["plain"])
    record(
        "zeros_cost",
        {
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "step_seconds": median_spread(list(base)),
            # In each turn the three steps follow each other: ratios within a turn, then their median.
            "held_over_plain": median_spread(list(np.array(seconds["held"]) / base)),
            "plain_over_plain": median_spread(list(np.array(seconds["plain_again"]) / base)),
        },
    )


def _copy(model: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    compile_model(copy, keras.optimizers.SGD(1e-3, momentum=0.9))
    return copy


if __name__ == "__main__":
    main()
