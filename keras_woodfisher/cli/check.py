"""`keras-woodfisher check`: a recipe against a model, before any training."""

from argparse import Namespace

import keras_woodfisher as kw
from keras_woodfisher.cli import files
from keras_woodfisher.cli.answer import Answer
from keras_woodfisher.cli.arrays import load_data
from keras_woodfisher.cli.losses import needed_loss, read_loss
from keras_woodfisher.recipe.callbacks import samples


def run(args: Namespace) -> Answer:
    """Checks `args.recipe`; the exit code is 1 if there are problems."""
    loss = read_loss(args.loss) if args.loss else None
    recipe = files.load_recipe(args.recipe, args.var)
    model = files.load_model(args.model)
    labelled = any(samples(modifier, args.data) for modifier in recipe.modifiers)
    data = load_data(args.data, model, labelled) if args.data else None
    if args.loss and data is not None and data.y is not None:
        loss = needed_loss(model, args.loss, "--data", data)
    asked = {"ranks": args.ranks, "hosts": args.hosts}
    result = kw.check_recipe(recipe, model, args.steps_per_epoch, args.epochs, data=data, loss=loss, **asked, verbose=0)
    document = {"command": "check", "recipe": args.recipe, "model": args.model, **result.as_dict()}
    return Answer(str(result), document, code=1 if result.problems else 0)
