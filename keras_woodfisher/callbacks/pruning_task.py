"""What a pruning callback is to do, whatever the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from keras_woodfisher.callbacks.update_plan import PlannedUpdate, check_buffer
from keras_woodfisher.model.targets import ALL, ALL_PRUNABLE
from keras_woodfisher.options.checks import as_json, flag
from keras_woodfisher.options.mask_types import check_final
from keras_woodfisher.options.pruning_options import CALIBRATED, PruningOptions
from keras_woodfisher.options.schedule import FROM_PARAM, Schedule, checked_schedule
from keras_woodfisher.options.sparsity_levels import arguments_of, checked_levels

POSITIONS = ("start_epoch", "end_epoch", "update_frequency")

_MAY_CHANGE = {"params", "exclude", "available_gpus", "memory_limit", "grads_device", "num_pages", "verbose"}
"""Options that a run may have otherwise than the one that it goes on with. Names of layers are numbered anew."""


@dataclass(frozen=True)
class Task:
    """What a callback was given, whatever the model.

    Attributes:
        options: How updates work.
        schedule: When they are, and how far they go.
        levels: A final sparsity for each variable, or None: the schedule's for all.
        from_zeros: Whether the ramps begin at the zeros that are there.
        leave_enabled: Whether zeros are held after the last update.
        positions: `start_epoch`, `end_epoch` and `update_frequency` as they were written.
        data: Where to sample gradients from; None buffers those of training.
    """

    options: PruningOptions
    schedule: Schedule
    levels: tuple[tuple[float, tuple[str, ...]], ...] | None
    from_zeros: bool
    leave_enabled: bool
    positions: Mapping[str, float]
    data: Any

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Task":
        """What the arguments of `WoodFisherPruning` mean, all of them, by name.

        Raises:
            ValueError, TypeError: If one is out of range.
        """
        wanted = PruningOptions.among(given)
        final, levels = given["final_sparsity"], None
        if isinstance(final, Mapping):
            levels = checked_levels(final)
            wanted["params"], wanted["global_sparsity"] = arguments_of(
                levels, wanted["params"], wanted["global_sparsity"]
            )
            final = min(level for level, _ in levels)
        options = PruningOptions.of(**wanted)
        if options.update == CALIBRATED:
            raise ValueError(
                "update='calibrated' is for prune, in one shot; got it in a callback. Use 'joint' or 'independent'."
            )
        flag("leave_enabled", given["leave_enabled"])
        init, start, end, frequency = (given[name] for name in ("init_sparsity", *POSITIONS))
        schedule = checked_schedule(init, final, start, end, frequency, given["inter_func"])
        check_final(options.mask_type, schedule.final if levels is None else max(level for level, _ in levels))
        positions = {name: float(given[name]) for name in POSITIONS}
        return cls(options, schedule, levels, init == FROM_PARAM, given["leave_enabled"], positions, given["data"])

    @property
    def buffers(self) -> bool:
        """Whether the gradients of training are used."""
        return self.options.second_order and self.data is None

    @property
    def chosen_by_name(self) -> bool:
        """Whether the user named variables to prune, or to leave out."""
        return self.options.params not in (ALL, ALL_PRUNABLE) or bool(self.options.exclude)

    def first_final_epoch(self, epochs: int | None) -> int:
        """The index of the first epoch at whose end the final sparsity is reached."""
        epoch = math.floor(self.schedule.end)
        return epoch if epochs is None else min(epoch, epochs - 1)

    def config(self) -> dict[str, Any]:
        """The arguments that it was made of, but for data, as JSON has them."""
        config = {field.name: as_json(getattr(self.options, field.name)) for field in fields(self.options)}
        config["final_sparsity"] = self.schedule.final
        if self.levels is not None:
            config |= {"final_sparsity": {final: list(listed) for final, listed in self.levels}, "params": None}
        return config | {
            "init_sparsity": FROM_PARAM if self.from_zeros else self.schedule.init,
            "inter_func": self.schedule.interpolation,
            "leave_enabled": self.leave_enabled,
            **self.positions,
        }

    def identity(self) -> dict[str, Any]:
        """What must not change when training goes on, as JSON has it: all but names, places, limits and messages."""
        config = {name: value for name, value in self.config().items() if name not in _MAY_CHANGE}
        if self.levels is not None:
            config["final_sparsity"] = [final for final, _ in self.levels]
        return config | {"buffers": self.buffers}

    def check_epochs(self, epochs: int | None) -> None:
        """Refuses a run that ends too early.

        Raises:
            ValueError: If the last update lies after its last epoch.
        """
        if epochs is not None and self.schedule.end > epochs:
            raise ValueError(
                f"end_epoch={self.schedule.end:g} lies after the last epoch ({epochs}), so the final sparsity "
                f"would never be reached. Train for epochs={math.ceil(self.schedule.end)}, or lower end_epoch; or, "
                "where a later fit goes on with this training, give its length: "
                f"total_epochs={math.ceil(self.schedule.end)} or more."
            )

    def check_buffered(self) -> None:
        """Refuses what the gradients of training can't give, where those are used.

        Raises:
            ValueError: If an option needs data to sample from.
        """
        for name, default in (("grad_batch_size", 1), ("fisher", "empirical"), ("num_recomputations", 1)):
            if self.buffers and getattr(self.options, name) != default:
                raise ValueError(
                    f"{name}={getattr(self.options, name)!r} needs data to sample from: give data=(x, y). Without "
                    "data, each step of training gives one gradient, averaged over its batch."
                )

    def check_plan(
        self, updates: Sequence[PlannedUpdate], steps: int | None, epochs: int | None, first_epoch: int = 0
    ) -> None:
        """See `WoodFisherPruning.check_plan`."""
        self.check_epochs(epochs)
        self.check_buffered()
        if self.buffers:
            check_buffer(updates, steps, epochs, first_epoch)
