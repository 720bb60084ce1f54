"""`keras-woodfisher convert`: an old recipe in the form that this package writes."""

from argparse import Namespace

from keras_woodfisher.cli import files, paths
from keras_woodfisher.cli.answer import Answer
from keras_woodfisher.deployment.whole_files import write_whole


def run(args: Namespace) -> Answer:
    """Rewrites `args.old` as `args.new`."""
    paths.check_output(args.new, (".yaml", ".yml"), args.force)
    recipe = files.load_recipe(args.old, None)
    write_whole(args.new, recipe.save)
    return Answer(f"Wrote {args.new}.", {"command": "convert", "old": args.old, "new": args.new})
