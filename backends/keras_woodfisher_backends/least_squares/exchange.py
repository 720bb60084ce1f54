"""Exchanges of single weights: one that is kept goes, another one comes, as long as the output error falls.

For an output with support S, `P = H_SS^-1` and `w = P B_S`, removing j costs `w_j^2 / P_jj` and adding i gains
`r_i^2 / s_i`, with the residual `r = B - H w` and `s_i = H_ii - H_iS P H_Si`; of a pair in the same output the two
interact by `M = H_NS P`. Outputs don't influence each other, so that each may take part in one exchange a round.
"""

from typing import NamedTuple

import numpy as np

_FLOPS = 2e10
"""Work that exchanges of one matrix may take, by an estimate."""

_ROUNDS = 40
_ENOUGH = 0.03
"""A round that gains less than this part of the first one is the last."""

_ALIKE = 1.25
"""Supports that are larger than others by at most this factor are filled up to the same size."""

_NUMBERS = 2**17
"""Numbers of a matrix that are worked on together."""

_LEAST = 1e-9
"""Exchanges that gain less than this part of the largest gain aren't made: rounding could have them go round."""


class Moves(NamedTuple):
    """What could be done in one output: its cheapest removal, its best addition, and the best pair of both."""

    cost: float
    removal: int
    gain: float
    addition: int
    pair_gain: float
    pair: tuple[int, int]


def exchange(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, free: np.ndarray) -> np.ndarray:
    """A better support of the same size, (g, k, o) bool.

    Args:
        gram: H, (g, k, k), positive definite.
        cross: B, (g, k, o).
        kept: The support, (g, k, o) bool.
        free: The weights that may come or go, (g, k, o) bool.
    """
    kept = kept.copy()
    outputs = [(branch, column) for branch in range(cross.shape[0]) for column in range(cross.shape[2])]
    moves: dict[tuple[int, int], Moves] = {}
    changed, work, first = outputs, 0.0, 0.0
    for _ in range(_ROUNDS):
        work += sum(_work(gram.shape[1], int(kept[b, :, c].sum())) for b, c in changed)
        if work > _FLOPS:
            break
        for branch in {b for b, _ in changed}:
            columns = [c for b, c in changed if b == branch]
            some = (array[branch][:, columns] for array in (cross, kept, free))
            moves |= zip(((branch, c) for c in columns), best_moves(gram[branch], *some), strict=True)
        least = _LEAST * max(move.gain for move in moves.values())
        pairs = pairs_of(moves, least)
        changed, gained = [], 0.0
        for giver, taker in pairs:
            gained += moves[taker].gain - moves[giver].cost
            kept[giver[0], moves[giver].removal, giver[1]] = False
            kept[taker[0], moves[taker].addition, taker[1]] = True
            changed += [giver, taker]
        busy = set(changed)
        for output, move in moves.items():
            if output not in busy and move.pair_gain > least:
                addition, removal = move.pair
                kept[output[0], removal, output[1]] = False
                kept[output[0], addition, output[1]] = True
                changed.append(output)
                gained += move.pair_gain
        first = max(first, gained)
        if gained <= _ENOUGH * first:
            break
    return kept


def _work(inputs: int, size: int) -> float:
    return 2.0 * inputs * size**2 + size**3 + 1e5


def pairs_of(moves: dict[tuple[int, int], Moves], least: float) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Outputs that give a weight, each with one that takes it: the cheapest removals for the best additions."""
    givers = iter(sorted((key for key in moves if moves[key].removal >= 0), key=lambda key: moves[key].cost))
    takers = sorted((key for key in moves if moves[key].addition >= 0), key=lambda key: -moves[key].gain)
    busy: set[tuple[int, int]] = set()
    found = []
    giver = next(givers, None)
    for taker in takers:
        while giver is not None and (giver in busy or giver == taker):
            giver = next(givers, None)
        if giver is None:
            break
        if taker in busy:
            continue
        better = moves[taker].gain - moves[giver].cost
        if better <= least:
            break
        if better > max(moves[taker].pair_gain, 0.0) + max(moves[giver].pair_gain, 0.0):
            found.append((giver, taker))
            busy |= {giver, taker}
    return found


def best_moves(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, free: np.ndarray) -> list[Moves]:
    """Of each output of one branch: gram (k, k), cross, kept and free (k, o).

    Outputs that keep about as many weights are worked on together, as many as a cache holds.
    """
    sizes = kept.sum(0)
    order = np.argsort(sizes, kind="stable")
    found: dict[int, Moves] = {}
    while len(found) < len(order):
        rest = order[len(found) :]
        least = int(sizes[rest[0]])
        alike = int(np.searchsorted(sizes[rest], _ALIKE * least + 2, side="right"))
        few = max(1, _NUMBERS // max(1, (len(gram) - least) * int(sizes[rest[alike - 1]])))
        some = rest[: min(alike, few)]
        found |= zip(some.tolist(), _moves(gram, *(array[:, some].T for array in (cross, kept, free))), strict=True)
    return [found[column] for column in range(len(sizes))]


def _moves(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, free: np.ndarray) -> list[Moves]:
    """The same with the outputs first: gram (k, k), the others (o, k). Smaller supports are filled up."""
    outputs, inputs = kept.shape
    sizes = kept.sum(1)
    order = np.argsort(~kept, axis=1, kind="stable")
    inside, outside = order[:, : max(1, sizes.max())], order[:, min(sizes.min(), inputs - 1) :]
    rows = np.arange(outputs)[:, None]
    used, unused = kept[rows, inside], ~kept[rows, outside]
    goes, comes = used & free[rows, inside], unused & free[rows, outside]
    system, between = gram[inside[:, :, None], inside[:, None, :]], gram[outside[:, :, None], inside[:, None, :]]
    if not used.all():
        system = np.where(used[:, :, None] & used[:, None, :], system, np.eye(inside.shape[1]))
        between *= used[:, None, :]
    inverse = np.linalg.inv(system)
    values = (inverse @ np.where(used, cross[rows, inside], 0.0)[:, :, None])[:, :, 0]
    spread = np.einsum("oii->oi", inverse)
    mixed = between @ inverse
    residual = cross[rows, outside] - (between @ values[:, :, None])[:, :, 0]
    diagonal = gram.diagonal()[outside]
    room = np.maximum(diagonal - np.einsum("oij,oij->oi", mixed, between), 1e-12 * diagonal)
    costs = np.where(goes, values**2 / spread, np.inf)
    gains = np.where(comes, residual**2 / room, -np.inf)
    both = mixed * (values / spread)[:, None]
    both += residual[:, :, None]
    np.square(both, out=both)
    both /= room[:, :, None] + mixed**2 / spread[:, None]
    both -= costs[:, None]
    both[~comes] = -np.inf
    pairs = both.reshape(outputs, -1).argmax(1)
    best = both.reshape(outputs, -1)[np.arange(outputs), pairs]
    found = []
    for i, (removal, addition) in enumerate(zip(costs.argmin(1), gains.argmax(1), strict=True)):
        cost, gain = float(costs[i, removal]), float(gains[i, addition])
        one, other = np.unravel_index(pairs[i], both.shape[1:])
        found.append(
            Moves(
                cost,
                int(inside[i, removal]) if cost < np.inf else -1,
                gain,
                int(outside[i, addition]) if gain > -np.inf else -1,
                float(best[i]),
                (int(outside[i, one]), int(inside[i, other])) if best[i] > -np.inf else (-1, -1),
            )
        )
    return found
