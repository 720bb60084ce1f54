"""Names of devices, the same on every backend: "cpu", "cpu:0", "cuda:0" or "gpu:0", and "all" of them."""

from collections.abc import Sequence

LANES = 4
"""Threads that feed one accelerator: they gather samples side by side, and some transfer them while others work."""

EXAMPLES = 512
"""Examples that an accelerator differentiates at a time: with few, it waits for the host to begin each operation."""


EXAMPLES_IN_TIME = 256
"""Examples that a processor differentiates at a time where a model has loops over time: each step does little."""


def resolve(name: str, accelerators: int, processors: int) -> tuple[str, int]:
    """Splits a device name into its kind, "cpu" or "gpu", and its index; -1 is the host itself.

    Args:
        name: What the user wrote. "cuda" and "gpu" mean the same, and without a number the first one.
        accelerators: How many GPUs the framework sees.
        processors: How many logical CPU devices the framework sees.

    Raises:
        ValueError: If the device doesn't exist.
    """
    kind, _, number = canonical(name).partition(":")
    count = {"gpu": accelerators, "cpu": processors}.get(kind, 0)
    if kind == "cpu" and not number:
        return "cpu", -1
    index = int(number) if number.isdecimal() else -1
    if not 0 <= index < count:
        raise ValueError(
            f"There is no device {name!r} here. Devices that exist: {', '.join(names(accelerators, processors))}."
        )
    return kind, index


def canonical(name: str) -> str:
    """The one name of a device, as `keras.device` takes it on every backend; "cpu" is the host itself.

    >>> canonical("CUDA:1"), canonical("gpu"), canonical("cpu"), canonical("cpu:0"), canonical("disk")
    ('gpu:1', 'gpu:0', 'cpu', 'cpu:0', 'disk')
    """
    kind, _, number = name.strip().lower().partition(":")
    kind = "gpu" if kind == "cuda" else kind
    if kind == "gpu" and not number:
        number = "0"
    return f"{kind}:{number}" if number else kind


def names(accelerators: int, processors: int, kind: str = "gpu") -> Sequence[str]:
    """All names that `resolve` accepts, the host's processor first."""
    logical = [f"cpu:{index}" for index in range(processors)]
    return ["cpu", *logical, *(f"{kind}:{index}" for index in range(accelerators))]


def expand(wanted: Sequence[str], existing: Sequence[str]) -> tuple[str, ...]:
    """The devices that a user asked for, each once.

    >>> expand(["all"], ["cpu", "cpu:0", "gpu:0", "gpu:1"]), expand(["all"], ["cpu", "cpu:0"]), expand([], ["cpu"])
    (('gpu:0', 'gpu:1'), ('cpu',), ('cpu',))

    Args:
        wanted: Names, or `"all"`: every GPU, or the host's processor where there is none. Nothing means the host's
            processor.
        existing: All devices of the backend.

    Raises:
        ValueError: If other devices stand beside `"all"`, or one is named twice.
    """
    plain = [name.strip().lower() for name in wanted]
    if "all" in plain:
        if len(plain) > 1:
            raise ValueError(f"available_gpus must be 'all' or name devices, got both: {list(wanted)}.")
        return tuple(name for name in existing if not name.startswith("cpu")) or ("cpu",)
    if len({canonical(name) for name in plain}) < len(plain):
        raise ValueError(f"available_gpus names a device twice: {list(wanted)}. Name each once.")
    return tuple(wanted) or ("cpu",)
