"""Bytes between the processes of torch.distributed, by a group of gloo of their own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import distributed


class TorchTransport:
    """The collectives of a group beside the default one: what training sends can't be taken for what pruning does.

    Attributes:
        rank, size, name: See `Transport`.
    """

    name = "torch.distributed"

    def __init__(self) -> None:
        self.rank: int = distributed.get_rank()
        self.size: int = distributed.get_world_size()
        self.world = distributed.group.WORLD
        self._group = distributed.new_group(backend="gloo")

    def all_gather(self, data: np.ndarray) -> list[np.ndarray]:
        found = [torch.empty(data.size, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(found, _tensor(data), group=self._group)
        return [part.numpy() for part in found]

    def all_to_all(self, parts: Sequence[np.ndarray], lengths: Sequence[int], most: int) -> list[np.ndarray]:
        del most
        found = torch.empty(sum(lengths), dtype=torch.uint8)
        sizes = [part.size for part in parts]
        distributed.all_to_all_single(found, _tensor(np.concatenate(parts)), list(lengths), sizes, group=self._group)
        return [part.numpy() for part in found.split(list(lengths))]

    def broadcast(self, data: np.ndarray) -> np.ndarray:
        tensor = _tensor(data)
        distributed.broadcast(tensor, 0, group=self._group)
        return tensor.numpy()


def transport_now() -> TorchTransport | None:
    """That of the process group that there is now, the same one as long as there is; None for a single process."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        _Known.transport = None
    elif _Known.transport is None or _Known.transport.world is not distributed.group.WORLD:
        _Known.transport = TorchTransport()
    return _Known.transport


class _Known:
    transport: TorchTransport | None = None


def _tensor(data: np.ndarray) -> torch.Tensor:
    # What is read from a file or a message may not be written to.
    return torch.from_numpy(data if data.flags.writeable else data.copy())
