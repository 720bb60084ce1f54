"""The block-wise inverse Fisher: the algorithm, and its operators in NumPy."""
