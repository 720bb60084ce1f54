"""Samples in float16 with a scale a row: half the bytes, for some accuracy.

An entry above `2^-29` of its row's largest is off by at most `2^-11` (4.9e-4) of itself, a smaller one by at most
`2^-40` of the largest.
"""

import numpy as np


def scales_of(rows: np.ndarray, dtype: str) -> np.ndarray:
    """The factor of each row, (n,) float32: a power of two, so that scaling itself loses nothing; 1 for float32."""
    if dtype == "float32" or rows.shape[1] == 0:
        return np.ones(len(rows), np.float32)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    # The largest entry comes to lie in [2^14, 2^15); the scale itself stays a normal number.
    return np.ldexp(np.float32(1.0), np.maximum(np.frexp(largest)[1] - 15, -126)).astype(np.float32)


def encoded(rows: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Rows as they are stored, contiguous."""
    if dtype == "float32":
        return np.ascontiguousarray(rows)
    return (rows / scales[:, None]).astype(np.float16)


def decoded(stored: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 rows of what was stored."""
    if stored.dtype == np.float32:
        return stored
    rows = stored.astype(np.float32)
    rows *= scales[:, None]
    return rows
