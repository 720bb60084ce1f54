"""JAX: quick compilation of what runs once."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def light_compilation() -> Iterator[None]:
    """What is compiled meanwhile is hardly optimised: worth it for what runs once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
