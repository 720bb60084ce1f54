"""Which weights of a small group to remove: the sets that cost least together."""

from math import comb

import numpy as np

MOST_SETS = 70
"""Up to so many sets of one size are compared (4:8 has 70); of larger groups weights go one after the other."""


def cheapest_sets(
    inverse: np.ndarray, lower_bounds: np.ndarray, weights: np.ndarray, allowed: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """For n groups of M weights, the sets of 1, 2, ..., `most` weights with the least `w_S^T (M_SS)^-1 w_S`.

    All sets are compared, each by its joint cost, where no size has more than `MOST_SETS`; else the weight that costs
    least goes first, then the one that costs least after that, and so on. Equal costs fall to the set that comes first.

        >>> weights, everything = np.array([[3.0, -1.0, 2.0]]), np.ones((1, 3), bool)
        >>> costs, sets = cheapest_sets(np.eye(3)[None], np.full((1, 3), 0.1), weights, everything, 2)
        >>> costs.tolist(), sets.astype(int).tolist()
        ([[1.0, 5.0]], [[[0, 1, 0], [0, 1, 1]]])

    Args:
        inverse: (n, M, M) float64, a positive multiple of the inverse Fisher of each group.
        lower_bounds: (n, M), below which no pivot of a weight is taken to be, whatever rounding says.
        weights: (n, M).
        allowed: (n, M) bool, the weights that may go.
        most: The largest number of weights to remove of a group.

    Returns:
        Costs (n, most), infinite where so many weights may not go, and sets (n, most, M) bool.
    """
    size = weights.shape[1]
    if max(comb(size, number) for number in range(1, most + 1)) > MOST_SETS:
        return _greedy_sets(inverse, lower_bounds, weights, allowed, most)
    search = _Search(lower_bounds, allowed, most)
    search.extend([], inverse, weights, np.zeros(len(weights)))
    return search.costs, search.sets


class _Search:
    """All sets of up to `most` weights, in lexicographic order."""

    def __init__(self, lower_bounds: np.ndarray, allowed: np.ndarray, most: int):
        self._lower_bounds = lower_bounds
        self._allowed = allowed
        self.costs = np.full((len(lower_bounds), most), np.inf)
        self.sets = np.zeros((len(lower_bounds), most, lower_bounds.shape[1]), bool)

    def extend(self, taken: list[int], inverse: np.ndarray, weights: np.ndarray, cost: np.ndarray) -> None:
        """Adds each later weight to a set; `inverse` and `weights` are those of the later weights when it is gone."""
        number, first = len(taken), self._lower_bounds.shape[1] - weights.shape[1]
        for place in range(weights.shape[1]):
            index = first + place
            pivot = np.maximum(inverse[:, place, place], self._lower_bounds[:, index])
            total = cost + np.where(self._allowed[:, index], np.square(weights[:, place]) / pivot, np.inf)
            better = total < self.costs[:, number]
            self.costs[better, number] = total[better]
            self.sets[better, number] = np.isin(np.arange(self._lower_bounds.shape[1]), [*taken, index])
            if number + 1 < self.costs.shape[1]:
                later = slice(place + 1, None)
                row = inverse[:, place, later]
                column = inverse[:, later, place] / pivot[:, None]
                rest = inverse[:, later, later] - column[:, :, None] * row[:, None, :]
                self.extend([*taken, index], rest, weights[:, later] - column * weights[:, place, None], total)


def _greedy_sets(
    inverse: np.ndarray, lower_bounds: np.ndarray, weights: np.ndarray, allowed: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    number, size = weights.shape
    every = np.arange(number)
    inverse, weights, left = inverse.copy(), weights.copy(), allowed.copy()
    costs, sets = np.empty((number, most)), np.zeros((number, most, size), bool)
    total, gone = np.zeros(number), np.zeros((number, size), bool)
    for step in range(most):
        pivots = np.maximum(np.diagonal(inverse, axis1=1, axis2=2), lower_bounds)
        each = np.where(left, np.square(weights) / pivots, np.inf)
        next_one = each.argmin(1)
        total = total + each[every, next_one]
        gone[every, next_one] = True
        costs[:, step], sets[:, step] = total, gone
        column = inverse[every, :, next_one] / pivots[every, next_one, None]
        weights -= column * weights[every, next_one, None]
        inverse -= column[:, :, None] * inverse[every, next_one][:, None, :]
        left[every, next_one] = False
    return costs, sets
