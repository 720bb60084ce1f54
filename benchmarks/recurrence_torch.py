"""The published way to the inverse Fisher on a GPU: one gradient at a time, for all blocks at once (M-FAC).

The same recurrence as `recurrence`, by torch, with blocks as the batch of its products: one block alone would leave a
GPU idle.
"""

import torch


def rank_one_diagonal(grads: torch.Tensor, damp: float) -> torch.Tensor:
    """`diag(F^-1)` of each block.

    Args:
        grads: (n, m, B) float32, on the device.
        damp: Ridge on the diagonal of the Fisher.

    Returns:
        (n, B) float32.
    """
    n, m, width = grads.shape
    v = torch.empty_like(grads)
    weight = torch.empty((n, m), device=grads.device)
    diagonal = torch.full((n, width), 1.0 / damp, device=grads.device)
    for k in range(m):
        row = torch.div(grads[:, k], damp, out=v[:, k])
        if k:
            coefficients = torch.bmm(v[:, :k], grads[:, k, :, None])[:, :, 0]
            coefficients *= weight[:, :k]
            row -= torch.bmm(coefficients[:, None], v[:, :k])[:, 0]
        torch.reciprocal(m + (grads[:, k] * row).sum(1), out=weight[:, k])
        diagonal.addcmul_(row * weight[:, k, None], row, value=-1.0)
    return diagonal
