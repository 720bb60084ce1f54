"""The arguments of every command; imports no Keras, so that help and wrong usage answer at once."""

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from keras_woodfisher.options.kinds import fraction_text, positive_text, whole_text
from keras_woodfisher.options.option import PRUNE, SENSITIVITY, Option
from keras_woodfisher.options.table import on_command_line

BACKENDS = ("torch", "tensorflow", "jax")
_LOSS_HELP = (
    "a Keras loss, such as mse; NAME:from_logits where the model's outputs are logits; OUTPUT=NAME,OUTPUT=NAME for "
    "several outputs"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the arguments; an option that wasn't given is None.

    Raises:
        SystemExit: With code 2 if they are wrong or don't go together, 0 after `--help` and `--version`.
    """
    parser = _Parser(prog="keras-woodfisher", description="Second-order pruning of Keras models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"keras-woodfisher {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        made.add_argument("--json", action="store_true", help="write one JSON document to stdout, and nothing else")
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    prune = command("prune", "prune a saved model, in one shot or while it is fine-tuned")
    _add_prune(prune)
    _add_check(command("check", "check a recipe against a model, without training"))
    _add_inspect(command("inspect", "list the sparsity of a model and the bytes it takes dense and compressed"))
    _add_compress(command("compress", "rewrite a .keras file compressed, bit for bit the same model"))
    _add_export(command("export", "export a model to another runtime, and check the file with it"))
    _add_convert(command("convert", "rewrite an old recipe in the form that this package writes"))
    _add_shrink(command("shrink", "remove the channels of a pruned model that are zero, constant or unread"))
    _add_sensitivity(command("sensitivity", "measure and predict the loss when each variable alone is pruned"))
    demo = command("demo", "train a small CNN on digits, prune it, and compare WoodFisher with magnitude")
    _add_common(demo, quiet=True)
    args = parser.parse_args(argv)
    if args.command == "prune":
        _check_prune(args, prune.error)
    if args.command == "sensitivity":
        _check_sensitivity(args, parser.error)
    return args


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument("--data", metavar="DATA.npz", help="x, and y where gradients are taken (magnitude needs none)")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", metavar="RECIPE", help="a recipe: .yaml or .md")
    how.add_argument("--sparsity", type=fraction_text, help="fraction of zeros to reach, in [0, 1)")
    parser.add_argument("--out", required=True, metavar="PRUNED.keras", help="where to write the pruned model")
    parser.add_argument("--force", action="store_true", help="overwrite --out")
    parser.add_argument("--uncompressed", action="store_true", help="write --out as Keras does, every zero in full")
    parser.add_argument("--eval", metavar="DATA.npz", help="print loss and metrics on it, before and after")
    parser.add_argument("--batch-size", type=whole_text(1), metavar="N", help="for --epochs and --eval (default 64)")
    parser.add_argument("--loss", metavar="NAME", help=f"{_LOSS_HELP} (default: the compiled loss)")
    _add_common(parser, quiet=True)
    parser.add_argument("--seed", type=whole_text(0), default=0, help="of every random choice (default 0)")

    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--epochs", type=whole_text(1), metavar="N", help="epochs of training (default: one shot)")
    rate_text = "of Adam, for a model that isn't compiled (default 1e-4)"
    tuning.add_argument("--learning-rate", type=positive_text, metavar="R", help=rate_text)
    _add_var(parser.add_argument_group("with --recipe"))
    _add_options(parser.add_argument_group("with --sparsity", "--quality chooses what isn't given."), PRUNE)


def _add_sensitivity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    data_text = "x, and y but for --method reconstruct with --eval (magnitude needs none)"
    parser.add_argument("--data", metavar="DATA.npz", help=data_text)
    parser.add_argument("--eval", metavar="DATA.npz", help="examples to measure losses on (default: --data)")
    parser.add_argument("--loss", metavar="NAME", help=f"{_LOSS_HELP} (default: the compiled loss)")
    parser.add_argument("--plot", metavar="FILE", help="draw curves: .png, .svg or .pdf (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="overwrite --plot")
    _add_common(parser, quiet=True)
    parser.add_argument("--seed", type=whole_text(0), default=0, help="of the choice of examples (default 0)")
    _add_options(parser, SENSITIVITY)


def _add_options(parser: Any, command: str) -> None:
    """The options that a command has from the table of options; those that aren't given stay None."""
    for row in on_command_line(command):
        text = (row.help or row.plain_meaning).replace("%", "%%")
        choices = row.choices_in(command)
        notation = {"choices": choices} if choices else dict(row.kind.notation)
        parser.add_argument(_flag(row.name_in(command)), help=text + row.default_text(command), **notation)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument("--steps-per-epoch", type=whole_text(1), metavar="N", help="batches in an epoch")
    parser.add_argument("--epochs", type=whole_text(1), metavar="N", help="epochs that training will last")
    parser.add_argument("--data", metavar="DATA.npz", help="x, and y where gradients are taken")
    parser.add_argument("--loss", metavar="NAME", help=_LOSS_HELP)
    ranks = "tell what each of R processes that prune together would hold, send and compute"
    parser.add_argument("--ranks", type=whole_text(1), metavar="R", help=ranks)
    parser.add_argument("--hosts", type=whole_text(1), metavar="H", help="machines that those run on (default: one)")
    _add_var(parser)
    _add_common(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras", help="or an exported .onnx, .tflite or .xml file")
    _add_common(parser)


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument("out", metavar="SMALL.keras", help="where to write it; with --force also MODEL.keras itself")
    parser.add_argument("--force", action="store_true", help="overwrite SMALL.keras")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument(
        "out", metavar="FILE", help="model.onnx, model.tflite, model.xml (OpenVINO), or a folder (SavedModel)"
    )
    data_text = "x to compare outputs on (and to learn the ranges of int8 from), and perhaps y (classes) for accuracy"
    parser.add_argument("--data", metavar="DATA.npz", required=True, help=data_text)
    parser.add_argument("--quantize", choices=("int8",), help="weights and activations in 8 bits (LiteRT)")
    sparse = parser.add_mutually_exclusive_group()
    sparse.add_argument(
        "--sparse", action="store_true", help="leave zeros out, or fail (default: where it pays and runs)"
    )
    sparse.add_argument("--no-sparse", action="store_true", help="keep zeros in full")
    parser.add_argument(
        "--dense", metavar="FILE", help="the dense model's file, to compare bytes, accuracy and time with"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    _add_common(parser)


def _add_shrink(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument("out", metavar="SMALL.keras")
    parser.add_argument("--force", action="store_true", help="overwrite SMALL.keras")
    _add_common(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD.md")
    parser.add_argument("new", metavar="NEW.yaml")
    parser.add_argument("--force", action="store_true", help="overwrite NEW.yaml")


def _add_common(parser: argparse.ArgumentParser, quiet: bool = False) -> None:
    parser.add_argument("--backend", choices=BACKENDS, help="what Keras runs on (default: as KERAS_BACKEND says)")
    if quiet:
        parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_var(parser: Any) -> None:
    text = "set a variable of the recipe (may be repeated)"
    parser.add_argument("--var", type=_variable, action="append", metavar="NAME=VALUE", help=text)


def _check_prune(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Refuses options that would be without effect."""
    with_recipe = args.recipe is not None
    magnitude = args.method == "magnitude"
    if with_recipe:
        _refuse(args, lambda row: True, "--recipe; set it in the recipe", error)
    elif magnitude or args.method == "reconstruct":
        of_reconstruction = ("quality", "memory_limit") if args.method == "reconstruct" else ()
        without = f"--method {args.method}; leave it out"
        _refuse(args, lambda row: row.second_order and row.name not in of_reconstruction, without, error)
    if args.num_examples is not None and args.method in ("magnitude", "woodfisher"):
        error(f"--num-examples has no effect beside --method {args.method}; leave it out")
    one_shot_magnitude = not with_recipe and magnitude and args.epochs is None and args.reestimate_batchnorm is None
    rules = [
        (args.var and not with_recipe, "--var sets a variable of a recipe: give --recipe"),
        (args.data is None and args.epochs, "--data is needed for training: give it beside --epochs"),
        (
            args.data is None and not with_recipe and not magnitude,
            "--data is needed; only --method magnitude works without",
        ),
        (args.data is None and args.reestimate_batchnorm is True, "--reestimate-batchnorm needs examples: give --data"),
        (args.learning_rate and not args.epochs, "--learning-rate is for fine-tuning: give --epochs"),
        (
            args.batch_size and not (args.epochs or args.eval),
            "--batch-size is for --epochs and --eval; gradients are taken one example at a time",
        ),
        (args.loss and one_shot_magnitude and not args.eval, "--loss has no effect: nothing takes gradients"),
    ]
    for broken, message in rules:
        if broken:
            error(message)


def _check_sensitivity(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Refuses options that would be without effect."""
    magnitude = args.method == "magnitude"
    if magnitude:
        _refuse(args, lambda row: row.second_order, "--method magnitude; leave it out", error)
    if args.data is None and not (magnitude and args.eval):
        error("--data is needed; only --method magnitude works with --eval alone")
    if magnitude and args.data and args.eval:
        error("--data has no effect beside --method magnitude and --eval; leave it out")


def _refuse(
    args: argparse.Namespace, without_effect: Callable[[Option], bool], beside: str, error: Callable[[str], Any]
) -> None:
    for row in on_command_line(args.command):
        name = row.name_in(args.command)
        if without_effect(row) and getattr(args, name) is not None:
            error(f"{_flag(name)} has no effect beside {beside}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name.strip(), value.strip()


def _version() -> str:
    try:
        return version("keras-woodfisher")
    except PackageNotFoundError:
        return "(not installed)"
