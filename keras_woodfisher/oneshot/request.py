"""What one call of `prune` asks for, checked before the model is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.gradients.gauss_newton import curvature_problem
from keras_woodfisher.model.examples import Examples, count_up_to, open_examples
from keras_woodfisher.model.targets import Target, finals_of
from keras_woodfisher.oneshot.batchnorm import takes_data
from keras_woodfisher.oneshot.presets import (
    CHOSEN,
    OF_GRADIENTS,
    PRESETS,
    Circumstances,
    Settings,
    chosen,
    examples_to_count,
    method_of,
    resolve,
)
from keras_woodfisher.oneshot.reconstruction.pruning import effort_of
from keras_woodfisher.options.checks import fraction, one_of
from keras_woodfisher.options.mask_types import check_final
from keras_woodfisher.options.pruning_options import MAGNITUDE, PruningOptions
from keras_woodfisher.options.sparsity_levels import arguments_of, checked_levels


class Request:
    """The arguments of one call.

    Args:
        arguments: Those of `prune`, by name.

    Attributes:
        given: The options that a preset chooses otherwise; None where they are left to it.
        quality: The preset.
        options: Of updates; complete once `settle` was called.
        effort: How much work a reconstruction is; None for another method.

    Raises:
        ValueError, TypeError: If an argument is wrong, or they don't go together.
    """

    def __init__(self, arguments: Mapping[str, Any]):
        sparsity, data = arguments["sparsity"], arguments["data"]
        self._arguments = dict(arguments)
        self._levels = checked_levels(sparsity, "sparsity") if isinstance(sparsity, Mapping) else None
        if self._levels is not None:
            given = arguments_of(self._levels, arguments["params"], arguments["global_sparsity"])
            self._arguments |= dict(zip(("params", "global_sparsity"), given, strict=True))
        self._final = max(level for level, _ in self._levels) if self._levels else fraction("sparsity", sparsity)
        self.given = {name: arguments[name] for name in CHOSEN}
        self.quality = one_of("quality", arguments["quality"], tuple(PRESETS))
        others = {name: arguments[name] for name in OF_GRADIENTS if arguments[name] != OF_GRADIENTS[name]}
        method = method_of(arguments["method"], self.quality, {**self.given, **others})
        if method != MAGNITUDE and data is None:
            raise ValueError(
                "prune needs data: examples x for reconstruction, (x, y) for WoodFisher, in whatever form fit takes "
                "them. Only method='magnitude' works without."
            )
        preset = chosen(self.quality, self.given, None).options()
        self.options = PruningOptions.of(**(PruningOptions.among(self._arguments) | {"method": method} | preset))
        check_final(self.options.mask_type, self._final)
        self.effort = effort_of(self.quality, arguments["num_examples"], method)

    def open_examples(self) -> Examples | None:
        """The data, opened, if anything is read of it."""
        data, wanted = self._arguments["data"], self._arguments["reestimate_batchnorm"]
        reads = self.options.method != MAGNITUDE or (takes_data(wanted) and data is not None)
        return open_examples(data) if reads else None

    def settle(self, model: keras.Model, examples: Examples | None) -> tuple[Settings, tuple[str, ...]]:
        """What the preset chooses for this model and these examples, and notes on what that doesn't do."""
        loss, fisher, batchnorm = (self._arguments[name] for name in ("loss", "fisher", "reestimate_batchnorm"))
        second_order = self.options.second_order
        most = examples_to_count(self.quality, self.given) if second_order else 0
        available = count_up_to(examples, most) if examples is not None and most else None
        if (ranks := current_ranks()).size > 1 and most:
            fewest = ranks.least(most if available is None else available)
            available = None if fewest == most else fewest
        problem = curvature_problem(model, loss) if second_order and fisher is None else None
        circumstances = Circumstances(self.options.method, available, problem, batchnorm is not False)
        settings, notes = resolve(self.quality, self.given, circumstances)
        self.options = replace(self.options, **settings.options())
        if self.effort is not None and loss is not None and batchnorm is False:
            notes += ("loss has no effect on a reconstruction.",)
        return settings, notes

    def finals(self, targets: Sequence[Target]) -> list[float]:
        """The sparsity that each variable is to reach."""
        return [self._final] * len(targets) if self._levels is None else finals_of(targets, self._levels)

    def report(self, settings: Settings) -> dict[str, Any]:
        """What a report says of how it was done."""
        if self.effort is not None:
            return self.effort.report(self.quality, self.options)
        return settings.report(self.quality, self.options) if self.options.second_order else {}
