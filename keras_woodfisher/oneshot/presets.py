"""Presets of `prune`: how much work to spend on accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

from keras_woodfisher.options.checks import count, one_of
from keras_woodfisher.options.mask_types import UNSTRUCTURED, mask_text
from keras_woodfisher.options.pruning_options import (
    AUTO,
    CALIBRATED,
    MAGNITUDE,
    RECONSTRUCT,
    WOODFISHER,
    PruningOptions,
    checked_num_grads,
)


def _spelled(field: str) -> str:
    """The argument of `prune` that gives a field."""
    return "stages" if field == "num_recomputations" else field


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options that a preset chooses, with those of "fast" by default. See `prune` for what each means."""

    num_recomputations: int = 1
    num_grads: int | Mapping[float, int] = 512
    grad_batch_size: int = 1
    fisher: str = "empirical"
    damp: float | str = AUTO
    update: str = "joint"
    calibration: Any = 0
    newton_steps: int = 0

    def options(self) -> dict[str, Any]:
        """Those that are options of every update."""
        return PruningOptions.among(vars(self))

    def report(self, quality: str, options: PruningOptions) -> dict[str, Any]:
        """What a report says of them, and of some options: by the names of the arguments of `prune`."""
        found = {_spelled(field.name): getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.calibration, int):
            found["calibration"] = "given"
        if options.mask_type != UNSTRUCTURED:
            found["mask_type"] = mask_text(options.mask_type)
        return {"quality": quality, **found, "fisher_block_size": options.fisher_block_size, "seed": options.seed}

    @property
    def most_gradients(self) -> int:
        """The most samples of a stage."""
        return self.num_grads if isinstance(self.num_grads, int) else max(self.num_grads.values())

    @property
    def held_out(self) -> int:
        """Examples that are held out of the data."""
        return self.calibration if isinstance(self.calibration, int) else 0


CHOSEN = tuple(_spelled(field.name) for field in fields(Settings))
"""The arguments of `prune` that a preset gives a value where they are None."""

OF_GRADIENTS: Mapping[str, Any] = {
    "fisher_block_size": 2000,
    "grads_device": "cpu",
    "grads_dtype": "float32",
    "num_pages": 1,
}
"""Further ones that are about gradients, with their defaults."""

_HELD_OUT = 500
"""Examples that are held out to choose by, where a preset doesn't say."""

_BALANCED = Settings(
    num_recomputations=4, grad_batch_size=4, fisher="ggn", damp=AUTO, update=CALIBRATED, calibration=250, newton_steps=6
)
PRESETS: Mapping[str, Settings] = {
    "fast": Settings(),
    "balanced": _BALANCED,
    "best": replace(_BALANCED, num_recomputations=14, grad_batch_size=8, calibration=_HELD_OUT, newton_steps=8),
}

_LARGEST_SHARE = 10
"""At most one example in so many is held out, where a preset says how many."""

FEWEST = 200
"""With fewer examples than this, so few are held out that presets choose nothing by them."""


