"""Learning rates as pure functions of the position in training (in epochs)."""

import difflib
import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from keras_woodfisher.callbacks.epoch_callback import TOLERANCE
from keras_woodfisher.options.checks import count, number


def linear(x: float, init: float, final: float) -> float:
    """A straight line.

    >>> [linear(x, 1.0, 0.5) for x in (0.0, 0.5, 1.0)]
    [1.0, 0.75, 0.5]
    """
    return final + (1.0 - x) * (init - final)


def cosine(x: float, init: float, final: float) -> float:
    """Half a cosine.

    >>> [round(cosine(x, 1.0, 0.2), 3) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [1.0, 0.883, 0.6, 0.317, 0.2]
    """
    return final + 0.5 * (1.0 + math.cos(math.pi * x)) * (init - final)


FUNCTIONS = {"linear": linear, "cosine": cosine, "cyclic_linear": linear}


def function_value(
    kind: str, position: float, init: float, final: float, start: float, end: float, cycle: float
) -> float | None:
    """The rate of `LearningRateFunction` at a position; None before `start`.

    >>> [function_value("linear", p, 1.0, 0.5, 1, 3, 1.0) for p in (0.9, 1.0, 2.0, 3.0, 9.0)]
    [None, 1.0, 0.75, 0.5, 0.5]
    >>> [function_value("cyclic_linear", p, 1.0, 0.5, 1, 3, 1.0) for p in (1.0, 1.5, 2.0, 2.5, 3.0)]
    [1.0, 0.75, 1.0, 0.75, 0.5]
    """
    if position < start - TOLERANCE:
        return None
    if position >= end - TOLERANCE:
        return final
    if kind == "cyclic_linear":
        cycles = (position - start) / cycle
        x = cycles - math.floor(cycles + TOLERANCE)
    else:
        x = (position - start) / (end - start)
    return FUNCTIONS[kind](max(x, 0.0), init, final)


def _power(gamma: float, times: int) -> float:
    try:
        return float(gamma**times)
    except OverflowError:
        return math.inf


def step_lr(epoch: int, init: float, *, step_size: int, gamma: float = 0.1) -> float:
    """`init * gamma ** (epoch // step_size)`, PyTorch's StepLR.

    >>> [step_lr(epoch, 1.0, step_size=2, gamma=0.5) for epoch in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    return init * _power(gamma, epoch // step_size)


def multi_step_lr(epoch: int, init: float, *, milestones: tuple[int, ...], gamma: float = 0.1) -> float:
    """`gamma` once more at each milestone, PyTorch's MultiStepLR.

    >>> [multi_step_lr(epoch, 1.0, milestones=(1, 3), gamma=0.5) for epoch in range(5)]
    [1.0, 0.5, 0.5, 0.25, 0.25]
    """
    return init * _power(gamma, bisect_right(sorted(milestones), epoch))


def exponential_lr(epoch: int, init: float, *, gamma: float) -> float:
    """`init * gamma ** epoch`, PyTorch's ExponentialLR.

    >>> [exponential_lr(epoch, 1.0, gamma=0.5) for epoch in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """
    return init * _power(gamma, epoch)


def cosine_annealing_warm_restarts(
    epoch: int, init: float, *, T_0: int, T_mult: int = 1, eta_min: float = 0.0
) -> float:
    """Half cosines of `T_0`, `T_0 * T_mult`, ... epochs, PyTorch's CosineAnnealingWarmRestarts (arXiv 1608.03983).

    >>> [round(cosine_annealing_warm_restarts(epoch, 1.0, T_0=2, T_mult=2), 3) for epoch in range(7)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """
    length = T_0
    while epoch >= length:
        epoch, length = epoch - length, length * T_mult
    return cosine(epoch / length, init, eta_min)


SCHEDULES: dict[str, Callable[..., float]] = {
    "StepLR": step_lr,
    "MultiStepLR": multi_step_lr,
    "ExponentialLR": exponential_lr,
    "CosineAnnealingWarmRestarts": cosine_annealing_warm_restarts,
}


def schedule_value(
    kind: str, settings: Mapping[str, Any], position: float, init: float, start: float, end: float
) -> float | None:
    """The rate of `LearningRateSchedule` at a position: one step of PyTorch's schedule an epoch.

    >>> [schedule_value("ExponentialLR", {"gamma": 0.5}, p, 1.0, 0.5, 2.5) for p in (0.0, 0.5, 1.4, 1.5, 2.4, 2.5, 9)]
    [None, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    """
    if position < start - TOLERANCE:
        return None
    # From `end` on, the rate of the last epoch that began before it.
    last = math.inf if math.isinf(end) else math.ceil(end - start - TOLERANCE) - 1
    epoch = min(math.floor(position - start + TOLERANCE), last)
    return SCHEDULES[kind](int(epoch), init, **settings)


def checked_settings(kind: str, settings: Any) -> dict[str, Any]:
    """The arguments of one of PyTorch's schedules.

    Raises:
        TypeError: If it isn't a mapping, or an argument is of the wrong kind.
        ValueError: If an argument is missing, unknown or out of range.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"lr_kwargs must be a dictionary of the arguments of {kind}, got {settings!r}.")
    parameters = inspect.signature(SCHEDULES[kind]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"lr_kwargs has {name!r}, but {kind} takes {', '.join(known)}.{hint}")
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in settings]
    if missing:
        raise ValueError(f"lr_kwargs of {kind} must have {missing[0]!r}, got {dict(settings)!r}.")
    return {name: _CHECKS[name](name, value) for name, value in settings.items()}


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name} must be a list of whole numbers of epochs, got {value!r}.")
    return tuple(count(f"each of {name}", item, least=0) for item in value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "step_size": count,
    "milestones": _milestones,
    "gamma": partial(number, above=0.0),
    "T_0": count,
    "T_mult": count,
    "eta_min": partial(number, least=0.0),
}
