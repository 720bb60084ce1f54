"""How much of the identity the Fisher needs: `damp="auto"`.

A ridge in absolute units fits one net and ruins another: mean squares of gradients go from 1e-9 (a net that is sure of
everything) to 1e-3, and how far m samples are to be trusted depends on how alike they are. With `S = (1/m) G^T G` and
`mu` the mean of its diagonal, the estimate `(1 - rho) S + rho mu I` of the Fisher is nearest to the true one in the
Frobenius norm for

    rho = (1/m) (mean_i |g_i|^4 - |S|^2) / (|S|^2 - B mu^2)

(Ledoit & Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004), which is `S + damp I`
with `damp = mu rho / (1 - rho)` but for a factor that nothing depends on. Numerator and denominator are sums over the
blocks.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from keras_woodfisher_backends.ranks.ranks import Ranks

from keras_woodfisher.memory.store import GradientStore
from keras_woodfisher.options.pruning_options import AUTO
from keras_woodfisher.pruning.share import Share

LEAST, MOST = 0.01, 100.0
"""The ridge is between these parts of the mean diagonal."""

_BLOCKS = 32
"""Blocks that are looked at, spread over all, at most."""

_SIGNS = 64
"""Vectors of random signs z; `|S|^2` is the mean of `|S' z|^2` over them, with `S' = (1/m) G G^T`."""

_COLUMNS = 512
"""Columns of a block that are looked at together."""


TENTH = 0.1
"""The part of the mean diagonal where scores alone depend on it."""


def ridges(
    damp: float | str,
    grads: GradientStore,
    blocks: Sequence[slice],
    mean_diagonal: float,
    guarded: bool | None,
    share: Share | None = None,
) -> Iterator[float]:
    """The ridges to try one after the other, until one is good enough.

    Args:
        damp: What was asked for.
        grads: The gradient samples (m, d).
        blocks: Columns of each block.
        mean_diagonal: The mean of the diagonal of `(1/m) G^T G`.
        guarded: Whether a guard finds out how good one is; None where corrections don't depend on it.
        share: The columns that this process has, if not all.
    """
    if damp != AUTO:
        yield float(damp)
    elif guarded is None:
        yield TENTH * mean_diagonal
    else:
        if guarded:
            yield LEAST * mean_diagonal
        yield shrinkage_ridge(grads, blocks, mean_diagonal, share)


def shrinkage_ridge(
    grads: GradientStore, blocks: Sequence[slice], mean_diagonal: float, share: Share | None = None
) -> float:
    """The ridge on the diagonal of `(1/m) G^T G`, in its unit.

    Args:
        grads: The gradient samples (m, d).
        blocks: Columns of each block.
        mean_diagonal: The mean of the diagonal over all columns.
        share: The columns that this process has, if not all.
    """
    share = share or Share(blocks, grads.shape[1], Ranks())
    places = np.unique(np.linspace(0, len(blocks) - 1, _BLOCKS).round().astype(int))
    chosen = share.own([blocks[place] for place in places])
    samples = len(grads)
    signs = np.eye(samples)
    if samples > _SIGNS:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (samples, _SIGNS)) / np.sqrt(_SIGNS)
    found: list[tuple[float, float]] = []
    for group in grads.groups(chosen) if chosen else ():
        for block in group:
            rows = grads.block(block)
            squares, norm = _moments(rows, signs)
            fourth, mean = np.square(squares).mean(), squares.mean() / rows.shape[1]
            found.append(((fourth - norm) / samples, norm - rows.shape[1] * mean**2))
    noise = spread = 0.0
    for one, other in share.joined(np.array(found, np.float64).reshape(-1, 2)):
        noise += one
        spread += other
    # One sample tells nothing of how far samples differ.
    part = noise / (spread - noise) if samples > 1 and spread > noise else np.inf
    return float(np.clip(part, LEAST, MOST)) * mean_diagonal


def _moments(samples: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, float]:
    """The sum of squares of each sample, and `|S|^2`."""
    squares, product = np.zeros(len(signs)), np.zeros(signs.shape)
    for start in range(0, samples.shape[1], _COLUMNS):
        panel = np.asarray(samples[:, start : start + _COLUMNS], np.float64)
        squares += np.square(panel).sum(1)
        product += panel @ (panel.T @ signs)
    return squares, float(np.square(product).sum()) / len(signs) ** 2