def chosen(name: str, given: Mapping[str, Any], available: int | None) -> Settings:
    """A preset with what was given in place of its own choices, made to fit the data.

    Args:
        name: Of the preset.
        given: Options by name; None means that the preset chooses.
        available: Examples that the data holds, where that is known.

    Raises:
        ValueError, TypeError: If there is no such preset, or an option is wrong or doesn't fit the others.
    """
    one_of("quality", name, tuple(PRESETS))
    values = {field.name: given.get(_spelled(field.name)) for field in fields(Settings)}
    explicit = {name: value for name, value in values.items() if value is not None}
    for key in ("num_recomputations", "grad_batch_size"):
        if key in explicit:
            explicit[key] = count(_spelled(key), explicit[key])
    if "num_grads" in explicit:
        explicit["num_grads"] = checked_num_grads(explicit["num_grads"])
    if "newton_steps" in explicit:
        explicit["newton_steps"] = count("newton_steps", explicit["newton_steps"], least=0)
    quality = _checked(replace(PRESETS[name], **explicit), explicit)
    if available is None:
        return quality
    asked = "update" in explicit or "calibration" in explicit or explicit.get("newton_steps")
    if quality.update == CALIBRATED and available < FEWEST and not asked:
        quality = _checked(replace(PRESETS["fast"], **explicit), explicit)
    if quality.update == CALIBRATED and "calibration" not in explicit:
        quality = replace(quality, calibration=min(quality.calibration, -(-available // _LARGEST_SHARE)))
    left = max(1, available - quality.held_out)
    if "grad_batch_size" not in explicit:
        most = max(1, left // quality.most_gradients)
        quality = replace(quality, grad_batch_size=min(quality.grad_batch_size, most))
    if "num_grads" not in explicit and isinstance(quality.num_grads, int):
        quality = replace(quality, num_grads=max(1, min(quality.num_grads, left // quality.grad_batch_size)))
    return quality


@dataclass(frozen=True)
class Circumstances:
    """What the choice of a preset depends on, beside what was given.

    Attributes:
        method: How the model is pruned.
        available: Examples that the data holds; None where there are plenty, or their number makes no difference.
        unknown_curvature: Why Gauss-Newton samples can't be taken of the loss, or None.
        batchnorm: Whether BatchNorm layers are re-estimated.
    """

    method: str = "woodfisher"
    available: int | None = None
    unknown_curvature: str | None = None
    batchnorm: bool = False


def resolve(name: str, given: Mapping[str, Any], circumstances: Circumstances) -> tuple[Settings, tuple[str, ...]]:
    """The settings of `prune`, and notes on what they don't do; arguments as in `chosen`.

    Raises:
        ValueError, TypeError: See `chosen`.
    """
    quality = chosen(name, given, circumstances.available)
    if circumstances.batchnorm and given.get("newton_steps") is None:
        # Steps fit the weights to the statistics that they find.
        quality = replace(quality, newton_steps=0)
    if circumstances.method != WOODFISHER:
        return quality, _without_effect(given, circumstances.method)
    notes: tuple[str, ...] = ()
    if given.get("update") is None and quality.update != PRESETS[name].update:
        notes += (
            f"as with quality='fast' instead of {name!r}: data holds fewer than {FEWEST} examples, too few to hold "
            "some out and choose corrections by them.",
        )
    if given.get("fisher") is None and quality.fisher == "ggn" and circumstances.unknown_curvature:
        quality = replace(quality, fisher="empirical")
        notes += (f"fisher='empirical' instead of 'ggn': {circumstances.unknown_curvature}",)
    return quality, notes


def _without_effect(given: Mapping[str, Any], method: str) -> tuple[str, ...]:
    idle = ", ".join(key for key, value in given.items() if value is not None)
    does = "takes no gradients and corrects nothing" if method == MAGNITUDE else "takes no gradients"
    return (f"method={method!r} {does}: {idle} had no effect.",) if idle else ()


def method_of(method: str | None, quality: str, given: Mapping[str, Any]) -> str:
    """The method that `prune` uses: the one that was given, else what is best on evidence.

    That is reconstruction, but for `"fast"`, which is the papers' WoodFisher, and where an option of WoodFisher is
    given.

    Raises:
        ValueError: If there is no such method.
    """
    if method is not None:
        return one_of("method", method, (WOODFISHER, MAGNITUDE, RECONSTRUCT))
    asked = any(value is not None for value in given.values())
    return WOODFISHER if quality == "fast" or asked else RECONSTRUCT


def examples_to_count(name: str, given: Mapping[str, Any]) -> int:
    """How many examples are to be counted, at most, before `resolve`; 0 where their number makes no difference.

    Raises:
        ValueError, TypeError: See `chosen`.
    """
    quality = chosen(name, given, None)
    # Whatever has to be smaller for some number of examples has to be for one.
    return 0 if chosen(name, given, 1) == quality else plenty(quality)


def plenty(quality: Settings) -> int:
    """With so many examples, or more, nothing has to be made smaller."""
    sampled = quality.most_gradients * quality.grad_batch_size
    return max(FEWEST, sampled + quality.held_out, _LARGEST_SHARE * quality.held_out)


def _checked(quality: Settings, explicit: Mapping[str, Any]) -> Settings:
    """The same, with examples to calibrate on if, and only if, something is chosen by them."""
    if quality.update == CALIBRATED:
        if "calibration" not in explicit:
            return replace(quality, calibration=quality.calibration or _HELD_OUT)
        if isinstance(quality.calibration, Integral):
            mend = "update='calibrated' chooses by the loss on these examples; update='joint' needs none."
            return replace(quality, calibration=count("calibration", quality.calibration, mend))
        return quality
    for key in ("calibration", "newton_steps"):
        if explicit.get(key):
            raise ValueError(f"{key} is for update='calibrated', got update={quality.update!r}. Leave one of them out.")
    return replace(quality, calibration=0, newton_steps=0)
