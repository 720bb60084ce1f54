"""One-shot pruning: no training, no compiled model needed."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import keras
from keras_woodfisher_backends.keras_internals.engines import assign_whole
from keras_woodfisher_backends.ranks.joint import jointly

from keras_woodfisher.model.examples import open_examples
from keras_woodfisher.model.weight_copies import copies_follow
from keras_woodfisher.oneshot.batchnorm import reestimation_of
from keras_woodfisher.oneshot.reconstruction.pruning import ReconstructionWork
from keras_woodfisher.oneshot.request import Request
from keras_woodfisher.oneshot.staged_work import StagedWork
from keras_woodfisher.pruning.agreement import agree, average_statistics
from keras_woodfisher.pruning.collapse import Collapse
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.layer_report import ReconstructionReport
from keras_woodfisher.reports.meter import Meter
from keras_woodfisher.reports.pruning_report import PruningReport
from keras_woodfisher.reports.stage_report import StageReport, merged
from keras_woodfisher.reports.zeros import count_zeros, left_out_of

_DONT_REESTIMATE = (
    "Reconstruction fits the weights to the BatchNorm statistics that are there. Measured anew afterwards on augmented "
    "images, they made a ResNet-20 no better: 83.4 % became 83.0 % at sparsity 0.9. Leave reestimate_batchnorm out."
)


class Work(Protocol):
    """How the sparsities are reached."""

    def run(self) -> tuple[list[StageReport], ReconstructionReport | None]:
        """Does it, and tells what was done."""
        ...


@jointly
def prune(  # noqa: PLR0913
    model: keras.Model,
    data: Any = None,
    sparsity: float | Mapping[float, Sequence[str]] = 0.5,
    *,
    loss: Any = None,
    params: str | Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    global_sparsity: bool | None = None,
    quality: str = "balanced",
    stages: int | None = None,
    num_grads: int | Mapping[float, int] | None = None,
    grad_batch_size: int | None = None,
    fisher: str | None = None,
    damp: float | str | None = None,
    fisher_block_size: int | None = 2000,
    update: str | None = None,
    calibration: Any = None,
    newton_steps: int | None = None,
    method: str | None = None,
    num_examples: int | None = None,
    mask_type: str | Sequence[int] = "unstructured",
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
    zero already count as pruned (but for a variable that is zero as a whole in a model that is dense otherwise: it
    isn't trained yet). BatchNorm isn't touched unless you ask for it. To train the pruned model further, use
    `keras_woodfisher.KeepZeros`.

        >>> report = kw.prune(model, data=x, sparsity=0.8, verbose=0)
        >>> report.sparsity, report.settings["method"]
        (0.8, 'reconstruct')

    Args:
        model: A built Keras model.
        data: Examples: whatever `fit` takes, or a callable that returns a fresh iterator of batches. Reconstruction
            needs no labels (`data=x`), magnitude pruning no data. Each stage of WoodFisher draws from arrays anew; a
            stream is read from its beginning, so let it shuffle.
        sparsity: Fraction of zeros to reach, in [0, 1); or `{fraction: names}`, which prunes each variable by itself
            to the fraction of the first name or `re:` pattern that matches it.
        loss: A Keras loss (name, object or function; a list or dictionary for several outputs). By default the loss
            that the model was compiled with.
        params: As in `WoodFisherPruning`, like all that follow.
        exclude: Names and patterns to leave out.
        global_sparsity: Rank all weights together, or each variable by itself.
        quality: How much work to spend: `"fast"` (WoodFisher in one stage, as in the papers), `"balanced"` or `"best"`
            (reconstruction; with `method="woodfisher"` several stages with Gauss-Newton samples, and corrections
            calibrated on held-out examples). It chooses the options below that aren't given; the report says what was
            used. With fewer than 200 examples all stages of WoodFisher are as with `"fast"`.
        stages: How many times new gradients are taken on the way to the sparsity; the kept fraction falls by the same
            factor each time. Where a later stage finds none but zeros, as of saturated nets, all is done in one.
        num_grads: Gradient samples of a stage (m), or as many as arrays hold; or `{sparsity: count}`: the count of the
            largest key that is at or below the sparsity that the model has.
        grad_batch_size: Examples in one sample (b).
        fisher: `"empirical"`: samples are gradients of the loss, as in the papers; `"ggn"`: rows of an unbiased sketch
            of the Gauss-Newton matrix, for (sparse) categorical and binary cross-entropy and mean squared error.
        damp: Ridge on the Fisher's diagonal, in units of squared gradient; `"auto"`: as in `WoodFisherPruning`, and for
            calibrated corrections the best of several.
        fisher_block_size: Weights in one block (B); None means one block over everything.
        update: `"joint"` or `"independent"`, block by block; or `"calibrated"`: over all weights that are kept, with
            the damping that gives the lowest loss on held-out examples.
        calibration: How many examples of `data` to hold out for that: of arrays they are drawn, of streams the first
            ones, known by their content at each later reading (of several examples with the same content as many are
            left out as were held out). Or other labelled examples, 5,000 at most.
        newton_steps: How many damped Newton steps on the loss itself calibrated corrections may make in each stage,
            each with a new gradient, as long as they help on the held-out examples. None by default where BatchNorm is
            re-estimated, which would undo them.
        method: `"reconstruct"`: layer after layer, the sparse kernel whose output is nearest to the dense layer's, by
            `num_examples` examples without labels (see `keras_woodfisher.reports.layer_report`); `"woodfisher"`: by
            gradients of the loss; `"magnitude"`. By default `"reconstruct"`, but `"woodfisher"` with `quality="fast"`
            and where one of the options above is given.
        num_examples: How many examples reconstruction uses at most: by default 256, 1,024 or 8,192, by `quality`.
        mask_type: `"unstructured"`, `"N:M"` such as `"2:4"`, `"block4"`, `[a, b]`, `"filter"` or `"channel"`.
        available_gpus: Devices that share the inverse, or `"all"`: every GPU; none means the CPU. Reconstruction uses
            the first one for large products, by default the first GPU there is.
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
    request = Request(locals())
    examples = request.open_examples()
    settings, notes = request.settle(model, examples)
    pruner = Pruner(model, request.options)
    finals = request.finals(pruner.targets)
    pruner.find_zeros()
    if text := agree(model, pruner, finals, settings):
        notes += (text,)
    collapse = Collapse(pruner.targets)
    if not pruner.prunes(finals):
        notes += (f"nothing was left to prune: the chosen weights were at sparsity {pruner.sparsity:.4f} before.",)
    meter = Meter(pruner.backend, pruner.backend.devices(), request.options.verbose)
    if request.effort is None or examples is None:
        work: Work = StagedWork(pruner, model, examples, loss, finals, settings, request.given)
    else:
        work = ReconstructionWork(model, pruner, examples, finals, request.effort, meter)
    reestimation = reestimation_of(model, reestimate_batchnorm, examples, loss, seed, meter)
    if request.effort is not None and reestimation is not None:
        warnings.warn(_DONT_REESTIMATE, stacklevel=3)
    batchnorm = None
    with pruner.all_or_nothing(), copies_follow(model, [target.variable for target in pruner.targets]):
        done, reconstruction = work.run()
        if isinstance(work, StagedWork):
            settings = work.settings
        if _constrain(pruner) and reconstruction is not None:
            notes += ("constraints of weights were applied after the distances and errors were measured",)
        if reestimation is not None:
            with meter.phase("batchnorm", reestimation.total, "layer") as advance:
                batchnorm = reestimation.run(advance)
            average_statistics(model, pruner.ranks)
        # Magnitude pruning reads data only for this.
        warned = collapse.news(model, lambda: examples if examples is not None or data is None else open_examples(data))
    for text in warned:
        warnings.warn(text, stacklevel=3)
    notes += tuple(text for text in (*(stage.note for stage in done), collapse.constant, pruner.note) if text)
    return PruningReport(
        count_zeros(pruner.targets),
        merged([phase for stage in done for phase in stage.phases] + meter.phases),
        sum(stage.samples for stage in done),
        notes,
        tuple(done),
        request.report(settings),
        batchnorm,
        reconstruction,
        left_out_of(model, pruner.targets, request.options.params, request.options.exclude),
    )


def _constrain(pruner: Pruner) -> bool:
    """Applies the weights' own constraints, which corrections may have broken, if there are any; zeros stay."""
    found = False
    for target, pruned in zip(pruner.targets, pruner.masks(), strict=True):
        if target.constraint is not None:
            assign_whole(target.variable, target.constrained(target.variable, pruned))
            found = True
    return found
