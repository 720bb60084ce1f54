"""`keras-woodfisher sensitivity`: what pruning each variable alone does to the loss."""

from argparse import Namespace
from typing import Any

import keras

import keras_woodfisher as kw
from keras_woodfisher.cli import files, paths
from keras_woodfisher.cli.answer import Answer
from keras_woodfisher.cli.arrays import load_data
from keras_woodfisher.cli.losses import check_labels, needed_loss
from keras_woodfisher.cli.prune import labelled_examples, options_of, verbosity
from keras_woodfisher.deployment.whole_files import write_whole
from keras_woodfisher.options.pruning_options import RECONSTRUCT
from keras_woodfisher.reports.rendering import load_pyplot


def run(args: Namespace) -> Answer:
    """Measures `args.model`, which isn't changed."""
    if args.plot:
        paths.check_output(args.plot, (".png", ".svg", ".pdf"), args.force)
        load_pyplot()
    model = files.load_model(args.model)
    # Reconstruction looks at inputs alone, and losses are measured on other examples where there are any.
    labelled = args.method != RECONSTRUCT or not args.eval
    data = load_data(args.data, model, labelled) if args.data else None
    held_out = load_data(args.eval, model) if args.eval else None
    judged = data if labelled else None
    examples: Any = labelled_examples(judged, held_out)
    loss = needed_loss(model, args.loss, "--data" if judged else "--eval", examples)
    check_labels(args.data, model, loss, judged)
    check_labels(args.eval, model, loss, held_out)
    report = kw.sensitivity(model, data, eval_data=held_out, loss=loss, **options_of(args), verbose=verbosity(args))
    text = str(report)
    if args.plot:
        write_whole(args.plot, report.plot().figure.savefig)
        text += f"\n\nWrote {args.plot}."
    document = {"command": "sensitivity", "model": args.model, "backend": keras.backend.backend(), "plot": args.plot}
    return Answer(text, {**document, **report.as_dict()})
