"""Sparse least squares: layers as matrix products, and the sparse kernel whose output is nearest to given targets."""
