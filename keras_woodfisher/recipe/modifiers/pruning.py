"""The modifiers of recipes, as data: which fields each has, what they may hold, and what they mean here.

Whatever dialect a recipe is written in, `normal` gives the same modifier, with every default filled in.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from keras_woodfisher.options.checks import count, names
from keras_woodfisher.options.mask_types import check_final, checked_mask
from keras_woodfisher.options.option import INVERSE, RAMP, UPDATE
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import checked_schedule
from keras_woodfisher.options.sparsity_levels import Levels, checked_levels, names_of
from keras_woodfisher.options.table import in_group
from keras_woodfisher.recipe.modifiers.fields import (
    LogTypes,
    Mask,
    Names,
    Params,
    Position,
    Sampler,
    Unphased,
    with_options,
)


def recipe_mask(mask: str | tuple[int, int]) -> str | tuple[int, int]:
    """A mask type as the options have it."""
    return checked_mask("2:4" if mask == "tensorrt" else mask)


def _always_global(modifier: Any) -> Any:
    if modifier.global_sparsity is False or modifier.levels:
        raise ValueError(
            f"global_sparsity: a {modifier.tag} ranks all weights together. Use "
            f"{modifier.tag.replace('Global', '')} for a sparsity of each variable."
        )
    return modifier


class Modifier(BaseModel):
    """One item of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    tag: ClassVar[str]

    def normal(self) -> "Modifier":
        """The same modifier in the project's own terms."""
        return self

    @property
    def first_epoch(self) -> float:
        """Where its work begins, in epochs."""
        return float(getattr(self, "start_epoch", 0.0))

    @property
    def last_epoch(self) -> float:
        """Where its work ends, in epochs; -1 where it lasts as long as training."""
        return float(getattr(self, "end_epoch", -1.0))

    def shifted(self, epochs: float) -> "Modifier":
        """The modifier in a later stage, which begins after so many epochs."""
        moved: dict[str, Any] = {
            name: max(getattr(self, name), 0.0 if name == "start_epoch" else -1.0) + epochs
            for name in ("start_epoch", "end_epoch")
            if name in type(self).model_fields and (name == "start_epoch" or getattr(self, name) != -1)
        }
        return self.model_copy(update=moved) if epochs else self


_Ramp: Any = with_options(RAMP, Modifier)


class PruningModifier(_Ramp):
    """What all pruning modifiers with a ramp have in common."""

    _global: ClassVar[bool] = True

    log_types: LogTypes = Field(None, description="Accepted where it says __ALL__.")
    phased: Unphased = Field(None, description="Accepted where false.")

    @model_validator(mode="after")
    def _check(self) -> "PruningModifier":
        finals = [fraction for fraction, _ in self.levels] or [self.final_sparsity]
        if self.levels and self.params:
            raise ValueError(
                f"params must be [] where final_sparsity is a mapping, since that names the variables; "
                f"got {self.params!r}."
            )
        if self.levels and self.global_sparsity:
            raise ValueError(
                "global_sparsity must not be true where final_sparsity is a mapping, which gives each variable a "
                "sparsity of its own."
            )
        if not self.levels and not self.params:
            raise ValueError("params must name something to prune: __ALL_PRUNABLE__, or names and re: patterns.")
        names("params", self.params)
        names("exclude", self.exclude)
        mask = recipe_mask(self.mask_type)
        ramp = (self.init_sparsity, min(finals), self.start_epoch, self.end_epoch)
        checked_schedule(*ramp, self.update_frequency, self.inter_func)
        check_final(mask, max(finals))
        return self

    @property
    def levels(self) -> Levels:
        """The final sparsities and the names that each goes for, where they differ; else none."""
        return checked_levels(self.final_sparsity) if isinstance(self.final_sparsity, Mapping) else ()

    def _is_global(self) -> bool:
        chosen = self._global if self.global_sparsity is None else self.global_sparsity
        return chosen and not self.levels

    def _normal_ramp(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in PruningModifier.model_fields}
        fields |= {"global_sparsity": self._is_global(), "mask_type": recipe_mask(self.mask_type)}
        return fields | {"start_epoch": max(self.start_epoch, 0.0), "update_frequency": max(self.update_frequency, 0.0)}


class MagnitudePruningModifier(PruningModifier):
    """Removes the smallest weights and leaves the others. Each variable by itself unless the recipe says otherwise."""

    tag = "MagnitudePruningModifier"
    _global = False

    score_type: Literal["magnitude"] = Field("magnitude", description="Accepted where it says magnitude.")

    def normal(self) -> "Modifier":
        return MagnitudePruningModifier(**self._normal_ramp())


class GMPruningModifier(MagnitudePruningModifier):
    """`MagnitudePruningModifier` under its older name (gradual magnitude pruning)."""

    tag = "GMPruningModifier"


class GlobalMagnitudePruningModifier(MagnitudePruningModifier):
    """Removes the smallest weights of all variables together."""

    tag = "GlobalMagnitudePruningModifier"
    _global = True

    _stays_global = model_validator(mode="after")(_always_global)


_Inverse: Any = with_options(INVERSE, BaseModel)


