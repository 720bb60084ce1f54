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
        for b, c in changed:
            moves[b, c] = best_moves(gram[b], cross[b, :, c], kept[b, :, c], free[b, :, c])
        least = _LEAST * max(move.gain for move in moves.values())
        pairs = _pairs(moves, least)
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


def _pairs(moves: dict[tuple[int, int], Moves], least: float) -> list[tuple[tuple[int, int], tuple[int, int]]]:
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


def best_moves(gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, free: np.ndarray) -> Moves:
    """Of one output: gram (k, k), cross, kept and free (k,)."""
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept & free)
    diagonal = gram.diagonal()
    inverse = np.linalg.inv(gram[np.ix_(inside, inside)])
    values = inverse @ cross[inside]
    spread = inverse.diagonal()
    between = gram[np.ix_(outside, inside)]
    mixed = between @ inverse
    residual = cross[outside] - between @ values
    room = np.maximum(diagonal[outside] - np.einsum("ij,ij->i", mixed, between), 1e-12 * diagonal[outside])
    costs = np.where(free[inside], values**2 / spread, np.inf)
    gains = residual**2 / room
    removal, addition = _place(-costs), _place(gains)
    pair_gain, pair = -np.inf, (-1, -1)
    if removal >= 0 and addition >= 0:
        both = np.square(residual[:, None] + mixed * (values / spread)) / (room[:, None] + mixed**2 / spread) - costs
        at = np.unravel_index(int(both.argmax()), both.shape)
        pair_gain, pair = float(both[at]), (int(outside[at[0]]), int(inside[at[1]]))
    return Moves(
        float(costs[removal]) if removal >= 0 else np.inf,
        int(inside[removal]) if removal >= 0 else -1,
        float(gains[addition]) if addition >= 0 else -np.inf,
        int(outside[addition]) if addition >= 0 else -1,
        pair_gain,
        pair,
    )


def _place(values: np.ndarray) -> int:
    """Where the largest finite value is, or -1."""
    if not values.size:
        return -1
    place = int(values.argmax())
    return place if np.isfinite(values[place]) else -1
