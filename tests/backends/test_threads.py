"""Threads that share jobs, BLAS threads among them, and what is said of a BLAS that doesn't know the processor."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from keras_woodfisher_backends.kernel import threads
from keras_woodfisher_backends.kernel.threads import blas_threads, host_threads, side_by_side


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


def pool(api, architecture, folder="/lib"):
    return SimpleNamespace(
        internal_api=api, architecture=architecture, num_threads=1, filepath=f"{folder}/libopenblas.so"
    )


def on_processor_with(monkeypatch, features):
    config = {"SIMD Extensions": {"baseline": ["X86_V2"], "found": features}}
    monkeypatch.setattr(np, "show_config", lambda mode: config)


@pytest.mark.parametrize(
    ("pools", "features", "advised"),
    [
        ([("openblas", "Haswell"), ("openblas", "Haswell")], ["X86_V3", "X86_V4"], True),
        ([("openblas", "Zen")], ["AVX2", "AVX512_SKX"], True),
        ([("openblas", "Haswell")], ["X86_V3"], False),
        ([("openblas", "SkylakeX")], ["X86_V4"], False),
        ([("openblas", "Cooperlake"), ("openblas", "Haswell")], ["X86_V4"], False),
        ([("mkl", None)], ["X86_V4"], False),
        ([("openblas", "neoversen1")], ["ASIMD"], False),
        ([], ["X86_V4"], False),
    ],
)
def test_advice_where_the_processor_is_wider_than_its_blas(monkeypatch, pools, features, advised):
    monkeypatch.setattr(threads, "_blas", lambda: [pool(api, name) for api, name in pools])
    on_processor_with(monkeypatch, features)
    text = threads.advice()
    assert bool(text) == advised
    if advised:
        assert pools[0][1] in text
        assert "OPENBLAS_CORETYPE=SkylakeX" in text


def test_advice_is_of_the_blas_that_does_the_work(monkeypatch):
    on_processor_with(monkeypatch, ["X86_V4"])
    of_numpy, of_another = "/site-packages/numpy.libs", "/site-packages/cv2.libs"
    for architecture, other, advised in (("Prescott", "SkylakeX", True), ("SkylakeX", "Prescott", False)):
        pools = [pool("openblas", architecture, of_numpy), pool("openblas", other, of_another)]
        monkeypatch.setattr(threads, "_blas", lambda pools=pools: pools)
        assert bool(threads.advice()) == advised


def test_advice_of_this_machine():
    assert isinstance(threads.advice(), str)
