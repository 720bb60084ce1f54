"""Work side by side: threads that share a list of jobs, and the host's BLAS threads among them."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from keras_woodfisher_backends.kernel.host_blas import blas_threads

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
    """The same where the next job depends on the lane that is free.

    Args:
        lanes: As in `side_by_side`, like all but `take`.
        take: Gives a lane its next job, or raises StopIteration; called by one thread at a time.
        work: See there.
        cores: See there.
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
