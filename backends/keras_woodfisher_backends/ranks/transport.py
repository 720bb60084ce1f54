"""What is asked of an engine on which several processes train together."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Transport(Protocol):
    """Carries bytes, arrays (n,) uint8 on the host, between processes; each call is made by all of them at once.

    Attributes:
        rank: The number of this process.
        size: How many processes there are.
        name: What messages call the engine.
    """

    rank: int
    size: int
    name: str

    def all_gather(self, data: np.ndarray) -> list[np.ndarray]:
        """What each process gave, as many bytes each."""
        ...

    def all_to_all(self, parts: Sequence[np.ndarray], lengths: Sequence[int], most: int) -> list[np.ndarray]:
        """What each process has for this one.

        Args:
            parts: For each process what it is to get.
            lengths: Bytes that come from each.
            most: Bytes of the longest part that any process sends.
        """
        ...

    def broadcast(self, data: np.ndarray) -> np.ndarray:
        """What the first process gave; the others give as many bytes of any kind."""
        ...
