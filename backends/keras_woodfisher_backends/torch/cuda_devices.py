"""The accelerators that torch sees. Tests put others in their place."""

import torch


class CudaDevices:
    """CUDA's (or ROCm's) devices, by index."""

    def count(self) -> int:
        return torch.cuda.device_count()

    def place(self, index: int) -> torch.device:
        """The device itself."""
        return torch.device("cuda", index)

    def free_memory(self, index: int) -> int:
        """Free bytes, what torch holds in reserve included."""
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return torch.cuda.mem_get_info(index)[0] + unused

    def peak_memory(self, index: int) -> int:
        """Most bytes in use so far."""
        return torch.cuda.max_memory_allocated(index)
