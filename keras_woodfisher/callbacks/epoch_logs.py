"""What callbacks tell at the end of an epoch, to reports and to the other callbacks of a `fit`."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from keras_woodfisher.model.targets import Target
from keras_woodfisher.reports.epoch_report import SPARSITY, EpochReport


def epoch_report(epoch: int, sparsity: float, logs: Mapping[str, Any] | None) -> EpochReport:
    """One epoch as a report has it: of the logs the single numbers, but for those of single variables."""
    found = {
        name: float(value)
        for name, value in (logs or {}).items()
        if not name.startswith(f"{SPARSITY}/") and (isinstance(value, Real) or getattr(value, "shape", None) == ())
    }
    return EpochReport(epoch, sparsity, found)


def log_each(logs: Any, targets: Sequence[Target], zeros: Sequence[int]) -> None:
    """Puts the sparsity of each variable into the logs of an epoch, as `sparsity/<path>`.

    Callbacks further down the list take them from there: History, TensorBoard, CSVLogger, those of W&B and MLflow.

    Args:
        logs: Those of `on_epoch_end`; a loop of the user's own may give none.
        targets: The variables. Of two with one path, the second gets a number.
        zeros: How many weights of each are zero.
    """
    if logs is None:
        return
    told: set[str] = set()
    for target, number in zip(targets, zeros, strict=True):
        name = key = f"{SPARSITY}/{target.name}"
        count = 0
        while key in told:
            count += 1
            key = f"{name}_{count}"
        told.add(key)
        logs[key] = number / target.size
