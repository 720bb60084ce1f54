"""Sensitivity analysis: what pruning each variable alone does to the loss, predicted and measured."""

import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_woodfisher_backends.nest import map_arrays
from keras_woodfisher_backends.ranks.joint import jointly

from keras_woodfisher.gradients.loss import MeanLoss, ModelLoss, has_loss
from keras_woodfisher.gradients.sources import SampledGradients
from keras_woodfisher.model.batches import Batch, length
from keras_woodfisher.model.examples import open_examples, read_batches
from keras_woodfisher.oneshot.single_changes import reconstructed_changes, single_changes
from keras_woodfisher.options.checks import fraction, one_of
from keras_woodfisher.options.pruning_options import MAGNITUDE, RECONSTRUCT, UPDATES, PruningOptions
from keras_woodfisher.pruning.agreement import agree
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.sensitivity_report import Sensitivity, SensitivityReport
from keras_woodfisher.reports.zeros import left_out_of

_GRADIENTS = 512
_LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)


@jointly
def sensitivity(  # noqa: PLR0913
    model: keras.Model,
    data: Any = None,
    levels: Sequence[float] = _LEVELS,
    *,
    eval_data: Any = None,
    num_examples: int | None = 1024,
    batch_size: int = 256,
    loss: Any = None,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    exclude: Sequence[str] = (),
    num_grads: int | None = None,
    grad_batch_size: int = 1,
    fisher: str = "empirical",
    damp: float | str = "auto",
    fisher_block_size: int | None = 2000,
    update: str = "joint",
    method: str = "woodfisher",
    available_gpus: str | Sequence[str] | None = None,
    memory_limit: int | str | None = None,
    grads_device: str = "cpu",
    grads_dtype: str = "float32",
    seed: int | None = 0,
    verbose: int = 1,
) -> SensitivityReport:
    """What the loss becomes when each variable alone is pruned to a few levels. The model is never changed.

    Gradients are sampled once and serve all variables and levels. The prediction is `1/2 delta^T F delta` summed over
    the blocks of a variable, for the change `delta` of pruned and corrected weights (Optimal Brain Surgeon's cost of a
    set). The measured loss is that of the model with the corrected variable in place. It takes a pass over the
    examples for each variable and level. With `method="reconstruct"` the variable is the sparse kernel whose output is
    nearest to the dense one on the dense model's inputs, by 1,024 examples of `data` at most; its error is told too.

        >>> report = kw.sensitivity(model, data=(x, y), levels=[0.5], num_grads=64, verbose=0)
        >>> [(entry.weights, entry.pruned) for entry in report.entries]
        [(32, 16), (48, 24)]

    Args:
        model: A built Keras model.
        data: Labelled examples to take gradients of, as in `prune`, or examples to reconstruct layers by, which need
            labels only if there is no `eval_data`. Not needed for magnitude pruning.
        levels: Sparsities of a variable, each in [0, 1).
        eval_data: Labelled examples to measure losses on, best ones that training didn't see; by default `data`.
        num_examples: How many of those to use, of arrays drawn with `seed`; fewer if there are no more. None: all.
        batch_size: Examples that losses are measured on at a time.
        loss: A Keras loss; by default the one that the model was compiled with.
        params: As in `prune`, like all that follow.
        exclude: Names and patterns to leave out.
        num_grads: Gradient samples (m); by default 512, or as many as arrays hold.
        grad_batch_size: Examples averaged into one sample (b).
        fisher: `"empirical"` or `"ggn"`.
        damp: Ridge on the Fisher's diagonal; `"auto"`: a tenth of its mean.
        fisher_block_size: Weights in one block (B); None means that each variable is one block.
        update: `"joint"` or `"independent"`.
        method: `"woodfisher"`, or `"magnitude"` or `"reconstruct"`, which predict nothing.
        available_gpus: Devices that share the inverse, or `"all"`: every GPU; none means the CPU.
        memory_limit: Bytes, or a text such as `"4GiB"`.
        grads_device: Where gradients are kept: `"cpu"`, `"disk"` or a device.
        grads_dtype: `"float32"` or `"float16"`.
        seed: Seed of the choice of examples from arrays.
        verbose: 0 silent, 1 progress bars, 2 one line a phase.

    Returns:
        An entry for each variable and level, and the loss without pruning; `print` or `plot` it.

    Raises:
        ValueError, TypeError, KeyError: If an argument is wrong or doesn't fit the model or the data.
        MemoryError: If the gradients don't fit (the message says how many would).
        FloatingPointError: If a weight, a score or the loss without pruning isn't finite.
    """
    arguments = dict(locals())
    wanted = _checked_levels(levels)
    one_of("update", update, UPDATES)
    # Blocks never span variables here: what they share would be corrected too.
    alone = {"global_sparsity": False, "fisher_block_size": fisher_block_size or sys.maxsize}
    rows_wanted = {"num_grads": _GRADIENTS if num_grads is None else num_grads}
    options = PruningOptions.of(**(PruningOptions.among(arguments) | alone | rows_wanted))
    pruner = Pruner(model, options)
    pruner.find_zeros()
    agree(model, pruner, wanted)
    if options.method != MAGNITUDE and data is None:
        raise ValueError(
            "sensitivity needs data to take gradients of, data=(x, y), or to reconstruct layers by, data=x, or "
            "whatever fit takes. Only method='magnitude' works with eval_data alone."
        )
    if data is None and eval_data is None:
        raise ValueError("sensitivity needs examples to measure losses on: give eval_data=(x, y), or data.")
    examples = open_examples(data) if options.method != MAGNITUDE or eval_data is None else None
    judged = examples if eval_data is None else open_examples(eval_data)
    assert judged is not None
    batches = read_batches(judged, num_examples, batch_size, seed)
    measured = _MeasuredLoss(model, pruner, loss, batches)
    source, rows = None, 0
    if options.second_order:
        assert examples is not None
        source = SampledGradients(model, pruner.targets, options, pruner.backend, examples, loss)
        rows = options.most_gradients
        if num_grads is None and source.available is not None:
            rows = max(1, min(rows, source.available))
        pruner.open_source(source, rows, [(rows, pruner.kept)])
    meter = Meter(pruner.backend, pruner.backend.devices(), options.verbose)
    dense = measured.dense_loss()
    found: list[list[Sensitivity]] = []
    if options.method == RECONSTRUCT:
        assert examples is not None
        changes: Any = reconstructed_changes(model, pruner, examples, meter)
    else:
        changes = single_changes(pruner, source, rows, meter)
    with pruner.workspace.memory_errors(), changes as (change, samples):
        for level in wanted:
            outcome = change(level)
            with meter.phase(f"loss at {level:g}", len(pruner.targets), "variable") as advance:
                row = []
                parts = zip(pruner.targets, pruner.zeros, *outcome, strict=True)
                for place, (target, zeros, weights, pruned, cost, *rest) in enumerate(parts):
                    count = int(pruned.sum())
                    # Where nothing new is pruned, nothing is corrected either.
                    loss_then = dense if count == zeros else measured.loss_with(place, weights, pruned)
                    row.append(Sensitivity(target.name, target.size, level, count, cost, loss_then - dense, *rest))
                    advance()
            found.append(row)
    entries = tuple(entry for entries in zip(*found, strict=True) for entry in entries)
    return SensitivityReport(
        entries,
        wanted,
        dense,
        sum(map(length, batches)),
        samples,
        tuple(meter.phases),
        left_out_of(model, pruner.targets, options.params, options.exclude),
        () if source is None or source.slow_layers is None else (source.slow_layers,),
    )


