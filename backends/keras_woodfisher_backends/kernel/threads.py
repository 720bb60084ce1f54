"""Threads side by side: jobs dealt out to them, the host's BLAS threads among them, and settings that they share."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

Lane = TypeVar("Lane")
Job = TypeVar("Job")


def side_by_side(lanes: Sequence[Lane], jobs: Iterable[Job], work: Callable[[Lane, Job], Any], cores: int = 1) -> None:
    """Does each job once, on whichever lane is free: a lane is a thread of its own.

    Args:
        lanes: What `work` gets as its first argument, one a thread; a single one works in the calling thread.
        jobs: Taken in their order.
        work: Called with a lane and a job.
        cores: BLAS threads that the lanes share. They are dealt out for as long as this lasts, so that calls side by
            side don't fight for the cores.

    Raises:
        BaseException: What the first failing job raised; no new job is begun after that.
    """
    queue = iter(jobs)
    deal(lanes, lambda _: next(queue), work, cores)


def deal(lanes: Sequence[Lane], take: Callable[[Lane], Job], work: Callable[[Lane, Job], Any], cores: int = 1) -> None:
    """`side_by_side` where the next job depends on the lane that is free.

    `take` gives a lane its next job, or raises StopIteration; it is called by one thread at a time.
    """
    lock, stop = threading.Lock(), threading.Event()

    def share(lane: Lane) -> None:
        while not stop.is_set():
            with lock:
                try:
                    job = take(lane)
                except StopIteration:
                    return
            work(lane, job)

    if len(lanes) == 1:
        # BLAS threads are dealt out by one thread at a time: what is shared further within has to come from this one.
        with blas_threads(cores):
            share(lanes[0])
        return
    with blas_threads(cores // len(lanes)), ThreadPoolExecutor(len(lanes)) as pool:
        try:
            for done in as_completed([pool.submit(share, lane) for lane in lanes]):
                done.result()
        finally:
            # One failure, or an interrupt, ends the others too: leaving the pool waits for them.
            stop.set()


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


_WIDE = {"SkylakeX", "Cooperlake", "SapphireRapids"}
"""OpenBLAS's names for its kernels with AVX-512."""

_AVX512 = {"X86_V4", "AVX512_SKX"}
"""NumPy's names, newer and older, for the AVX-512 instructions that those need."""


def blas_threads(count: int) -> AbstractContextManager[Any]:
    """Lets each call of the host's BLAS use `count` threads, at least one."""
    return _controller().limit(limits=max(1, count), user_api="blas")


def host_threads() -> int:
    """Threads that BLAS uses now (OMP_NUM_THREADS and the like set it), 1 where that isn't known."""
    return max((pool.num_threads for pool in _blas()), default=1)


def advice() -> str:
    """What would make BLAS faster here, or "".

    OpenBLAS picks its kernels by the model of the processor. Where it doesn't know one that has AVX-512, it takes those
    for AVX2, and matrix products run at half their speed. Others can only be set before NumPy is loaded.
    """
    pools = [pool for pool in _blas() if pool.internal_api == "openblas"]
    # Other packages may bring one of their own, which does none of the work.
    own = [pool for pool in pools if Path(pool.filepath).parent.name == "numpy.libs"] or pools
    kernels = {str(getattr(pool, "architecture", None)) for pool in own}
    found = np.show_config(mode="dicts").get("SIMD Extensions", {})
    features = {*found.get("baseline", []), *found.get("found", [])}
    if not kernels or kernels & _WIDE or not features & _AVX512:
        return ""
    return (
        f"The BLAS of NumPy (OpenBLAS) works as on {' and '.join(sorted(kernels))}, although this processor has "
        "AVX-512. With OPENBLAS_CORETYPE=SkylakeX in the environment before Python starts, the inverse Fisher takes "
        "about two thirds of the time."
    )


def _blas() -> list[LibController]:
    return list(_controller().select(user_api="blas").lib_controllers)


@cache
def _controller() -> ThreadpoolController:
    # Looking for the libraries takes milliseconds. Those of NumPy and SciPy are there by now: this package needs them.
    return ThreadpoolController()
