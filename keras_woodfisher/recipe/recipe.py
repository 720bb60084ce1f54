"""Recipe: modifiers that were read and checked, to run on any model."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from keras_woodfisher.oneshot.prune import prune
from keras_woodfisher.recipe.callbacks import callbacks_of, pruning_arguments
from keras_woodfisher.recipe.matching import considered, targets_of
from keras_woodfisher.recipe.modifiers.pruning import Modifier, PruningModifier, WoodFisherPruningModifier
from keras_woodfisher.recipe.modifiers.reconstruction import ReconstructionModifier
from keras_woodfisher.recipe.modifiers.validation import modifiers_of
from keras_woodfisher.recipe.modifiers.writing import canonical_text, changed_fields
from keras_woodfisher.recipe.syntax.outline import read_outline
from keras_woodfisher.reports.pruning_report import PruningReport, combined
from keras_woodfisher.reports.zeros import count_zeros


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `print` it to see its canonical form. Read one with `load_recipe`.

    Two recipes are equal if they do the same, whatever dialect they were written in.

        >>> recipe = kw.load_recipe({"modifiers": [{"EpochRangeModifier": {"start_epoch": 0.0, "end_epoch": 3.0}}]})
        >>> recipe.epochs, recipe.callbacks(model)
        (3, [])
        >>> kw.load_recipe(str(recipe)) == recipe
        True

    Attributes:
        modifiers: What it does, in the project's own terms.
    """

    modifiers: tuple[Modifier, ...]

    @property
    def epochs(self) -> int:
        """Epochs that it takes: its largest `end_epoch`, rounded up; 0 if it has none."""
        return max(0, *(math.ceil(m.last_epoch - 1e-9) for m in self.modifiers))

    def callbacks(
        self,
        model: keras.Model,
        data: Any = None,
        *,
        verbose: int = 1,
        total_epochs: int | None = None,
        log_variables: bool = False,
    ) -> list[keras.callbacks.Callback]:
        """What to give to `model.fit(..., epochs=recipe.epochs, callbacks=...)`.

        Args:
            model: The built model to train; names are looked up in it.
            data: Where to sample gradients from, as in `WoodFisherPruning`; without it, the training run's own
                gradients are buffered.
            verbose: As in `WoodFisherPruning`.
            total_epochs: As in `WoodFisherPruning`.
            log_variables: As in `WoodFisherPruning` and `KeepZeros`.

        Returns:
            Keras callbacks, those that prune first.

        Raises:
            KeyError: If a name matches nothing.
            ValueError: If the recipe demands data and there is none, or it doesn't fit the model.
        """
        callbacks = callbacks_of(self.modifiers, data, verbose, total_epochs, log_variables)
        for modifier in self.modifiers:
            targets_of(modifier, model)
        return callbacks

    def apply(self, model: keras.Model, data: Any = None, *, loss: Any = None, verbose: int = 1) -> PruningReport:
        """Prunes a model to the recipe's final sparsities in one shot, without training.

        Of a `num_grads` that depends on the sparsity, the count for the final sparsity is used. Modifiers that
        concern training have no effect.

        Args:
            model: A built model.
            data: As in `prune`.
            loss: As in `prune`.
            verbose: As in `prune`.

        Raises:
            ValueError: If the recipe prunes nothing.
        """
        pruning = [m for m in self.modifiers if isinstance(m, (PruningModifier, ReconstructionModifier))]
        if not pruning:
            raise ValueError("This recipe prunes nothing: it has no pruning modifier.")
        before = model.get_weights()
        try:
            reports = [_apply(m, model, data, loss, verbose) for m in sorted(pruning, key=lambda m: m.last_epoch)]
        except BaseException:
            model.set_weights(before)
            raise
        chosen, left_out = considered(pruning, model)
        return combined(reports, count_zeros(chosen), left_out)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the canonical form, which `load_recipe` reads back equal."""
        Path(path).write_text(str(self), encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain data, which `load_recipe` reads back equal."""
        return {"modifiers": [{m.tag: changed_fields(m)} for m in self.modifiers]}

    def __str__(self) -> str:
        return canonical_text(self.modifiers)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], variables: Mapping[str, Any] | None = None
) -> Recipe:
    """Reads a recipe and checks it.

        >>> recipe = kw.load_recipe('''
        ... last: 2.0
        ... modifiers:
        ...   - !SetLearningRateModifier
        ...     learning_rate: 0.01
        ...     start_epoch: eval(last / 2)
        ... ''', variables={"last": 3.0})
        >>> print(recipe.modifiers[0].start_epoch)
        1.5

    Args:
        source: A file (`.yaml`, `.yml`, `.md`, `.json`), the text itself, or plain data such as a JSON configuration.
        variables: Values to use instead of the recipe's own variables.

    Raises:
        RecipeError: If anything is wrong, with its line and field, what was found and what is allowed.
    """
    return Recipe(modifiers_of(read_outline(source, variables)))


def _apply(modifier: Modifier, model: keras.Model, data: Any, loss: Any, verbose: int) -> PruningReport:
    if isinstance(modifier, ReconstructionModifier):
        return prune(model, data, verbose=verbose, **modifier.arguments())
    assert isinstance(modifier, PruningModifier)
    arguments = pruning_arguments(modifier)
    if isinstance(modifier, WoodFisherPruningModifier):
        final = max((fraction for fraction, _ in modifier.levels), default=modifier.final_sparsity)
        arguments["num_grads"] = modifier.options().gradients_at(final)
        arguments["grad_batch_size"] = modifier.grad_batch_size
        arguments |= {"quality": "fast", "stages": arguments.pop("num_recomputations")}
    return prune(model, data, modifier.final_sparsity, loss=loss, verbose=verbose, **arguments)
