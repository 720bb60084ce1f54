"""`keras-woodfisher prune`: loads, prunes (and trains, where epochs are asked for), measures and saves."""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

import keras_woodfisher as kw
from keras_woodfisher.cli import files, paths
from keras_woodfisher.cli.answer import Answer, table
from keras_woodfisher.cli.arrays import Data, load_data
from keras_woodfisher.cli.losses import Evaluation, check_labels, needed_loss
from keras_woodfisher.deployment.saving.archive import sizes_of
from keras_woodfisher.deployment.whole_files import write_whole
from keras_woodfisher.oneshot.presets import CHOSEN, OF_GRADIENTS, method_of
from keras_woodfisher.options.pruning_options import WOODFISHER
from keras_woodfisher.options.table import on_command_line
from keras_woodfisher.recipe.matching import considered
from keras_woodfisher.recipe.modifiers.pruning import WoodFisherPruningModifier
from keras_woodfisher.recipe.modifiers.reconstruction import PRUNING
from keras_woodfisher.recipe.one_shot_callback import OneShotPruning
from keras_woodfisher.reports.left_out import LeftOut
from keras_woodfisher.reports.pruning_report import combined
from keras_woodfisher.reports.zeros import count_zeros

_BATCH_SIZE = 64
_LEARNING_RATE = 1e-4


def run(args: Namespace) -> Answer:
    """Prunes `args.model` into `args.out`."""
    start = time.perf_counter()
    paths.check_output(args.out, (".keras",), args.force, paths.size_of(args.model))
    recipe = files.load_recipe(args.recipe, args.var) if args.recipe else None
    model = files.load_model(args.model)
    labelled = bool(args.epochs) or _takes_gradients(args, recipe)
    data = load_data(args.data, model, labelled) if args.data else None
    held_out = load_data(args.eval, model) if args.eval else None
    batchnorm = _batchnorm(args, model)
    loss = _loss(args, model, labelled, labelled_examples(data, held_out, batchnorm.get("reestimate_batchnorm")))
    check_labels(args.data, model, loss, data if labelled else None)
    check_labels(args.eval, model, loss, held_out)
    if isinstance(again := batchnorm.get("reestimate_batchnorm"), Data):
        check_labels(args.reestimate_batchnorm, model, loss, again)
    keras.utils.set_random_seed(args.seed % 2**32)
    measured = Evaluation(model, loss, held_out, args.batch_size or _BATCH_SIZE).measure if held_out else dict
    before = measured()
    if args.epochs:
        report = _fine_tune(args, model, data, loss, recipe, batchnorm)
    elif recipe is not None:
        report = recipe.apply(model, data, loss=loss, verbose=verbosity(args))
    else:
        report = _one_shot(args, model, data, loss, batchnorm)
    after = measured()
    if args.uncompressed:
        write_whole(args.out, model.save)
    else:
        kw.save(model, args.out)
    return _answer(args, report, (before, after), time.perf_counter() - start)


def labelled_examples(*found: Any) -> Data | None:
    """The first examples that have labels."""
    return next((data for data in found if isinstance(data, Data) and data.y is not None), None)


def verbosity(args: Namespace) -> int:
    """0 silent, 1 bars for a terminal, 2 lines for a file; a program that reads JSON wants neither."""
    if args.quiet or args.json:
        return 0
    return 1 if sys.stderr.isatty() else 2


def _loss(args: Namespace, model: keras.Model, labelled: bool, examples: Data | None) -> Any:
    """The loss to use instead of the compiled one, if any; options that would be without effect are refused."""
    if args.epochs and model.compiled and (args.loss or args.learning_rate):
        option = "--loss" if args.loss else "--learning-rate"
        raise ValueError(
            f"{option} has no effect: the model is compiled, and trains with its own loss and optimizer. Leave it "
            "out, or save the model without compiling it."
        )
    if examples is None or not (args.loss or labelled or args.eval or args.reestimate_batchnorm):
        return None
    why = "--data" if labelled and args.data else "--eval" if args.eval else "--reestimate-batchnorm"
    return needed_loss(model, args.loss, why, examples)


