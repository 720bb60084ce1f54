"""Progress for people and figures for the report: seconds and peak memory of each phase."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import keras
import psutil
from keras_woodfisher_backends.protocol import Backend
from keras_woodfisher_backends.ranks.joint import current_ranks

from keras_woodfisher.reports.stage_report import PhaseReport

_INTERVAL = 0.005


class Meter:
    """Times the phases of one pruning update.

    Args:
        backend: Tells the peak of GPUs.
        devices: Devices that do the work.
        verbose: 0 is silent, 1 shows Keras's progress bar, 2 one line a phase.
    """

    def __init__(self, backend: Backend, devices: Sequence[str], verbose: int):
        self._backend = backend
        self._devices = devices
        self._verbose = verbose if current_ranks().first else 0
        self.phases: list[PhaseReport] = []

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Measures a phase; call what it yields with the number of units that were done."""
        bar = keras.utils.Progbar(total, verbose=self._verbose, unit_name=unit)
        lock = threading.Lock()

        def advance(units: int = 1) -> None:
            with lock:
                bar.add(units)

        if self._verbose:
            announce(name)
        start = time.perf_counter()
        with _AnonymousGrowth() as growth:
            yield advance
        seconds = time.perf_counter() - start
        peaks = [self._backend.peak_memory(device) for device in self._devices]
        self.phases.append(PhaseReport(name, seconds, growth.peak + sum(peak or 0 for peak in peaks)))

    def note(self, text: str) -> None:
        """Tells the user something about a phase."""
        if self._verbose:
            announce(text)


class _AnonymousGrowth:
    """Samples how much the process's own memory grows; mapped files don't count."""

    def __enter__(self) -> "_AnonymousGrowth":
        self._process = psutil.Process()
        self._before = self._now()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, self._now() - self._before)

    def _now(self) -> int:
        info = self._process.memory_info()
        return info.rss - getattr(info, "shared", 0)


def announce(text: str) -> None:
    """Says what pruning is doing."""
    say(f"WoodFisher pruning: {text}")


def say(text: str) -> None:
    """Writes a line for the user, under whatever a progress bar has left; of several processes, the first does."""
    if not current_ranks().first:
        return
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()
