"""The table of options: every option once, with what the command line, recipes and documentation make of it.

The documentation's table is refreshed with `python -m keras_woodfisher.options.table README.md` (`make docs`).
"""

import json
import sys
from pathlib import Path
from typing import Any

from keras_woodfisher.options import kinds
from keras_woodfisher.options.option import CALLBACK, PRUNE, RAMP, RECIPE, SENSITIVITY, Option, options_of
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import INTERPOLATIONS


def _row(name: str, kind: kinds.Kind, default: Any, meaning: str, **more: Any) -> Option:
    return Option(name=name, kind=kind, default=default, meaning=meaning, **more)


_RAMP: Any = {"callers": (CALLBACK,), "group": RAMP}
_REQUIRED: Any = _RAMP | {"defaults": {RECIPE: ...}}
_PRUNE: Any = {"callers": (PRUNE,), "commands": (PRUNE,)}
_BY_QUALITY: Any = _PRUNE | {"shown": "by `quality`", "second_order": True}
_SENSITIVITY: Any = {"callers": (SENSITIVITY,), "commands": (SENSITIVITY,)}
_INTERPOLATION = kinds.choice(*INTERPOLATIONS)
_params, *_of_updates = options_of(PruningOptions)

OPTIONS = (
    _params,
    _row(
        "init_sparsity",
        kinds.INIT_SPARSITY,
        0.0,
        'sparsity at `start_epoch`; `"__FROM_PARAM__"`: the zeros that are there',
        **_REQUIRED,
    ),
    _row(
        "final_sparsity",
        kinds.FINAL_SPARSITY,
        ...,
        "fraction of zeros to reach, in [0, 1); or `{fraction: names}` for a sparsity of each variable (the first one "
        "that names it)",
        **_RAMP | {"callers": (CALLBACK, PRUNE), "defaults": {PRUNE: 0.5}, "renamed": {PRUNE: "sparsity"}},
    ),
    _row(
        "start_epoch", kinds.EPOCHS, 0.0, "first update, in epochs, fractions allowed; -1 starts at once", **_REQUIRED
    ),
    _row("end_epoch", kinds.EPOCHS, ..., "last update, in epochs, fractions allowed", **_RAMP),
    _row(
        "update_frequency",
        kinds.EPOCHS,
        1.0,
        "epochs between updates, fractions allowed; 0 or -1: every step",
        **_REQUIRED,
    ),
    _row(
        "inter_func",
        _INTERPOLATION,
        "cubic",
        'how the sparsity rises: `"linear"`, `"cubic"`, `"inverse_cubic"`',
        **_RAMP,
    ),
    _row("leave_enabled", kinds.FLAG, True, "hold the zeros after `end_epoch`, or let them grow again", **_RAMP),
    *_of_updates,
    _row(
        "total_epochs",
        kinds.COUNT,
        None,
        "epochs of the whole training, where a `fit` is only a part of it and a later one goes on",
        shown="those of `fit`",
        callers=(CALLBACK,),
        takes_none=True,
    ),
    _row(
        "log_variables",
        kinds.FLAG,
        False,
        "put the sparsity of each variable into the logs of each epoch, as `sparsity/<path>`, for TensorBoard etc.",
        callers=(CALLBACK,),
    ),
    _row("data", kinds.ANYTHING, None, "where to sample gradients from; None: buffer those of training"),
    _row("loss", kinds.ANYTHING, None, "a Keras loss", shown="the compiled one", callers=(PRUNE, SENSITIVITY)),
    _row(
        "quality",
        kinds.choice("fast", "balanced", "best"),
        "balanced",
        'how much work to spend: `"fast"`, `"balanced"` or `"best"`; it chooses what isn\'t given',
        **_BY_QUALITY | {"shown": ""},
    ),
    _row(
        "calibration",
        kinds.Kind(notation=kinds.COUNT.notation),
        None,
        "number of examples of `data` to hold out for calibrated corrections (of a stream the first ones), or other "
        "examples",
        help="examples of --data to hold out for calibrated corrections",
        **_BY_QUALITY,
    ),
    _row(
        "newton_steps",
        kinds.COUNT_OR_ZERO,
        None,
        "damped Newton steps on the loss that calibrated corrections may make in each stage",
        **_BY_QUALITY,
    ),
    _row(
        "reestimate_batchnorm",
        kinds.Kind(notation={"nargs": "?", "const": True, "metavar": "DATA.npz"}),
        False,
        "True: measure BatchNorm statistics anew on `data`; or the examples to use",
        help="measure BatchNorm statistics anew on training examples with their augmentation (default: --data)",
        **_PRUNE,
    ),
    _row("levels", kinds.LEVELS, (0.5, 0.7, 0.8, 0.9, 0.95), "sparsities of a variable", **_SENSITIVITY),
    _row("eval_data", kinds.ANYTHING, None, "examples to measure losses on", shown="`data`", callers=(SENSITIVITY,)),
    _row(
        "num_examples",
        kinds.COUNT,
        1024,
        "how many of them; None: all. In `prune`: examples to reconstruct layers by, by `quality`",
        takes_none=True,
        callers=(PRUNE, SENSITIVITY),
        commands=(PRUNE, SENSITIVITY),
        defaults={PRUNE: None},
        help="examples to measure losses on, or to reconstruct layers by",
    ),
    _row("batch_size", kinds.COUNT, 256, "how many of them at a time", help="of those at a time", **_SENSITIVITY),
)
"""Every option. The order is that of documentation, `--help`, and a recipe's fields."""


def on_command_line(command: str) -> tuple[Option, ...]:
    """The options that a command has from this table."""
    return tuple(row for row in OPTIONS if command in row.commands)


def in_group(group: str) -> tuple[Option, ...]:
    """The options that are fields of a group in recipes."""
    return tuple(row for row in OPTIONS if row.group == group)


def documentation() -> str:
    """The table as documentation has it, in Markdown."""
    rows = [f"| {_name(row)} | {row.shown or _default(row.default)} | {row.meaning} |" for row in OPTIONS]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _name(row: Option) -> str:
    others = [f"`{name}` in `{caller}`" for caller, name in row.renamed.items()]
    if CALLBACK not in row.callers:
        others.append(", ".join(f"`{caller}`" for caller in row.callers) + " only")
    return f"`{row.name}`" + (f" ({'; '.join(others)})" if others else "")


def _default(value: Any) -> str:
    if value is ...:
        return ""
    if isinstance(value, str):
        return f"`{json.dumps(value)}`"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def refresh(path: Path) -> None:
    """Puts the table into a file in place of the one that is there."""
    text = path.read_text("utf-8")
    start = text.index(documentation().split("\n", 1)[0])
    end = text.index("\n\n", start) + 1
    path.write_text(text[:start] + documentation() + text[end:], "utf-8")


if __name__ == "__main__":
    refresh(Path(sys.argv[1]))
