"""How training goes on after an interruption: the states of all callbacks of this package, saved and found together."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from keras.callbacks import BackupAndRestore
from keras_woodfisher_backends.keras_internals.training import (
    before_backups,
    callbacks_beside,
    forget,
    model_of,
    refresh,
    stock_backups,
    undo_at_next_fit,
)
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.callbacks.callback_list import warn
from keras_woodfisher.callbacks.progress import Progress
from keras_woodfisher.callbacks.saved_states import Moment, Part, SavedState, StateFolder
from keras_woodfisher.callbacks.unused_copies import CopiedUnused

_CHANGED = (
    "Something changed the weights after it was written: EarlyStopping(restore_best_weights=True), set_weights, or an "
    "update in one shot."
)
_SAVE = (
    "Have BackupAndRestore or BackupPruning in the list of callbacks; or, in one process, the same callbacks with "
    "total_epochs in each fit."
)

KEPT = 3
"""States that are kept: of the backup that is being written, the one before it, and its own copy."""


class ResumableCallback(CopiedUnused):
    """A callback that knows something that must survive an interruption.

    In each `fit` all of them share one `Resuming`, which hands out what an earlier run knew when its first epoch
    begins: a BackupAndRestore further down the list has restored its weights by then.
    """

    may_come_before_pruning = True

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(None)
        self.resuming: Resuming | None = None
        self._known: Mapping[str, np.ndarray] | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A callback with the arguments of `get_config`."""
        return cls(**config)

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if model_of(self) is None:
            name = type(self).__name__
            raise ValueError(f"{name} has no model yet. Give it to fit, or call its set_model(model) before training.")
        self._known = None
        before, after = callbacks_beside(self)
        callbacks = [*before, self, *after]
        first = next(c for c in callbacks if isinstance(c, ResumableCallback))
        self.resuming = Resuming(callbacks) if first is self else first.resuming

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.resuming is not None:
            self.resuming.begin(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        if self.resuming is not None:
            self.resuming.leave(self)

    @property
    def progress(self) -> Progress:
        """Where training stands, in those that count it."""
        return self._progress

    def learn(self, steps: int | None, total: int, known: Mapping[str, np.ndarray] | None) -> None:
        """Takes what an earlier run knew: the steps of an epoch, those done in all, and what `knowledge` told."""
        self._progress.resume(steps, total)
        self._known = known

    @property
    def folder(self) -> StateFolder | None:
        """Where it wants states to be kept."""
        return None

    def identity(self) -> dict[str, Any] | None:
        """What has to be the same when training goes on, as JSON has it; None if it may do without what it knew."""
        return None

    def knowledge(self) -> dict[str, np.ndarray]:
        """What has to survive; the model's variables are up to date."""
        return {}

    def lacking(self, epoch: int) -> str:
        """What is lost where training goes on at an epoch and nothing was saved, or ""."""
        return ""


class Resuming:
    """The states of the callbacks of one `fit`: where they are saved, and which one it goes on with.

    Args:
        callbacks: All callbacks of the `fit`.

    Attributes:
        memory: The state at the end of a `fit` that a later one of the same process goes on with.
    """

    def __init__(self, callbacks: Sequence[Any]):
        self._members = [c for c in callbacks if isinstance(c, ResumableCallback)]
        self._model = model_of(self._members[0])
        earlier = [member.resuming for member in self._members if member.resuming is not None]
        self.memory: SavedState | None = next((r.memory for r in earlier if r.memory is not None), None)
        self._own = [member.folder for member in self._members if member.folder is not None]
        self._followed: list[StateFolder] = []
        self._began = False
        self._parts: list[Part] = []
        self._backups = [c for c in callbacks if isinstance(c, BackupAndRestore)]
        for backup in self._backups:
            self._follow(backup)
        if self._backups:
            undo_at_next_fit(self._model, self._let_go)

    def begin(self, epoch: int) -> None:
        """Hands out what the run knew that this one goes on with, when the first epoch begins.

        Raises:
            ValueError: If there are states, but none of this model and these callbacks.
        """
        if self._began:
            return
        self._began = True
        ranks = current_ranks()
        with ranks.together("the beginning of training"):
            kinds = [kind for _, kind in self._kinds()] + [type(backup).__name__ for backup in self._backups]
            ranks.check_same_words({"callbacks": ", ".join(kinds)})
            if not ranks.any(bool(self._followed or self._own or self.memory or epoch)):
                return
            # Statistics differ between processes, so that only the first one knows its own moment again.
            moment = Moment.of(refresh(self._members[0]))
            state = ranks.same(self._found(moment, epoch) if ranks.first else None)
        if state is None:
            return
        for member, kind in self._kinds():
            arrays = next((part.arrays for part in state.parts if part.kind == kind), None)
            member.learn(state.steps_per_epoch, state.total, arrays)

    def save(self, folder: StateFolder) -> None:
        """Writes the present state."""
        with current_ranks().together("saving the state of training"):
            refresh(self._members[0])
            over = all(member.progress.is_over for member in self._members if member.progress.total)
            folder.write(self._state([_part(member, kind) for member, kind in self._kinds()], over))

    def leave(self, member: ResumableCallback) -> None:
        """To be called by each callback when training ends, before it lets go of what it knows."""
        if self._began and (self._own or any(other.progress.goes_on for other in self._members)):
            part = next(_part(other, kind) for other, kind in self._kinds() if other is member)
            # What they are views of may go.
            self._parts.append(replace(part, arrays={name: np.array(a) for name, a in part.arrays.items()}))
        if member not in self._members[-1:]:
            return
        if self._began:
            self.memory = None
        if self._parts:
            goes_on = any(other.progress.goes_on for other in self._members)
            with current_ranks().together("the end of training"):
                state = self._state(self._parts, not goes_on)
                self.memory = state if goes_on else None
                for folder in self._own:
                    folder.write(state)
        self._let_go()

    def _found(self, moment: Moment, epoch: int) -> SavedState | None:
        """The state that belongs to the model as it is, at a moment."""
        if self.memory is not None and self.memory.moment == moment:
            self._check(self.memory, "the fit before")
            _refuse_return(self.memory, epoch, "The fit before", "make new callbacks")
            return self.memory
        # Of a backup Keras knows where it goes on, which may be amid the first epoch.
        for folder in self._followed:
            state = folder.find(moment)
            if state is not None:
                self._check(state, str(folder.path))
                return state
        for folder in self._own:
            state = folder.find(moment)
            if state is not None and not (state.over and epoch == 0 < state.epochs):
                self._check(state, str(folder.path))
                _refuse_return(state, epoch, f"The fit whose state is in {folder.path}", "name another folder")
                return state
        if epoch > 0:
            for folder in [*self._followed, *self._own]:
                self._refuse(folder, moment, epoch)
            lost = [text for text in (member.lacking(epoch) for member in self._members) if text]
            if lost:
                known = self.memory is not None and self.memory.moment.steps == moment.steps
                warn(
                    f"Training goes on at epoch {epoch}, and nothing {'that fits ' if known else ''}was saved of "
                    f"{' and '.join(lost)}, so that it differs from an unbroken run. "
                    + (f"{_CHANGED} Change weights when training is over." if known else _SAVE)
                )
        return None

    def _refuse(self, folder: StateFolder, moment: Moment, epoch: int) -> None:
        latest = folder.latest()
        if latest is None:
            return
        self._check(latest, str(folder.path))
        steps = folder.steps()
        if moment.steps in steps:
            raise ValueError(
                f"{folder.path} has a state of training after as many steps as this model's optimizer has done "
                f"({moment.steps}), but of other weights. {_CHANGED} Put BackupPruning behind such a callback, or save "
                "the model before weights are changed, and load that; or delete that folder, and what was buffered or "
                "begun is lost."
            )
        raise ValueError(
            f"{folder.path} has the states of a training run after {', '.join(map(str, steps))} steps, but none of "
            f"this model, whose optimizer has done {moment.steps} and which is to go on at epoch {epoch}. Load the "
            "model that was saved at one of these moments, with its optimizer; or delete that folder, and what was "
            "buffered or begun is lost."
        )

    def _check(self, state: SavedState, place: str) -> None:
        """Refuses a state of other callbacks than these.

        Raises:
            ValueError: If something is different, with what it is.
        """
        there = {part.kind: part.identity for part in state.parts if part.identity is not None}
        here = {kind: identity for member, kind in self._kinds() if (identity := _identity(member)) is not None}
        differences = [f"{kind} is only there" for kind in there.keys() - here.keys()]
        differences += [f"{kind} is only here" for kind in here.keys() - there.keys()]
        for kind in there.keys() & here.keys():
            names = there[kind].keys() | here[kind].keys()
            pairs = ((name, there[kind].get(name), here[kind].get(name)) for name in sorted(names))
            differences += [f"{kind} had {name}={one}, and has {other}" for name, one, other in pairs if one != other]
        if differences:
            raise ValueError(
                f"The state of training that was saved in {place} is another one's: {'; '.join(sorted(differences))}. "
                "Go on with the same callbacks and the same model; or name another folder, and what was buffered or "
                "begun is lost."
            )

    def _kinds(self) -> Iterator[tuple[ResumableCallback, str]]:
        """The members, with the names of their parts."""
        names = [type(member).__name__ for member in self._members]
        for place, (member, name) in enumerate(zip(self._members, names, strict=True)):
            yield member, f"{name} {names[: place + 1].count(name)}"

    def _state(self, parts: Sequence[Part], over: bool) -> SavedState:
        # Not all of them count.
        progress = max((member.progress for member in self._members), key=lambda progress: progress.total)
        epochs = max(int(member.progress.ended) for member in self._members)
        return SavedState(Moment.of(self._model), progress.total, progress.steps, epochs, over, tuple(parts))

    def _follow(self, backup: BackupAndRestore) -> None:
        path = str(backup.backup_dir)
        if re.match(r"\w+://", path):
            warn(
                f"The state of pruning can't be kept beside the backup in {path!r}, which isn't a local folder, so "
                "that a run that goes on may differ from an unbroken one. Add BackupPruning with a local folder."
            )
            return
        folder = StateFolder(Path(path) / "keras_woodfisher", KEPT)
        self._followed.append(folder)
        before_backups(backup, lambda: self.save(folder))

    def _let_go(self) -> None:
        for backup in self._backups:
            stock_backups(backup)
        forget(self._model, self._let_go)
        self._members, self._backups = [], []


def _identity(member: ResumableCallback) -> dict[str, Any] | None:
    """As a file gives it back."""
    identity: dict[str, Any] | None = json.loads(json.dumps(member.identity()))
    return identity


def _part(member: ResumableCallback, kind: str) -> Part:
    return Part(kind, _identity(member), member.knowledge())


def _refuse_return(state: SavedState, epoch: int, before: str, anew: str) -> None:
    """Refuses to begin again at an epoch that is done: no further update would be made."""
    done, longer = state.epochs, "" if state.over else " of a longer training"
    if epoch < done:
        raise ValueError(
            f"{before} ended after epoch {done}{longer}, and this one begins at epoch {epoch} with the weights that it "
            f"left. Give initial_epoch={done}, and epochs={done + 1} or more; or, to begin anew, {anew}."
        )
