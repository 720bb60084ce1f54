"""`reconstruct`: the kept weights of a model that is pruned already, fitted to the dense model."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.engines import assign_whole
from keras_woodfisher_backends.ranks.joint import jointly

from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.model.restoring import restored
from keras_woodfisher.model.targets import Target, find_targets
from keras_woodfisher.model.weight_copies import copies_follow
from keras_woodfisher.oneshot.reconstruction.allocation import GivenMasks
from keras_woodfisher.oneshot.reconstruction.pruning import Examined, effort_of
from keras_woodfisher.options.pruning_options import RECONSTRUCT, PruningOptions
from keras_woodfisher.pruning.agreement import agree
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.pruning_report import PruningReport
from keras_woodfisher.reports.zeros import count_zeros, left_out_of

_LISTED = 3


@jointly
def reconstruct(  # noqa: PLR0913
    model: keras.Model,
    data: Any,
    *,
    dense: keras.Model,
    params: str | Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    num_examples: int | None = None,
    memory_limit: int | str | None = None,
    seed: int | None = 0,
    verbose: int = 1,
) -> PruningReport:
    """Fits the weights that a pruned model has kept to the dense model that it was pruned from.

    Whatever pruned it, its zeros stay. Layer after layer, in the order of calls, the kept weights of a layer W become
    those that minimise `|X W - T|^2 + 0.001 mu |W - W_dense|^2`: X are the inputs that the layer gets in the pruned
    model, T what the dense layer gives on its own, and mu is the mean of the sums of squares of the inputs. No labels,
    no loss and no gradients are needed, and BatchNorm isn't touched. `prune(method="reconstruct")` chooses the zeros
    too.

        >>> pruned = keras.models.clone_model(model)
        >>> pruned.set_weights(model.get_weights())
        >>> report = kw.prune(pruned, sparsity=0.5, method="magnitude", verbose=0)
        >>> report = kw.reconstruct(pruned, x, dense=model, verbose=0)
        >>> report.sparsity, len(report.reconstruction.layers)
        (0.5, 2)

    Args:
        model: The pruned model, which is changed.
        data: Examples without labels: whatever `fit` takes (labels are ignored), or a callable that returns a fresh
            iterator of batches.
        dense: The same model before it was pruned; all weights but those in `params` must be the same in both.
        params: The variables to fit, as in `prune`.
        exclude: Names and patterns to leave out.
        num_examples: How many examples to use at most, by default 1,024.
        memory_limit: Bytes, or a text such as `"4GiB"`; by default a quarter of what is free.
        seed: Seed of the choice of examples from arrays.
        verbose: 0 silent, 1 a progress bar, 2 one line.

    Returns:
        The zeros, and the error of each layer's output; `print` it.

    Raises:
        ValueError, TypeError, KeyError: If an argument is wrong, or the models don't fit together.
        MemoryError: If the work doesn't fit into memory.
        FloatingPointError: If what a layer gets or gives isn't finite. Nothing is changed then.
    """
    options = PruningOptions.of(
        params=params, exclude=exclude, memory_limit=memory_limit, seed=seed, verbose=verbose, method=RECONSTRUCT
    )
    effort = effort_of("balanced", num_examples, RECONSTRUCT)
    assert effort is not None
    pruner = Pruner(dense, options)
    ranks = pruner.ranks
    for one in (model, dense):
        agree(one, pruner, num_examples)
    targets = find_targets(model, options.params, options.exclude)
    _check_alike(model, dense, targets, pruner.targets)
    masks = {
        id(target.variable): keras.ops.convert_to_numpy(pruned.variable) != 0
        for target, pruned in zip(pruner.targets, targets, strict=True)
    }
    meter = Meter(pruner.backend, pruner.backend.devices(), options.verbose)
    work = Examined(dense, pruner, open_examples(data), effort.num_examples)
    done, report = work.reconstruct(GivenMasks(masks), "given", meter)
    variables = [target.variable for target in targets]
    with restored(variables, only_on_failure=True), copies_follow(model, variables):
        for target, kernel in zip(targets, ranks.from_first(done), strict=True):
            if not np.isfinite(kernel).all():
                raise FloatingPointError(f"The new weights of {target.name!r} aren't finite; nothing was changed.")
            assign_whole(target.variable, kernel)
        ranks.settle()
    settings = {"method": RECONSTRUCT, "num_examples": effort.num_examples, "seed": options.seed}
    left_out = left_out_of(model, targets, options.params, options.exclude)
    phases = tuple(meter.phases)
    zeros = count_zeros(targets)
    return PruningReport(zeros, phases, settings=settings, reconstruction=report, left_out=left_out)


def _check_alike(model: keras.Model, dense: keras.Model, targets: Sequence[Target], others: Sequence[Target]) -> None:
    """Refuses two models that differ in more than the kernels.

    Raises:
        ValueError: If they do.
    """
    if model is dense:
        raise ValueError("model and dense are the same model. Give the model before it was pruned as dense.")
    shapes = [[tuple(v.shape) for v in variables] for variables in (model.weights, dense.weights)]
    if shapes[0] != shapes[1] or [t.variable.shape for t in targets] != [t.variable.shape for t in others]:
        raise ValueError(
            f"The models {model.name!r} and {dense.name!r} have weights of other shapes. Give the same model before it "
            "was pruned as dense."
        )
    fitted = {id(target.variable) for target in targets}
    pairs = [(one, other) for one, other in zip(model.weights, dense.weights, strict=True) if id(one) not in fitted]
    wrong = [one.path for one, other in pairs if not np.array_equal(*map(keras.ops.convert_to_numpy, (one, other)))]
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise ValueError(
            f"The models differ in more than what is fitted: {', '.join(wrong[:_LISTED])}{more}. Give the model that "
            "this one was pruned from as dense; one that was trained after pruning can't be fitted to it."
        )
