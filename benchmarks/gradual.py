"""Gradual pruning while fine-tuning: WoodFisher against magnitude under the same schedule and learning rate.

The learning rate is chosen for magnitude, on the last tenth of the training data; nothing is chosen by --val. By
default the ramp lasts as long as the training. The damping is higher than in one shot, since half-trained nets have
larger gradients.
"""

import json
import math

import keras
import numpy as np
from common import accuracy, compile_model, load, parser, record
from nets import augmented

import keras_woodfisher as kw


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sparsity", type=float, default=0.95)
    args.add_argument("--epochs", type=int, default=3)
    args.add_argument("--batch-size", type=int, default=64)
    args.add_argument("--update-frequency", type=float, default=0.5)
    args.add_argument("--init-sparsity", type=float, default=0.0)
    args.set_defaults(damp=1e-4)
    args.add_argument("--end-epoch", type=float, default=3.0)
    args.add_argument("--rates", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    args.add_argument("--methods", nargs="+", default=["magnitude", "woodfisher"])
    args.add_argument("--name", default="gradual")
    args.add_argument("--rate", type=float, help="skip the choice of the learning rate")
    args.add_argument("--set", nargs="+", default=[], help="further options of woodfisher, NAME=VALUE")
    args.add_argument("--held-out", action="store_true", help="compare on the last tenth of the training data instead")
    args.add_argument("--augment", action="store_true", help="train on cropped and flipped images")
    args = args.parse_args()
    model, train, val = load(args)
    dense = model.get_weights()
    held = len(train[0]) // 10
    inner, outer = tuple(a[:-held] for a in train), tuple(a[-held:] for a in train)
    tried = {}
    for rate in [] if args.rate else args.rates:
        _train(model, dense, inner, "magnitude", rate, 0, args)
        tried[rate] = accuracy(model, outer)
        print("magnitude, rate", rate, "held-out training data:", tried[rate], flush=True)
    rate = args.rate or max(tried, key=tried.get)
    if args.held_out:
        train, val = inner, outer
    table: dict[str, list[float]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method, row in table.items():
            _train(model, dense, train, method, rate, seed, args)
            assert kw.sparsity_report(model).sparsity >= args.sparsity - 1e-4
            row.append(accuracy(model, val))
            print(method, "seed", seed, row[-1], flush=True)
    keys = ("sparsity", "epochs", "end_epoch", "update_frequency", "batch_size", "num_grads", "damp", "augment")
    record(
        args.name,
        {
            **{key: getattr(args, key) for key in keys},
            "woodfisher_options": args.set,
            "on_held_out_training_data": args.held_out,
            "rate": rate,
            "rates_tried_for_magnitude": tried,
            "each": table,
            "mean": {method: float(np.mean(row)) for method, row in table.items()},
        },
    )


def _train(model: keras.Model, dense: list, data: tuple, method: str, rate: float, seed: int, args: object) -> None:
    keras.utils.set_random_seed(seed)
    model.set_weights(dense)
    compile_model(model, keras.optimizers.SGD(rate, momentum=0.9))
    options = {
        "num_grads": args.num_grads,
        "fisher_block_size": args.fisher_block_size,
        "damp": args.damp,
        "seed": seed,
        "verbose": 0,
    }
    if method == "woodfisher":
        options |= {name: json.loads(value) for name, value in (text.split("=") for text in args.set)}
    pruner = kw.WoodFisherPruning(
        args.sparsity,
        init_sparsity=args.init_sparsity,
        end_epoch=args.end_epoch,
        update_frequency=args.update_frequency,
        method=method,
        data=data,
        **options,
    )
    batches = Batches(data, args.batch_size, seed, args.augment)
    model.fit(batches, epochs=args.epochs, callbacks=[pruner], verbose=0)


class Batches(keras.utils.PyDataset):
    """Shuffled batches, with fresh crops and flips each epoch where asked for."""

    def __init__(self, data: tuple, size: int, seed: int, augment: bool):
        super().__init__()
        self._data, self._size, self._augment = data, size, augment
        self._rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._order[index * self._size : (index + 1) * self._size]
        x, y = self._data[0][rows], self._data[1][rows]
        return (augmented(x, int(self._rng.integers(2**31))) if self._augment else x), y

    def on_epoch_end(self) -> None:
        self._order = self._rng.permutation(len(self._data[0]))


if __name__ == "__main__":
    main()
