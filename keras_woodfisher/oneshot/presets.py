"""Presets of `prune`: how much work to spend on accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from keras_woodfisher.options.checks import count, one_of
from keras_woodfisher.options.pruning_options import CALIBRATED, checked_num_grads


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The options that a preset chooses. See `prune` for what each means."""

    stages: int
    num_grads: int | Mapping[float, int]
    grad_batch_size: int
    fisher: str
    damp: float | str
    update: str
    calibration: Any
    newton_steps: int

    @property
    def most_gradients(self) -> int:
        """The most samples of a stage."""
        return self.num_grads if isinstance(self.num_grads, int) else max(self.num_grads.values())

    @property
    def held_out(self) -> int:
        """Examples that are held out of the data."""
        return self.calibration if isinstance(self.calibration, int) else 0


_HELD_OUT = 500
"""Examples that are held out to choose by, where a preset doesn't say."""


PRESETS: Mapping[str, Quality] = {
    "fast": Quality(
        stages=1,
        num_grads=512,
        grad_batch_size=1,
        fisher="empirical",
        damp=1e-5,
        update="joint",
        calibration=0,
        newton_steps=0,
    ),
    "balanced": Quality(
        stages=4,
        num_grads=512,
        grad_batch_size=4,
        fisher="ggn",
        damp="auto",
        update=CALIBRATED,
        calibration=250,
        newton_steps=6,
    ),
    "best": Quality(
        stages=14,
        num_grads=512,
        grad_batch_size=8,
        fisher="ggn",
        damp="auto",
        update=CALIBRATED,
        calibration=_HELD_OUT,
        newton_steps=8,
    ),
}


_LARGEST_SHARE = 10
"""At most one example in so many is held out, where a preset says how many."""


FEWEST = 200
"""With fewer examples than this, so few are held out that presets choose nothing by them."""


def chosen(name: str, given: Mapping[str, Any], available: int | None) -> Quality:
    """A preset with what was given in place of its own choices, made to fit the data.

    Args:
        name: Of the preset.
        given: Options by name; None means that the preset chooses.
        available: Examples that the data holds, where that is known.

    Raises:
        ValueError, TypeError: If there is no such preset, or an option is wrong or doesn't fit the others.
    """
    one_of("quality", name, tuple(PRESETS))
    explicit = {key: value for key, value in given.items() if value is not None}
    for key in ("stages", "grad_batch_size"):
        if key in explicit:
            explicit[key] = count(key, explicit[key])
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


def plenty(quality: Quality) -> int:
    """With so many examples, or more, nothing has to be made smaller."""
    sampled = quality.most_gradients * quality.grad_batch_size
    return max(FEWEST, sampled + quality.held_out, _LARGEST_SHARE * quality.held_out)


def _checked(quality: Quality, explicit: Mapping[str, Any]) -> Quality:
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
