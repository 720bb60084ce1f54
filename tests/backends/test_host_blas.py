"""What is said of a BLAS that doesn't know the processor."""

from types import SimpleNamespace

import numpy as np
import pytest
from keras_woodfisher_backends.kernel import host_blas


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
    monkeypatch.setattr(host_blas, "_blas", lambda: [pool(api, name) for api, name in pools])
    on_processor_with(monkeypatch, features)
    text = host_blas.advice()
    assert bool(text) == advised
    if advised:
        assert pools[0][1] in text
        assert "OPENBLAS_CORETYPE=SkylakeX" in text


def test_advice_is_of_the_blas_that_does_the_work(monkeypatch):
    on_processor_with(monkeypatch, ["X86_V4"])
    of_numpy, of_another = "/site-packages/numpy.libs", "/site-packages/cv2.libs"
    for architecture, other, advised in (("Prescott", "SkylakeX", True), ("SkylakeX", "Prescott", False)):
        pools = [pool("openblas", architecture, of_numpy), pool("openblas", other, of_another)]
        monkeypatch.setattr(host_blas, "_blas", lambda pools=pools: pools)
        assert bool(host_blas.advice()) == advised


def test_advice_of_this_machine():
    assert isinstance(host_blas.advice(), str)
