"""The arguments of every command; imports no Keras, so that help and wrong usage answer at once."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

BACKENDS = ("torch", "tensorflow", "jax")
METHODS = ("woodfisher", "magnitude")
UPDATES = ("joint", "independent")
FISHERS = ("empirical", "ggn")
QUALITIES = ("fast", "balanced", "best")
MASK_TYPES = ("unstructured", "block4", "filter", "channel")

_OF_FISHER = ("num_grads", "grad_batch_size", "fisher", "damp", "fisher_block_size", "memory_limit", "update")
_OF_WOODFISHER = ("quality", "stages", "calibration", "newton_steps", *_OF_FISHER)
_OF_SPARSITY = ("params", "exclude", "method", "mask_type", "reestimate_batchnorm", *_OF_WOODFISHER)
_LOSS_HELP = "a Keras loss, such as mse; NAME:from_logits where the model's outputs are logits"


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
    _add_convert(command("convert", "rewrite an old recipe in the form that this package writes"))
    _add_sensitivity(command("sensitivity", "measure and predict the loss when each variable alone is pruned"))
    _add_demo(command("demo", "train a small CNN on digits, prune it, and compare WoodFisher with magnitude"))
    args = parser.parse_args(argv)
    if args.command == "prune":
        _check_prune(args, prune.error)
    if args.command == "sensitivity":
        _check_sensitivity(args, parser.error)
    return args


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument("--data", metavar="DATA.npz", help="x, y and perhaps sample_weight (magnitude needs none)")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", metavar="RECIPE", help="a recipe: .yaml or .md")
    how.add_argument("--sparsity", type=_fraction, help="fraction of zeros to reach, in [0, 1)")
    parser.add_argument("--out", required=True, metavar="PRUNED.keras", help="where to write the pruned model")
    parser.add_argument("--force", action="store_true", help="overwrite --out")
    parser.add_argument("--eval", metavar="DATA.npz", help="print loss and metrics on it, before and after")
    parser.add_argument("--batch-size", type=_whole(1), metavar="N", help="for --epochs and --eval (default 64)")
    parser.add_argument("--loss", metavar="NAME", help=f"{_LOSS_HELP} (default: the compiled loss)")
    _add_common(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--seed", type=_whole(0), default=0, help="of every random choice (default 0)")

    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--epochs", type=_whole(1), metavar="N", help="epochs of training (default: one shot)")
    tuning.add_argument(
        "--learning-rate", type=_positive, metavar="R", help="of Adam, for a model that isn't compiled (default 1e-4)"
    )
    recipe = parser.add_argument_group("with --recipe")
    _add_var(recipe)
    plain = parser.add_argument_group("with --sparsity", "README.md says what these mean.")
    _add_update(plain, "0: one block over everything")
    plain.add_argument("--quality", choices=QUALITIES, help="how much work to spend (default balanced)")
    plain.add_argument("--stages", type=_whole(1), metavar="K")
    plain.add_argument("--calibration", type=_whole(1), metavar="N", help="examples of --data to hold out")
    plain.add_argument("--newton-steps", type=_whole(0), metavar="N")
    plain.add_argument("--update", choices=(*UPDATES, "calibrated"))
    plain.add_argument(
        "--mask-type", type=_mask_type, metavar="MASK", help="unstructured (default), 2:4, block4, 4,1, filter, channel"
    )
    plain.add_argument(
        "--reestimate-batchnorm",
        nargs="?",
        const=True,
        metavar="DATA.npz",
        help="measure BatchNorm statistics anew on training examples with their augmentation (default: --data)",
    )


def _add_sensitivity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument(
        "--data", metavar="DATA.npz", help="x, y and perhaps sample_weight: gradients (magnitude: none)"
    )
    parser.add_argument("--eval", metavar="DATA.npz", help="examples to measure losses on (default: --data)")
    parser.add_argument("--levels", nargs="+", type=_fraction, metavar="S", help="default 0.5 0.7 0.8 0.9 0.95")
    parser.add_argument("--num-examples", type=_whole(1), metavar="N", help="to measure losses on (default 1024)")
    parser.add_argument("--batch-size", type=_whole(1), metavar="N", help="of those (default 256)")
    parser.add_argument("--loss", metavar="NAME", help=f"{_LOSS_HELP} (default: the compiled loss)")
    parser.add_argument("--plot", metavar="FILE", help="draw curves: .png, .svg or .pdf (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="overwrite --plot")
    _add_common(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--seed", type=_whole(0), default=0, help="of the choice of examples (default 0)")
    _add_update(parser, "0: each variable is one block")
    parser.add_argument("--update", choices=UPDATES)


def _add_update(parser: Any, no_block_size: str) -> None:
    """What one pruning update takes."""
    for name in ("--params", "--exclude"):
        parser.add_argument(name, nargs="+", action="extend", metavar="NAME", help="names, or patterns: re:...")
    parser.add_argument("--num-grads", type=_whole(1), metavar="M")
    parser.add_argument("--grad-batch-size", type=_whole(1), metavar="b")
    parser.add_argument("--damp", type=_damp, metavar="DAMP", help="a number or auto")
    parser.add_argument("--fisher", choices=FISHERS)
    parser.add_argument("--fisher-block-size", type=_whole(0), metavar="B", help=no_block_size)
    parser.add_argument(
        "--memory-limit", type=_size, metavar="SIZE", help="such as 4GiB (default: 1/4 of what is free)"
    )
    parser.add_argument("--method", choices=METHODS)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("model", metavar="MODEL.keras")
    parser.add_argument("--steps-per-epoch", type=_whole(1), metavar="N", help="batches in an epoch")
    parser.add_argument("--epochs", type=_whole(1), metavar="N", help="epochs that training will last")
    parser.add_argument("--data", metavar="DATA.npz", help="x, y and perhaps sample_weight")
    parser.add_argument("--loss", metavar="NAME", help=_LOSS_HELP)
    _add_var(parser)
    _add_common(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.keras")
    _add_common(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD.md")
    parser.add_argument("new", metavar="NEW.yaml")
    parser.add_argument("--force", action="store_true", help="overwrite NEW.yaml")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, help="what Keras runs on (default: as KERAS_BACKEND says)")


def _add_var(parser: Any) -> None:
    text = "set a variable of the recipe (may be repeated)"
    parser.add_argument("--var", type=_variable, action="append", metavar="NAME=VALUE", help=text)


def _check_prune(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Refuses options that would be without effect."""
    plain = args.recipe is None
    magnitude = args.method == "magnitude"
    if not plain:
        _refuse(args, _OF_SPARSITY, "--recipe; set it in the recipe", error)
    elif magnitude:
        _refuse(args, _OF_WOODFISHER, "--method magnitude; leave it out", error)
    one_shot_magnitude = plain and magnitude and args.epochs is None and args.reestimate_batchnorm is None
    rules = [
        (args.var and plain, "--var sets a variable of a recipe: give --recipe"),
        (args.data is None and args.epochs, "--data is needed for training: give it beside --epochs"),
        (args.data is None and plain and not magnitude, "--data is needed; only --method magnitude works without"),
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
        _refuse(args, _OF_FISHER, "--method magnitude; leave it out", error)
    if args.data is None and not (magnitude and args.eval):
        error("--data is needed; only --method magnitude works with --eval alone")
    if magnitude and args.data and args.eval:
        error("--data has no effect beside --method magnitude and --eval; leave it out")


def _refuse(args: argparse.Namespace, names: Sequence[str], beside: str, error: Callable[[str], Any]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            error(f"--{name.replace('_', '-')} has no effect beside {beside}")


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < 1.0:
        mend = f": write {value / 100:g} for {value:g} %" if 1.0 < value < 100.0 else ""
        raise argparse.ArgumentTypeError(f"must be a fraction in [0, 1), got {text}{mend}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def _size(text: str) -> str:
    if (
        not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]?i?B)?", text.strip(), re.IGNORECASE)
        or float(text.strip("KMGTIBkmgtib ")) == 0
    ):
        raise argparse.ArgumentTypeError(f"must be a size such as 4GiB or 500MB, got {text!r}")
    return text


def _damp(text: str) -> float | str:
    return text if text == "auto" else _positive(text)


def _mask_type(text: str) -> str | list[int]:
    if block := re.fullmatch(r"\[?\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*\]?", text):
        return [int(block[1]), int(block[2])]
    pattern = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if text not in MASK_TYPES and not (pattern and 0 < int(pattern[1]) < int(pattern[2])):
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(MASK_TYPES)}, N:M such as 2:4, or outputs and inputs such as 4,1, got {text!r}"
        )
    return text


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
