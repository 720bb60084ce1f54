"""One-shot pruning: no training, no compiled model needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_woodfisher.batchnorm import reestimation_of
from keras_woodfisher.levels import arguments_of, checked_levels, finals_of
from keras_woodfisher.meter import Meter
from keras_woodfisher.options import PruningOptions, fraction
from keras_woodfisher.pruner import Pruner
from keras_woodfisher.report import PruningReport, count_zeros
from keras_woodfisher.restoring import restored_on_failure
from keras_woodfisher.sources import SampledGradients

_DEFAULT_GRADIENTS = 512


def prune(
    model: keras.Model,
    data: Any = None,
    sparsity: float | Mapping[float, Sequence[str]] = 0.5,
    *,
    loss: Any = None,
    params: str | Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    global_sparsity: bool | None = None,
    num_grads: int | None = None,
    grad_batch_size: int = 1,
    damp: float = 1e-5,
    fisher_block_size: int | None = 2000,
    update: str = "joint",
    method: str = "woodfisher",
    available_gpus: str | Sequence[str] | None = None,
    memory_limit: int | str | None = None,
    grads_device: str = "cpu",
    grads_dtype: str = "float32",
    num_pages: int = 1,
    reestimate_batchnorm: Any = False,
    seed: int | None = 0,
    verbose: int = 1,
) -> PruningReport:
    """Prunes a trained model in place, without training it.

    The model is changed only after everything was computed: if anything fails, it is as before. Weights that are
    zero already count as pruned. BatchNorm isn't touched unless you ask for it. To train the pruned model further, use
    `keras_woodfisher.KeepZeros`.

        >>> import keras_woodfisher as kw
        >>> report = kw.prune(model, data=(x, y), sparsity=0.8)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP

    Args:
        model: A built Keras model.
        data: Labelled examples: whatever `fit` takes, or a callable that returns a fresh iterator of batches. Not
            needed for magnitude pruning.
        sparsity: Fraction of zeros to reach, in [0, 1); or `{fraction: names}`, which prunes each variable by itself
            to the fraction of the first name or `re:` pattern that matches it.
        loss: A Keras loss (name, object or function; a list or dictionary for several outputs). By default the loss
            that the model was compiled with.
        params: As in `WoodFisherPruning`, like all that follow.
        exclude: Names and patterns to leave out.
        global_sparsity: Rank all weights together, or each variable by itself.
        num_grads: Gradient samples (m); by default 512, or as many as arrays hold.
        grad_batch_size: Examples averaged into one sample (b).
        damp: Ridge on the Fisher's diagonal.
        fisher_block_size: Weights in one block (B); None means one block over everything.
        update: `"joint"` or `"independent"`.
        method: `"woodfisher"` or `"magnitude"`.
        available_gpus: Devices that share the inverse, or `"all"`: every GPU; none means the CPU.
        memory_limit: Bytes, or a text such as `"4GiB"`.
        grads_device: Where gradients are kept: `"cpu"`, `"disk"` or a device.
        grads_dtype: `"float32"` or `"float16"`.
        num_pages: Pages of the gradients, where one block spans everything.
        reestimate_batchnorm: True measures the moving statistics of BatchNorm layers anew after pruning, on up to 2048
            examples of `data`; or examples to use instead. They must be training examples *with the training's
            augmentation*, and the dense model's loss is compared first: a warning says if it gets worse. See
            `keras_woodfisher.reestimate_batchnorm`.
        seed: Seed of the choice of examples from arrays.
        verbose: 0 silent, 1 a progress bar, 2 one line a phase.

    Returns:
        What was pruned, with seconds and peak memory of each phase; `print` it.

    Raises:
        ValueError, TypeError, KeyError: If an argument is wrong or doesn't fit the model or the data.
        MemoryError: If the gradients don't fit (the message says how many would).
        FloatingPointError: If a weight or score isn't finite.
    """
    levels = checked_levels(sparsity) if isinstance(sparsity, Mapping) else None
    final = 0.0 if isinstance(sparsity, Mapping) else fraction("sparsity", sparsity)
    if levels is not None:
        params, global_sparsity = arguments_of(levels, params, global_sparsity)
    options = PruningOptions(
        params="__ALL_PRUNABLE__" if params is None else params,  # type: ignore[arg-type]
        exclude=exclude,  # type: ignore[arg-type]
        method=method,
        update=update,
        global_sparsity=True if global_sparsity is None else global_sparsity,
        num_grads=_DEFAULT_GRADIENTS if num_grads is None else num_grads,
        grad_batch_size=grad_batch_size,
        damp=damp,
        fisher_block_size=fisher_block_size,
        available_gpus=available_gpus,  # type: ignore[arg-type]
        memory_limit=memory_limit,
        grads_device=grads_device,
        grads_dtype=grads_dtype,
        num_pages=num_pages,
        seed=seed,
        verbose=verbose,
    )
    pruner = Pruner(model, options)
    finals = [final] * len(pruner.targets) if levels is None else finals_of(pruner.targets, levels)
    pruner.find_zeros()
    rows = options.gradients_at(pruner.sparsity)
    source = None
    if options.method == "woodfisher":
        if data is None:
            raise ValueError(
                "prune needs data to take gradients of: data=(x, y), or whatever fit takes. "
                "Only method='magnitude' works without."
            )
        source = SampledGradients(model, pruner.targets, options, pruner.backend, data, loss)
        if num_grads is None and source.available is not None:
            rows = max(1, min(rows, source.available))
        source.check(rows)
        kept = sum(p.size - zeros for p, zeros in zip(pruner.pruned, pruner.zeros, strict=True))
        if pruner.prunes(finals):
            pruner.plan_memory(source.footprint(rows), [(rows, kept)])
    meter = Meter(pruner.backend, pruner.backend.devices(), options.verbose)
    reestimation = reestimation_of(model, reestimate_batchnorm, data, loss, seed, meter)
    batchnorm = None
    with restored_on_failure([target.variable for target in pruner.targets]):
        phases, samples = pruner.update(finals, source, rows)
        _constrain(pruner)
        if reestimation is not None:
            with meter.phase("batchnorm", reestimation.total, "layer") as advance:
                batchnorm = reestimation.run(advance)
    return PruningReport(count_zeros(pruner.targets), (*phases, *meter.phases), samples, batchnorm=batchnorm)


def _constrain(pruner: Pruner) -> None:
    """Applies the weights' own constraints, which corrections may have broken; zeros stay."""
    for target, pruned in zip(pruner.targets, pruner.masks(), strict=True):
        if target.variable.constraint is not None:
            target.variable.assign(target.constrained(target.variable, pruned))
