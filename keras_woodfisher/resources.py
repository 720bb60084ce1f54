"""Where the work of updates is done, and where gradients are kept meanwhile: devices, and memory by a plan."""

from collections.abc import Sequence
from dataclasses import replace

import keras
import numpy as np
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.devices import canonical, expand
from keras_woodfisher_backends.host_blas import advice
from keras_woodfisher_backends.kernel import BlockKernel
from keras_woodfisher_backends.protocol import Backend

from keras_woodfisher.footprint import Footprint
from keras_woodfisher.memory import check_device_memory
from keras_woodfisher.memory_plan import DISK, MEMORY, RECOMPUTED, MemoryPlan
from keras_woodfisher.memory_planning import plan_memory
from keras_woodfisher.memory_use import means_of, needs_of, open_store
from keras_woodfisher.meter import Meter, say
from keras_woodfisher.options import PruningOptions
from keras_woodfisher.sources import GradientSource
from keras_woodfisher.stores.store import GradientStore
from keras_woodfisher.structure import Structure

_DEVICE_SHARE = 0.8
"""Part of a device's free memory that the inverse Fisher may use."""


class Resources:
    """Devices and memory of the updates of one model.

    Args:
        options: What is allowed.
        sizes: Weights of each variable.
        structure: The groups of weights that are pruned together, if any.

    Attributes:
        backend: The adapter of the Keras backend.
        devices: Names of those that share the inverse.
        kernels: One a device.
        memory: The plan that updates keep to; None before `plan`, when gradients are in memory.

    Raises:
        ValueError: If a device doesn't exist.
    """

    def __init__(self, options: PruningOptions, sizes: Sequence[int], structure: Structure | None):
        self._options = replace(options, grads_device=canonical(options.grads_device))
        self._sizes = list(sizes)
        self._structure = structure
        self.backend: Backend = get_backend(keras.backend.backend())
        self.devices = expand(options.available_gpus, self.backend.devices())
        self.kernels: list[BlockKernel] = [self.backend.kernel(name) for name in self.devices]
        self._lanes = [kernel.lanes for kernel in self.kernels]
        self._check_grads_device(options.grads_device)
        self.memory: MemoryPlan | None = None
        self._width = sum(self._sizes)
        self._told = False

    def plan(self, footprint: Footprint, uses: Sequence[tuple[int, int]]) -> MemoryPlan:
        """Decides where gradients will be, and how many samples and blocks are worked on at a time.

        Args:
            footprint: Of their source.
            uses: For each update its samples (m) and unpruned weights (d).

        Raises:
            MemoryError: If nothing fits (the message says what would).
        """
        for kernel, lanes in zip(self.kernels, self._lanes, strict=True):
            kernel.lanes = lanes
        kernels = list(zip(self.devices, self.kernels, strict=True))
        needs = needs_of(uses, self._sizes, self._options, kernels, footprint, self._structure)
        self._width = needs.width
        plan = self.memory = plan_memory(needs, means_of(self._options))
        if plan.storage not in (MEMORY, DISK, RECOMPUTED):
            free, itemsize = self.backend.free_memory(plan.storage), 4 if plan.dtype == "float32" else 2
            check_device_memory(plan.samples, plan.columns, plan.storage, free, itemsize)
        for kernel in self.kernels:
            kernel.lanes = min(kernel.lanes, plan.lanes)
        self._told = False
        return plan

    def gradients(
        self,
        source: GradientSource,
        kept: list[np.ndarray],
        blocks: Sequence[slice],
        draw: tuple[int, int],
        meter: Meter,
    ) -> tuple[GradientStore, float]:
        """The gradients, where the plan says, and the sum of their squares.

        Args:
            source: Gives them.
            kept: For each variable its unpruned weights, bool.
            blocks: Their blocks.
            draw: How many samples, and the number of the update.
            meter: Tells of progress.
        """
        shape = draw[0], int(sum(mask.sum() for mask in kept))
        if self.memory is None or not self.memory.covers(*shape):
            # More than was foreseen: the same limit holds.
            self.plan(source.footprint(draw[0]), [shape])
        assert self.memory is not None
        if self._options.verbose and not self._told:
            say(str(self.memory))
            if (faster := advice()) and any(kernel.on_host for kernel in self.kernels):
                say(faster)
            self._told = True
        store = open_store(self.memory, shape, blocks, lambda s: source.fill(s, kept, *draw, lambda number: None))
        squares = 0.0
        try:
            with meter.phase("gradients", draw[0], "sample") as advance:
                squares = source.fill(store, kept, *draw, advance)
                store.finish()
            if source.slow_layers is not None:
                meter.note(str(source.slow_layers))
        except BaseException:
            store.close()
            raise
        return store, squares

    def fit(self, rows: int) -> None:
        """Asks each device what it has free now, and makes the panels as narrow as that demands."""
        for name, kernel in zip(self.devices, self.kernels, strict=True):
            free = self.backend.free_memory(name)
            if free is not None:
                group = 1 if self._structure is None else self._structure.largest
                kernel.fit(rows, self._width, int(_DEVICE_SHARE * free / kernel.lanes), group)

    def _check_grads_device(self, device: str) -> None:
        if self._options.grads_device not in ("cpu", DISK):
            try:
                self.backend.kernel(device)
            except ValueError as error:
                raise ValueError(f'grads_device: {error} Gradients can also be kept on "disk".') from None
