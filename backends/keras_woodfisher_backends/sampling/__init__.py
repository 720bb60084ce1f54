"""Gradients of many groups of examples at a time: capture and layer rules."""
