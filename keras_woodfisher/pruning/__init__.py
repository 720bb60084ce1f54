"""The engine: one pruning update of one model, from gradient samples to masks and corrected weights."""
