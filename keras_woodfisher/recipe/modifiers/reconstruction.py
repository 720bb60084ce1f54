"""The modifier that prunes in one shot, before training, by reconstruction."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from keras_woodfisher.options.checks import count, fraction
from keras_woodfisher.options.mask_types import check_final
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.sparsity_levels import Levels, checked_levels, names_of
from keras_woodfisher.recipe.modifiers.fields import Mask, Names, Params, Sparsities, Whole
from keras_woodfisher.recipe.modifiers.pruning import (
    ConstantPruningModifier,
    Modifier,
    PruningModifier,
    recipe_mask,
)


class ReconstructionModifier(Modifier):
    """Prunes in one shot, before training, by reconstruction: each layer's output as near as can be to the dense one's.

    The project's own: no other dialect has it. A `ConstantPruningModifier` beside it holds the zeros while training.
    """

    tag = "ReconstructionModifier"

    final_sparsity: Sparsities = Field(description="Fraction of zeros to reach, or fraction: names.")
    params: Params = Field("__ALL_PRUNABLE__", description="__ALL__, __ALL_PRUNABLE__, or names and re: patterns.")
    exclude: Names = Field((), description="Names and patterns to leave out.")
    global_sparsity: bool = Field(True, description="Rank all weights together, or each variable by itself.")
    mask_type: Mask = Field("unstructured", description="As in the other pruning modifiers.")
    quality: Literal["fast", "balanced", "best"] = Field("balanced", description="How much work to spend.")
    num_examples: Whole | None = Field(None, description="Examples to reconstruct layers by; null: by quality.")
    memory_limit: Whole | str | None = Field(None, description="Bytes, or a text such as 4GiB.")
    seed: Whole | None = Field(0, description="Seed of the choice of examples from arrays.")

    @model_validator(mode="after")
    def _check(self) -> "ReconstructionModifier":
        if not self.levels and not self.params:
            raise ValueError("params must name something to prune: __ALL_PRUNABLE__, or names and re: patterns.")
        finals = [level for level, _ in self.levels] or [fraction("final_sparsity", self.final_sparsity)]
        check_final(recipe_mask(self.mask_type), max(finals))
        self.options()
        if self.num_examples is not None:
            count("num_examples", self.num_examples)
        return self

    @property
    def first_epoch(self) -> float:
        return -1.0

    @property
    def levels(self) -> Levels:
        """As in `PruningModifier`."""
        return checked_levels(self.final_sparsity) if isinstance(self.final_sparsity, Mapping) else ()

    def arguments(self) -> dict[str, Any]:
        """The arguments of `prune`."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if self.levels:
            fields |= {"params": None, "global_sparsity": None}
        return fields | {"sparsity": fields.pop("final_sparsity"), "method": "reconstruct"}

    def options(self) -> PruningOptions:
        """What it prunes, and how."""
        return PruningOptions.of(
            params=names_of(self.levels) or self.params,
            exclude=self.exclude,
            global_sparsity=self.global_sparsity and not self.levels,
            mask_type=recipe_mask(self.mask_type),
            memory_limit=self.memory_limit,
            seed=self.seed,
            method="reconstruct",
        )

    def normal(self) -> "Modifier":
        return self.model_copy(update={"mask_type": recipe_mask(self.mask_type)})


PRUNING = (PruningModifier, ConstantPruningModifier, ReconstructionModifier)
"""Modifiers whose work is zeros."""