def _takes_gradients(args: Namespace, recipe: kw.Recipe | None) -> bool:
    """Whether one shot needs labels and a loss."""
    if recipe is not None:
        return any(isinstance(modifier, WoodFisherPruningModifier) for modifier in recipe.modifiers)
    given = {row.name: getattr(args, row.name_in(args.command)) for row in on_command_line(args.command)}
    of_gradients = {
        name: value for name, value in given.items() if name in (*CHOSEN, *OF_GRADIENTS, "num_recomputations")
    }
    return method_of(args.method, args.quality or "balanced", of_gradients) == WOODFISHER


def options_of(args: Namespace) -> dict[str, Any]:
    """What the function that a command calls is given beyond its own defaults."""
    names = [row.name_in(args.command) for row in on_command_line(args.command)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return given | _params_of(args) | {"seed": args.seed}


def _batchnorm(args: Namespace, model: keras.Model) -> dict[str, Any]:
    """Whether statistics are measured anew, and on what."""
    wanted = args.reestimate_batchnorm
    return {} if wanted is None else {"reestimate_batchnorm": wanted is True or load_data(wanted, model)}


def _params_of(args: Namespace) -> dict[str, Any]:
    return {"params": args.params} if args.params else {}


def _one_shot(args: Namespace, model: keras.Model, data: Any, loss: Any, batchnorm: dict[str, Any]) -> kw.PruningReport:
    return kw.prune(model, data, args.sparsity, loss=loss, verbose=verbosity(args), **options_of(args) | batchnorm)


def _fine_tune(
    args: Namespace, model: keras.Model, data: Any, loss: Any, recipe: Any, batchnorm: dict[str, Any]
) -> kw.PruningReport:
    """Trains with the recipe's callbacks, or holds the zeros of one shot."""
    batch_size = args.batch_size or _BATCH_SIZE
    report = None
    if not model.compiled:
        model.compile(keras.optimizers.Adam(args.learning_rate or _LEARNING_RATE), loss)
    if recipe is not None:
        steps = math.ceil(data.examples / batch_size)
        check = kw.check_recipe(recipe, model, steps, args.epochs, data=data, loss=loss, verbose=0)
        if check.problems:
            raise ValueError("The recipe doesn't fit: " + " ".join(map(str, check.problems)))
        callbacks = recipe.callbacks(model, data=data, verbose=verbosity(args))
    else:
        report = _one_shot(args, model, data, loss, batchnorm)
        callbacks = [kw.KeepZeros(**_params_of(args), exclude=args.exclude or ())]
    training = {"epochs": args.epochs, "batch_size": batch_size, "callbacks": callbacks, "verbose": verbosity(args)}
    model.fit(data.x, data.y, sample_weight=data.sample_weight, **training)
    if report is not None:
        return report
    pruning = [callback for callback in callbacks if isinstance(callback, (kw.WoodFisherPruning, OneShotPruning))]
    return combined([callback.report() for callback in pruning], *_considered(recipe, model))


def _considered(recipe: Any, model: keras.Model) -> tuple[tuple[kw.VariableReport, ...], LeftOut]:
    """The variables that a recipe is about, and the others."""
    modifiers = [modifier for modifier in recipe.modifiers if isinstance(modifier, PRUNING)]
    if not modifiers:
        report = kw.sparsity_report(model)
        return report.variables, report.left_out
    chosen, left_out = considered(modifiers, model)
    return count_zeros(chosen), left_out


def _answer(args: Namespace, report: kw.PruningReport, measured: tuple[Mapping, Mapping], seconds: float) -> Answer:
    before, after = measured
    size, unpacked = sizes_of(args.out)
    document = {
        "command": "prune",
        "model": args.model,
        "out": args.out,
        "out_bytes": size,
        "unpacked_bytes": unpacked,
        "backend": keras.backend.backend(),
        "epochs": args.epochs or 0,
        "seconds": seconds,
        "report": report.as_dict(),
        "evaluation": {"before": before, "after": after} if args.eval else None,
    }
    lines = [str(report)]
    if args.eval:
        rows = [(name, f"{before[name]:.4f}", f"{after[name]:.4f}") for name in before]
        lines += ["", table((f"on {Path(args.eval).name}", "before", "after"), rows)]
    lines += [
        "",
        f"Wrote {args.out} ({size / 2**20:.2f} MiB, {unpacked / 2**20:.2f} MiB unpacked) after {seconds:.0f} s.",
    ]
    return Answer("\n".join(lines), document)
