"""Names of devices, the same on every backend: "cpu", "cpu:0", "cuda:0" or "gpu:0"."""

from collections.abc import Sequence


def resolve(name: str, accelerators: int, processors: int) -> tuple[str, int]:
    """Splits a device name into its kind, "cpu" or "gpu", and its index; -1 is the host itself.

    Args:
        name: What the user wrote. "cuda" and "gpu" mean the same, and without a number the first one.
        accelerators: How many GPUs the framework sees.
        processors: How many logical CPU devices the framework sees.

    Raises:
        ValueError: If the device doesn't exist.
    """
    kind, _, number = name.strip().lower().partition(":")
    kind = "gpu" if kind == "cuda" else kind
    count = {"gpu": accelerators, "cpu": processors}.get(kind, 0)
    if kind == "cpu" and not number:
        return "cpu", -1
    index = int(number) if number.isdecimal() else (0 if not number else -1)
    if not 0 <= index < count:
        raise ValueError(
            f"There is no device {name!r} here. Devices that exist: {', '.join(names(accelerators, processors))}."
        )
    return kind, index


def names(accelerators: int, processors: int, kind: str = "gpu") -> Sequence[str]:
    """All names that `resolve` accepts, the host's processor first."""
    logical = [f"cpu:{index}" for index in range(processors)]
    return ["cpu", *logical, *(f"{kind}:{index}" for index in range(accelerators))]
