"""What a training run knows beside the model's own file, as a file that is whole or isn't there."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras_woodfisher_backends.keras_internals.engines import whole_value
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.model.optimizer_variables import steps_of

_FORMAT = 2
_SUFFIX = ".state.npz"


@dataclass(frozen=True)
class Moment:
    """A moment of training, by which a state and the model's file from the same moment know each other.

    Attributes:
        weights: A digest of the model's weights, of all their bits.
        steps: Steps that the optimizer has done, also those that only added up gradients.
    """

    weights: str
    steps: int

    @classmethod
    def of(cls, model: keras.Model) -> "Moment":
        """The present one; the variables must be up to date."""
        digest = hashlib.blake2b(digest_size=16)
        for variable in model.weights:
            digest.update(np.ascontiguousarray(whole_value(variable)).tobytes())
        return cls(digest.hexdigest(), steps_of(model))


@dataclass(frozen=True)
class Part:
    """What one callback has to know again.

    Attributes:
        kind: Its class, with a number.
        identity: What has to be the same when training goes on: its schedule, and the shapes of its variables.
        arrays: What it knows.
    """

    kind: str
    identity: Mapping[str, Any] | None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedState:
    """The state of the callbacks of one `fit`.

    Attributes:
        moment: When it was.
        total: Steps since training began.
        steps_per_epoch: The length of an epoch, as far as it is known.
        epochs: Epochs that are done: the index of the one with which training goes on.
        over: Whether training was over, so that a `fit` from epoch 0 on is another one.
        parts: What each callback knows.
    """

    moment: Moment
    total: int
    steps_per_epoch: int | None
    epochs: int
    over: bool
    parts: tuple[Part, ...]


class StateFolder:
    """The states of the latest moments of one training run.

    Args:
        path: Where they are; made when the first one is written.
        keep: How many are kept; None for all.
    """

    def __init__(self, path: Path, keep: int | None):
        self.path = path
        self._keep = keep

    def write(self, state: SavedState) -> None:
        """Adds a state, so that a file is there as a whole or not at all, and removes what is older than the latest.

        Where several processes train together, the first one does.
        """
        if not current_ranks().first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        about = {
            "format": _FORMAT,
            "moment": asdict(state.moment),
            "total": state.total,
            "steps_per_epoch": state.steps_per_epoch,
            "epochs": state.epochs,
            "over": state.over,
            "parts": [{"kind": p.kind, "identity": p.identity, "arrays": list(p.arrays)} for p in state.parts],
        }
        arrays: dict[str, Any] = {
            f"{n}.{name}": a for n, part in enumerate(state.parts) for name, a in part.arrays.items()
        }
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        handle, name = tempfile.mkstemp(dir=self.path, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **{"about": text, **arrays})
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._file(state.moment))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._tidy()

    def find(self, moment: Moment) -> SavedState | None:
        """The state of a moment, if it is there.

        Raises:
            ValueError: If its file can't be read.
        """
        file = self._file(moment)
        return _read(file) if file.is_file() else None

    def latest(self) -> SavedState | None:
        """The one that was written last; see `find`."""
        files = self._files()
        return _read(files[0]) if files else None

    def steps(self) -> list[int]:
        """After how many steps each of them was, in a row."""
        return sorted(int(file.name.split("-")[1]) for file in self._files())

    def _file(self, moment: Moment) -> Path:
        return self.path / f"step-{moment.steps:08d}-{moment.weights[:16]}{_SUFFIX}"

    def _files(self) -> list[Path]:
        """Those of all states, the last one first."""
        return sorted(self.path.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns, reverse=True)

    def _tidy(self) -> None:
        # What a killed run was writing.
        unfinished = list(self.path.glob("*.part"))
        for file in [*unfinished, *([] if self._keep is None else self._files()[self._keep :])]:
            file.unlink(missing_ok=True)


def _read(path: Path) -> SavedState:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(bytes(file["about"]))
            if about["format"] not in (1, _FORMAT):
                raise ValueError(f"its format is {about['format']}, not {_FORMAT}")
            total, steps = about["total"], about["steps_per_epoch"]
            # The first format tells of epochs by their steps alone.
            epochs, over = about.get("epochs", total // steps if steps else 0), about.get("over", False)
            parts = [
                Part(part["kind"], part["identity"], {name: file[f"{n}.{name}"] for name in part["arrays"]})
                for n, part in enumerate(about["parts"])
            ]
        return SavedState(Moment(**about["moment"]), total, steps, epochs, over, tuple(parts))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"The state of training in {path} can't be read ({error}). Delete that file to go on without it; gradients "
            "that were buffered, and where ramps began, are lost then."
        ) from None
