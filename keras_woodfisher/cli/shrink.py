"""`keras-woodfisher shrink`: a pruned model with smaller layers, which computes the same."""

from argparse import Namespace

import keras_woodfisher as kw
from keras_woodfisher.cli import files, paths
from keras_woodfisher.cli.answer import Answer


def run(args: Namespace) -> Answer:
    """Writes a smaller `args.model` as `args.out`."""
    before = paths.size_of(args.model)
    paths.check_output(args.out, (".keras",), args.force, before)
    model = files.load_model(args.model)
    report = kw.shrink_report(model)
    small = kw.shrink(model)
    kw.save(small, args.out)
    after = paths.size_of(args.out)
    names = {"command": "shrink", "model": args.model, "out": args.out}
    document = {**names, "bytes": before, "out_bytes": after, "report": report.as_dict()}
    return Answer(f"{report}\nWrote {args.out} ({after:,} bytes of {before:,}).", document)