class _MeasuredLoss:
    """Measures the model's loss with one variable changed; the model itself isn't."""

    def __init__(self, model: keras.Model, pruner: Pruner, loss: Any, batches: list[Batch]):
        if loss is None and not has_loss(model):
            raise ValueError(
                f"The model {model.name!r} isn't compiled with a loss, so there is nothing to measure. Compile it, or "
                "give `loss=`."
            )
        self._targets = pruner.targets
        self._batches = batches
        of = ModelLoss(model, pruner.targets, loss)
        of.probe(map_arrays(lambda array: array[None, :1], batches[0]))
        self._values, _ = of.values()
        self._loss = MeanLoss(of, pruner.backend.compiled)

    def dense_loss(self) -> float:
        """The loss of the model as it is.

        Raises:
            FloatingPointError: If it isn't finite.
        """
        found = self._loss(self._values, self._batches)
        if not np.isfinite(found):
            raise FloatingPointError(
                f"The loss of the model as it is is {found}, so there is nothing to compare with. Look at the examples "
                "and at the model's outputs on them."
            )
        return found

    def loss_with(self, place: int, flat: np.ndarray, pruned: np.ndarray) -> float:
        """The loss with other weights of the variable at `place`, in weight order, some of which are `pruned`."""
        target = self._targets[place]
        values = ops.convert_to_tensor(np.ascontiguousarray(target.unflatten(flat)), dtype=target.variable.dtype)
        if target.constraint is not None:
            values = ops.convert_to_tensor(target.constrained(values, target.unflatten(pruned)))
        others = self._values[:place], self._values[place + 1 :]
        return self._loss([*others[0], values, *others[1]], self._batches)


def _checked_levels(levels: Any) -> tuple[float, ...]:
    """From the lowest to the highest.

    Raises:
        TypeError: If it isn't a sequence of numbers.
        ValueError: If one isn't a sparsity, comes twice, or there is none.
    """
    if isinstance(levels, str) or not isinstance(levels, (Sequence, np.ndarray)):
        raise TypeError(f"levels must be a list of sparsities such as {list(_LEVELS)}, got {levels!r}.")
    found = tuple(sorted(fraction("a level", level) for level in levels))
    if not found or len(set(found)) < len(found):
        raise ValueError(f"levels must be sparsities that differ, at least one, got {list(levels)!r}.")
    return found
