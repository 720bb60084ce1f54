"""Threads that share jobs, and BLAS threads among them."""

import time

import pytest
from keras_woodfisher_backends.kernel.host_blas import blas_threads, host_threads
from keras_woodfisher_backends.kernel.lanes import side_by_side


def test_lanes_within_a_single_lane_share_the_cores():
    seen = []

    def outer(lane, job):
        side_by_side(range(2), range(2), lambda lane, job: seen.append(host_threads()), cores=2)
        seen.append(host_threads())

    with blas_threads(2):
        side_by_side(["only"], [0], outer, cores=2)
        assert host_threads() == 2
    assert seen == [1, 1, 2]


def test_lanes_share_the_cores():
    seen = []
    with blas_threads(2):
        side_by_side(range(2), range(4), lambda lane, job: seen.append((job, host_threads())), cores=2)
        assert host_threads() == 2
    assert sorted(seen) == [(job, 1) for job in range(4)]


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_first_failure_is_raised_and_ends_the_work(lanes):
    done = []

    def work(lane, job):
        time.sleep(1e-3)
        if job == 3:
            raise ArithmeticError("job 3")
        done.append(job)

    with pytest.raises(ArithmeticError, match="job 3"):
        side_by_side(range(lanes), range(1000), work)
    # The other lane may have had a job in hand, or some.
    assert set(done) >= {0, 1, 2}
    assert len(done) < 999
