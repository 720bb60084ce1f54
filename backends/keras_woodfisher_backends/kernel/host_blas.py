"""The BLAS of NumPy on the host: how many threads it uses, and whether it uses all that the processor can do."""

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

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
    for AVX2, and matrix products run at half their speed. It can only be told otherwise before NumPy is loaded.
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
