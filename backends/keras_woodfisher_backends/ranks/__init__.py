"""Processes that train together ("ranks"): what one tells the others, by the collectives of their own engine."""
