"""A setting of the whole process that several threads want changed at the same time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SharedSetting:
    """Changed by the first thread that comes in, put back by the last one that leaves.

    If each thread saved and restored it by itself, one would put it back while another still computes.

    Args:
        change: Changes the setting, and returns what puts it back.
    """

    def __init__(self, change: Callable[[], Callable[[], Any]]):
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], Any] = lambda: None

    @contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._restore = self._change()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore()