class FisherOptions(_Inverse):
    """`mfac_options`: the fields of the inverse Fisher, nested as the oldest recipes have them."""

    model_config = Modifier.model_config

    use_gradient_buffering: bool | None = Field(
        None, description="null: sample from data where there is any; true: buffer; false: data is required."
    )


_Update: Any = with_options(UPDATE, FisherOptions, PruningModifier)


class SecondOrderModifier(_Update):
    """What the second-order modifiers have in common: the fields of the inverse Fisher, flat or nested."""

    model_config = Modifier.model_config

    available_devices: Names | None = Field(None, description="available_gpus under its younger name.")
    mfac_options: FisherOptions | None = None
    grad_sampler_kwargs: Sampler | None = Field(
        None, description="batch_size: examples averaged into one gradient sample."
    )
    score_type: str | None = Field(None, description="Accepted where it names the tag's own score.")

    _score: ClassVar[str] = "MFAC"

    @model_validator(mode="after")
    def _check_fisher(self) -> "SecondOrderModifier":
        if self.score_type not in (None, self._score):
            raise ValueError(
                f"score_type must be {self._score}, the score of a {self.tag}, or be left out; got {self.score_type!r}."
            )
        self.options()
        return self

    def _fisher(self) -> dict[str, Any]:
        """The fields of the inverse Fisher, wherever they were written."""
        flat = {name: getattr(self, name) for name in FisherOptions.model_fields}
        written = self.model_fields_set
        if self.available_devices is not None:
            if "available_gpus" in written:
                raise ValueError("available_gpus and available_devices are the same field. Leave one of them out.")
            flat["available_gpus"] = self.available_devices
            written = written | {"available_gpus"}
        if self.mfac_options is not None:
            nested = self.mfac_options.model_fields_set
            if both := sorted(nested & written):
                raise ValueError(f"{', '.join(both)}: written in mfac_options and beside it. Leave one of them out.")
            flat |= {name: getattr(self.mfac_options, name) for name in nested}
        return flat | {"fisher_block_size": flat["fisher_block_size"] or None}

    def _batch(self) -> int:
        if not self.grad_sampler_kwargs:
            return count("grad_batch_size", self.grad_batch_size)
        if "grad_batch_size" in self.model_fields_set:
            raise ValueError("grad_batch_size and grad_sampler_kwargs are the same field. Leave one of them out.")
        return count("batch_size", self.grad_sampler_kwargs["batch_size"])

    def options(self) -> PruningOptions:
        """How its updates work."""
        update = self._update()
        del update["use_gradient_buffering"]
        return PruningOptions.of(
            **update,
            params=self.params or names_of(self.levels),
            exclude=self.exclude,
            mask_type=recipe_mask(self.mask_type),
            global_sparsity=self._is_global(),
        )

    def _update(self) -> dict[str, Any]:
        """The fields of its normal form that magnitude pruning doesn't have."""
        own = {row.name: getattr(self, row.name) for row in in_group(UPDATE)}
        return self._fisher() | own | {"grad_batch_size": self._batch()}

    def normal(self) -> "Modifier":
        update = self._update()
        update |= {"available_gpus": update["available_gpus"] or None, "num_grads": self.options().num_grads}
        return WoodFisherPruningModifier(**self._normal_ramp(), **update)


class WoodFisherPruningModifier(SecondOrderModifier):
    """Removes the weights whose loss is cheapest and corrects the others. Global unless the recipe says otherwise."""

    tag = "WoodFisherPruningModifier"
    _score = "woodfisher"


class MFACPruningModifier(SecondOrderModifier):
    """`WoodFisherPruningModifier` under SparseML's name."""

    tag = "MFACPruningModifier"


class MFACGlobalPruningModifier(SecondOrderModifier):
    """The same, always global."""

    tag = "MFACGlobalPruningModifier"

    _stays_global = model_validator(mode="after")(_always_global)


_SmallBlocks: Any = with_options(INVERSE, SecondOrderModifier, num_grads=1024, damp=1e-7, fisher_block_size=50)


class OBSPruningModifier(_SmallBlocks):
    """Optimal BERT Surgeon: small blocks, many gradients, global."""

    tag = "OBSPruningModifier"
    _score = "OBS"


class ConstantPruningModifier(Modifier):
    """Holds the zeros that are there at start_epoch."""

    tag = "ConstantPruningModifier"

    params: Params = Field(description="__ALL__, __ALL_PRUNABLE__, or names and re: patterns.")
    start_epoch: Position = 0.0
    end_epoch: Position = -1.0
    update_frequency: float | None = Field(None, description="Any number: zeros are held at each step.")
    log_types: LogTypes = Field(None, description="Accepted where it says __ALL__.")
    exclude: Names = Field((), description="Names and patterns to leave out.")
    mask_type: Mask = Field("unstructured", description="Any: zeros are held whatever their pattern.")
    leave_enabled: Literal[True] = Field(True, description="Accepted where true.")

    @model_validator(mode="after")
    def _check(self) -> "ConstantPruningModifier":
        recipe_mask(self.mask_type)
        return self

    def normal(self) -> "Modifier":
        same = {"update_frequency": None, "mask_type": "unstructured"}
        return self.model_copy(update=same | {"start_epoch": max(self.start_epoch, 0.0)})
