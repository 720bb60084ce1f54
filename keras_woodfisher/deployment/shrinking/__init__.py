"""Smaller layers in place of channels that are zero: what is known of each (a walk), what may go, and the new model."""
