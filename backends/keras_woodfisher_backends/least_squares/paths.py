"""Supports of small matrices: for each output the best one of every size, then the sizes that go best together.

Exchanges one by one can't move weights from one output to another where that pays only for several at once.
"""

import numpy as np

from keras_woodfisher_backends.least_squares.exchange import Moves, best_moves
from keras_woodfisher_backends.least_squares.kept_values import least_squares

SMALL = 128
"""Entries of a matrix up to which this is done."""

_FEW = 10
"""Weights of an output up to which all of their subsets are tried."""


def best_sizes(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, free: np.ndarray) -> np.ndarray:
    """A support with as many weights as `kept` has, (g, k, o) bool; arguments as those of `exchange`."""
    outputs = [(branch, column) for branch in range(cross.shape[0]) for column in range(cross.shape[2])]
    budget = int((kept & free).sum())
    empty: list[list[int]] = [[]]
    # Of each number of weights that the outputs so far may have: the largest sum of gains, and the sizes that make it.
    total, sizes = np.array([0.0]), empty
    found = []
    for b, c in outputs:
        fixed = kept[b, :, c] & ~free[b, :, c]
        search = _every_subset if free[b, :, c].sum() <= _FEW else _path
        supports, gains = search(gram[b], cross[b, :, c], fixed, free[b, :, c])
        found.append(supports)
        joint = np.full(min(budget, len(total) + len(gains) - 2) + 1, -np.inf)
        best = np.zeros(len(joint), int)
        for size, gain in enumerate(gains[: len(joint)]):
            there = slice(size, min(len(joint), size + len(total)))
            value = total[: there.stop - size] + gain
            better = value > joint[there]
            joint[there] = np.where(better, value, joint[there])
            best[there] = np.where(better, size, best[there])
        sizes = [[*sizes[number - best[number]], int(best[number])] for number in range(len(joint))]
        total = joint
    out = kept.copy()
    for (b, c), supports, size in zip(outputs, found, sizes[budget], strict=True):
        out[b, :, c] = supports[size]
    return out


def _every_subset(
    gram: np.ndarray, cross: np.ndarray, fixed: np.ndarray, free: np.ndarray
) -> tuple[list[np.ndarray], list[float]]:
    """For each number of free weights the best support, and `B_S H_SS^-1 B_S`."""
    places = np.flatnonzero(free)
    subsets = np.arange(2 ** len(places))[:, None] >> np.arange(len(places)) & 1 == 1
    kept = np.repeat(fixed[None], len(subsets), axis=0)
    kept[:, places] = subsets
    values = least_squares(gram[None], np.repeat(cross[None, :, None], len(kept), axis=2), kept.T[None])
    gains, sizes = cross @ values[0], subsets.sum(axis=1)
    best = [np.flatnonzero(sizes == size)[gains[sizes == size].argmax()] for size in range(len(places) + 1)]
    return [kept[place] for place in best], [float(gains[place]) for place in best]


def _path(
    gram: np.ndarray, cross: np.ndarray, fixed: np.ndarray, free: np.ndarray
) -> tuple[list[np.ndarray], list[float]]:
    """For each number of free weights the best support found, upwards and then downwards, and `B_S H_SS^-1 B_S`."""
    most = int(free.sum())
    supports: list[np.ndarray] = []
    gains: list[float] = []
    support = fixed.copy()
    for size in range(most + 1):
        if size:
            support = support.copy()
            support[_best_move(gram, cross, support, free).addition] = True
        support = _exchanged(gram, cross, support, free)
        supports.append(support)
        gains.append(_gain(gram, cross, support))
    for size in range(most - 1, -1, -1):
        support = supports[size + 1].copy()
        support[_best_move(gram, cross, support, free).removal] = False
        support = _exchanged(gram, cross, support, free)
        if (gain := _gain(gram, cross, support)) > gains[size]:
            supports[size], gains[size] = support, gain
    return supports, gains


def _exchanged(gram: np.ndarray, cross: np.ndarray, support: np.ndarray, free: np.ndarray) -> np.ndarray:
    gain = _gain(gram, cross, support)
    while True:
        addition, removal = _best_move(gram, cross, support, free).pair
        if addition < 0:
            return support
        other = support.copy()
        other[[addition, removal]] = True, False
        if (better := _gain(gram, cross, other)) <= gain * (1 + 1e-9):
            return support
        support, gain = other, better


def _best_move(gram: np.ndarray, cross: np.ndarray, support: np.ndarray, free: np.ndarray) -> Moves:
    return best_moves(gram, cross[:, None], support[:, None], free[:, None])[0]


def _gain(gram: np.ndarray, cross: np.ndarray, support: np.ndarray) -> float:
    inside = np.flatnonzero(support)
    return float(cross[inside] @ np.linalg.solve(gram[np.ix_(inside, inside)], cross[inside]))
