"""Layer-wise reconstruction: sparse kernels whose outputs are nearest to those of the dense model, without labels."""
