"""What is said of a BLAS that doesn't know the processor."""

from types import SimpleNamespace

import numpy as np
import pytest
from keras_woodfisher_backends import host_blas


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
    pools = [SimpleNamespace(internal_api=api, architecture=name, num_threads=1) for api, name in pools]
    monkeypatch.setattr(host_blas, "_blas", lambda: pools)
    monkeypatch.setattr(
        np, "show_config", lambda mode: {"SIMD Extensions": {"baseline": ["X86_V2"], "found": features}}
    )
    text = host_blas.advice()
    assert bool(text) == advised
    if advised:
        assert pools[0].architecture in text
        assert "OPENBLAS_CORETYPE=SkylakeX" in text


def test_advice_of_this_machine():
    assert isinstance(host_blas.advice(), str)
