"""Products and Cholesky factors of one block, panel by panel, and what is solved by them.

`grads` are float32 samples `G` (m, B), `keep` (B,) bool is a set K of columns, `damp` the ridge of the Fisher. What is
on the device is opaque here (see `Operators`); what is returned to the host is NumPy float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_woodfisher_backends.kernel.operators import Operators
from keras_woodfisher_backends.kernel.panels import Panels, Samples, take_columns

RISKY_LEVERAGE = 0.95
"""Above this, `1 - leverage` would lose digits in float32, and the column is computed again in float64."""

RISKY_ERROR = 1e-6
"""Where rounding in float32 may move `1 - leverage` by more than this, relatively, the same is done."""


def gram(panels: Panels, grads: Samples, keep: np.ndarray | None = None) -> Any:
    """`G_K G_K^T` (m, m) on the device, of all columns without `keep`."""
    ops = panels.operators
    totals: dict[int, Any] = {}

    def work(part: slice, lane: int) -> None:
        if keep is None or keep[part].any():
            panel = grads[:, part] if keep is None else take_columns(grads[:, part], keep[part])
            totals[lane] = ops.gram(ops.load(panel), totals.get(lane))

    panels.for_each(work, grads.shape[1])
    first, *others = (totals[lane] for lane in sorted(totals))
    for total in others:
        first = ops.plus(first, total)
    return first


def combine(panels: Panels, grads: Samples, coefficients: np.ndarray) -> np.ndarray:
    """`G u`, (m,) or (m, k), for coefficients `u` (B,) or (B, k)."""
    size = grads.shape[0]
    totals = np.zeros((panels.lanes, size, *coefficients.shape[1:]))

    def work(part: slice, lane: int) -> None:
        here = coefficients[part]
        used: np.ndarray = (here.reshape(len(here), -1) != 0).any(axis=1)
        if used.any():
            panel = panels.operators.load(take_columns(grads[:, part], used))
            totals[lane] += panels.operators.combine(panel, here[used])[:size]

    panels.for_each(work, grads.shape[1])
    return totals.sum(0)


def project(panels: Panels, grads: Samples, keep: np.ndarray, dual: np.ndarray, out: np.ndarray) -> None:
    """Writes `(G_K^T x)^T` into `out`, (B,) or (k, B), where `keep` is; `x` is `dual`, (m,) or (m, k)."""

    def work(part: slice, lane: int) -> None:
        if keep[part].any():
            panel = take_columns(grads[:, part], keep[part])
            product = panels.operators.project(panels.operators.load(panel), dual)
            out[..., part][..., keep[part]] = product[: panel.shape[1]].T

    panels.for_each(work, keep.size)


def dual_factor(panels: Panels, grads: Samples, damp: float, keep: np.ndarray | None = None) -> Any:
    """The factor of `m damp I + G_K G_K^T` (m, m)."""
    return cholesky(panels.operators, gram(panels, grads, keep), grads.shape[0], damp)


def primal_factor(panels: Panels, grads: Samples, damp: float, keep: np.ndarray | None = None) -> Any:
    """The factor of `m F_KK = m damp I + G_K^T G_K`, for few weights and any number of samples."""
    ops = panels.operators
    total = None
    for rows in panels.parts(grads.shape[0]):
        parts = [
            grads[rows, part] if keep is None else take_columns(grads[rows, part], keep[part])
            for part in panels.parts(grads.shape[1])
        ]
        panel = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        total = ops.fisher(ops.load(panel), total)
    return cholesky(ops, total, grads.shape[0], damp)


def cholesky(operators: Operators, matrix: Any, samples: int, damp: float) -> Any:
    """The factor of `m damp I + matrix`.

    Raises:
        numpy.linalg.LinAlgError: If that isn't positive definite in float64.
    """
    try:
        return operators.factor(matrix, samples * damp)
    except np.linalg.LinAlgError as error:
        raise np.linalg.LinAlgError(
            f"The Fisher of a block isn't positive definite with damp={damp:g}: its gradients are too large for "
            "that damp, or not finite. Give a larger damp."
        ) from error


def inverse_diagonal(panels: Panels, grads: Samples, damp: float) -> np.ndarray:
    """`diag(F^-1)`, (B,) float64, by the smaller of the two matrices."""
    m, width = grads.shape
    ops = panels.operators
    if width <= m:
        return ops.inverse_diagonal(primal_factor(panels, grads, damp))[:width] * m
    out = np.empty(width)
    factor = dual_factor(panels, grads, damp)
    leverage = ops.leverage(factor)

    def work(part: slice, lane: int) -> None:
        panel = grads[:, part]
        sums, spread = (array[None, : panel.shape[1]] for array in leverage(ops.load(panel)))
        out[part] = one_minus_leverage(ops, lambda place: factor, [panel], (sums, spread), damp)[0] / damp

    panels.for_each(work, width)
    return out


def response(panels: Panels, grads: Samples, damp: float, keep: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """`G_K^T (m damp I + G_K G_K^T)^-1 G r`, (B,) float64, by the smaller of two matrices; `r` is `removed` (B,)."""
    ops, m = panels.operators, grads.shape[0]
    out = np.zeros(keep.size)
    kept = int(np.count_nonzero(keep))
    if kept == 0:
        return out
    # Products with one vector are too short to be shared.
    products = panels.in_this_thread
    source = combine(products, grads, removed)
    if kept <= m:
        factor = primal_factor(panels, grads, damp, keep)
        project(products, grads, keep, source, out)
        out[keep] = ops.solve(factor, out[keep])[:kept]
        return out
    dual = ops.solve(dual_factor(panels, grads, damp, keep), source)
    project(products, grads, keep, dual, out)
    return out


def one_minus_leverage(
    operators: Operators,
    factor: Callable[[int], Any],
    panels: Sequence[np.ndarray] | np.ndarray,
    leverage: tuple[np.ndarray, np.ndarray],
    damp: float,
) -> np.ndarray:
    """`1 - leverage` of each column of n panels; where float32 isn't enough, the leverage is computed in float64.

    Args:
        operators: Of the device.
        factor: Gives the dual factor of the block that a panel is of.
        panels: n times (m, c).
        leverage: The leverage in float32, and the spread (see `Operators.leverage`), both (n, c).
        damp: Ridge on the diagonal of the Fisher.

    Returns:
        (n, c) float64.
    """
    sums, spread = leverage
    rest: np.ndarray = 1.0 - sums
    error = 2.0 * np.finfo(np.float32).eps * np.sqrt(sums * spread)
    risky = ~((sums <= RISKY_LEVERAGE) & (error <= RISKY_ERROR * rest))
    for place in np.flatnonzero(risky.any(axis=1)).tolist():
        again = np.flatnonzero(risky[place])
        columns = np.take(panels[place], again, axis=1)
        exact = operators.leverage_float64(factor(place), operators.load(columns))[: again.size]
        rest[place, again] = np.maximum(1.0 - exact, lower_bounds(columns, damp))
    return rest


def lower_bounds(panel: np.ndarray, damp: float) -> np.ndarray:
    """`damp / F_jj` of each column, (c,): no `1 - leverage` is below it, so that scores stay positive."""
    ridge = panel.shape[0] * damp
    return ridge / (ridge + np.square(panel.astype(np.float64)).sum(0))
