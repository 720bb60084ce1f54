"""Several stages within one update, each with new gradients at the weights that the last one left."""

from collections.abc import Callable, Sequence

from keras_woodfisher.gradients.sources import GradientSource
from keras_woodfisher.pruning.corrections import Corrector
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.reports.meter import say
from keras_woodfisher.reports.pruning_report import StageReport


def stage_sparsities(now: float, final: float, stages: int) -> list[float]:
    """Sparsities whose kept fraction falls geometrically.

    >>> [round(sparsity, 4) for sparsity in stage_sparsities(0.0, 0.936, 3)]
    [0.6, 0.84, 0.936]
    >>> stage_sparsities(0.5, 0.5, 2)
    [0.5, 0.5]

    Args:
        now: Sparsity before the first stage.
        final: Sparsity after the last one.
        stages: How many there are.
    """
    if final <= now:
        return [final] * stages
    ratio = (1.0 - final) / (1.0 - now)
    # The last one exactly: it decides how many weights are zero.
    return [1.0 - (1.0 - now) * ratio ** (stage / stages) for stage in range(1, stages)] + [final]


def update_in_stages(
    pruner: Pruner,
    sparsity: Sequence[float],
    source: GradientSource | None,
    rows: Callable[[float], int],
    stages: int,
    draw: int = 0,
    corrector: Corrector | None = None,
    verbose: int = 0,
) -> list[StageReport]:
    """Prunes to a sparsity in stages; if one fails or is interrupted, all is as before the first.

    Args:
        pruner: Does each stage.
        sparsity: As in `Pruner.update`, like all that follow.
        source: Where gradients come from.
        rows: How many samples a stage uses, as a function of the sparsity before it.
        stages: How many stages there are.
        draw: Number of the update.
        corrector: How the weights that stay are corrected.
        verbose: Whether stages are announced.

    Returns:
        One report a stage that pruned anything.
    """
    levels = zip(
        *(stage_sparsities(now, final, stages) for now, final in zip(pruner.reached, sparsity, strict=True)),
        strict=True,
    )
    done = []
    with pruner.all_or_nothing():
        for stage, level in enumerate(levels):
            if not pruner.prunes(level):
                continue
            if verbose and stages > 1:
                say(f"WoodFisher pruning: stage {stage + 1} of {stages}")
            done.append(pruner.update(level, source, rows(pruner.sparsity), draw * stages + stage, corrector))
    return done
