"""PyTorch: float32 products in full float32, on every device, for as long as a scope lasts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from keras_woodfisher_backends.shared_setting import SharedSetting


def _without_tf32() -> Callable[[], Any]:
    # TF32 has 10 bits of mantissa: a product in it would lose the small eigenvalues, and gradient samples three digits.
    backends: Any = torch.backends
    put_back = [
        _set(
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            "highest",
            lambda: (backends.cuda.matmul, backends.mkldnn.matmul),
        ),
        _set(
            lambda: backends.cudnn.allow_tf32,
            lambda allowed: setattr(backends.cudnn, "allow_tf32", allowed),
            False,
            lambda: (backends.cudnn.conv, backends.cudnn.rnn),
        ),
    ]
    return lambda: [restore() for restore in put_back]


def _set(
    read: Callable[[], Any], write: Callable[[Any], None], strict: Any, newer: Callable[[], Sequence[Any]]
) -> Callable[[], None]:
    """Changes a setting by torch's older interface, or by its newer one's places; returns what puts it back."""
    try:
        before = read()
    except RuntimeError:
        # The user chose it by `fp32_precision`, which torch refuses to mix with the older interface.
        places = newer()
        chosen = [place.fp32_precision for place in places]
        _set_precisions(places, ["ieee"] * len(places))
        return lambda: _set_precisions(places, chosen)
    write(strict)
    return lambda: write(before)


def _set_precisions(places: Sequence[Any], values: Sequence[str]) -> None:
    for place, value in zip(places, values, strict=True):
        place.fp32_precision = value


full_precision = SharedSetting(_without_tf32)
