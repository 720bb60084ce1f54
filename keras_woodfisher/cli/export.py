"""`keras-woodfisher export`: a model for another runtime, checked by it."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import keras

import keras_woodfisher as kw
from keras_woodfisher.cli import files, paths
from keras_woodfisher.cli.answer import Answer
from keras_woodfisher.cli.arrays import load_data
from keras_woodfisher.deployment.exporting.formats import FORMATS, check_available, format_of


def run(args: Namespace) -> Answer:
    """Exports `args.model` to `args.out`."""
    name = format_of(Path(args.out), None)
    if FORMATS[name].ending:
        paths.check_output(args.out, (FORMATS[name].ending,), args.force, paths.size_of(args.model))
    elif os.path.lexists(args.out) and not args.force:
        raise FileExistsError(f"{args.out} exists. Give another name, or --force to overwrite it.")
    check_available(name)
    model = files.load_model(args.model, compile=False)
    data = load_data(args.data, model, labels=False)
    sparse = True if args.sparse else False if args.no_sparse else None
    options: dict[str, Any] = {"quantize": args.quantize, "sparse": sparse, "dense": args.dense}
    report = kw.export(model, args.out, data.x, data.y, **options)
    document = {"command": "export", "model": args.model, "out": args.out, "report": report.as_dict()}
    return Answer(f"{report}\n\nWrote {args.out}.", document | {"backend": keras.backend.backend()})
