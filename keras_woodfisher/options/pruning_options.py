"""What a user may ask for, checked as soon as it is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.options.checks import by_number, count, flag, fraction, names, number, one_of
from keras_woodfisher.options.mask_types import UNSTRUCTURED, checked_mask, mask_text, pattern_of
from keras_woodfisher.options.sizes import parse_bytes

METHODS = ("woodfisher", "magnitude")


UPDATES = ("joint", "independent")


CALIBRATED = "calibrated"


FISHERS = ("empirical", "ggn")


AUTO = "auto"


GRADS_DTYPES = ("float32", "float16")


_AUTO_PART = 0.1
"""Part of the mean diagonal of the Fisher that `damp="auto"` adds to it."""


_SETTINGS = ("grad_batch_size", "fisher", "damp", "update", "num_recomputations", "fisher_block_size", "seed")


_LEFT_OUT = ("params", "global_sparsity", "available_gpus")
"""What None leaves to the default; of other options it is a value of its own, or none at all."""


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """How one pruning update works. See `WoodFisherPruning` for what each field means."""

    params: str | tuple[str, ...] = "__ALL_PRUNABLE__"
    exclude: tuple[str, ...] = ()
    method: str = "woodfisher"
    update: str = "joint"
    mask_type: str | tuple[int, int] = UNSTRUCTURED
    global_sparsity: bool = True
    num_grads: int | Mapping[float, int] = 64
    grad_batch_size: int = 1
    damp: float | str = 1e-5
    fisher: str = "empirical"
    num_recomputations: int = 1
    fisher_block_size: int | None = 2000
    available_gpus: tuple[str, ...] = ()
    memory_limit: int | str | None = None
    grads_device: str = "cpu"
    grads_dtype: str = "float32"
    num_pages: int = 1
    seed: int | None = 0
    verbose: int = 1

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "params", names("params", self.params))
        set_field(self, "exclude", _as_tuple(names("exclude", self.exclude)))
        set_field(self, "available_gpus", _as_tuple(names("available_gpus", self.available_gpus)))
        one_of("method", self.method, METHODS)
        one_of("update", self.update, (*UPDATES, CALIBRATED))
        one_of("fisher", self.fisher, FISHERS)
        flag("global_sparsity", self.global_sparsity)
        # Plain numbers, not NumPy's, so that the configuration is JSON.
        if self.damp != AUTO:
            mend = 'Damping is added to the Fisher\'s diagonal; "auto" takes a part of its mean.'
            set_field(self, "damp", number("damp", self.damp, above=0.0, mend=mend))
        set_field(self, "num_recomputations", count("num_recomputations", self.num_recomputations))
        set_field(self, "grad_batch_size", count("grad_batch_size", self.grad_batch_size))
        set_field(self, "num_grads", checked_num_grads(self.num_grads))
        if self.fisher_block_size is not None:
            # Recipes write 0 for "one block over everything".
            size = count("fisher_block_size", self.fisher_block_size, "Write None for one block.", least=0)
            set_field(self, "fisher_block_size", size or None)
        self._check_mask()
        if self.memory_limit is not None:
            parse_bytes("memory_limit", self.memory_limit)
        if not isinstance(self.grads_device, str):
            raise TypeError(f'grads_device must be "cpu", "disk" or a device, got {self.grads_device!r}.')
        one_of("grads_dtype", self.grads_dtype, GRADS_DTYPES)
        set_field(self, "num_pages", count("num_pages", self.num_pages))
        if self.num_pages > 1 and self.fisher_block_size is not None:
            raise ValueError(
                f"num_pages={self.num_pages} is for one block over everything (fisher_block_size=None), got "
                f"fisher_block_size={self.fisher_block_size}: blocks are had one at a time anyway. Leave num_pages "
                "out; memory_limit bounds the memory."
            )
        if self.seed is not None:
            set_field(self, "seed", count("seed", self.seed, least=0))
        set_field(self, "verbose", 1 if self.verbose == "auto" else self.verbose)
        one_of("verbose", self.verbose, (0, 1, 2))

    @classmethod
    def of(cls, **given: Any) -> "PruningOptions":
        """The options as users write them: lists for tuples, and None for what is left out."""
        return cls(**{name: value for name, value in given.items() if value is not None or name not in _LEFT_OUT})

    @property
    def second_order(self) -> bool:
        """Whether updates take gradients; magnitude pruning doesn't."""
        return self.method == "woodfisher"

    def settings(self) -> dict[str, Any]:
        """What a report says of how updates were made; nothing of magnitude pruning."""
        if not self.second_order:
            return {}
        num_grads = dict(self.num_grads) if isinstance(self.num_grads, Mapping) else self.num_grads
        return {"num_grads": num_grads} | {name: getattr(self, name) for name in _SETTINGS}

    def _check_mask(self) -> None:
        mask = checked_mask(self.mask_type)
        object.__setattr__(self, "mask_type", mask)
        if mask == UNSTRUCTURED or not self.second_order:
            return
        if self.update == "independent":
            raise ValueError(
                f"update='independent' adds up corrections for single weights, but mask_type {mask_text(mask)} prunes "
                "groups, whose cost is a joint one. Use update='joint'."
            )
        pattern = pattern_of(mask)
        if pattern is not None and self.fisher_block_size is not None and self.fisher_block_size < pattern[1]:
            raise ValueError(
                f"fisher_block_size={self.fisher_block_size} can't hold the groups of {pattern[1]} weights of "
                f"mask_type {mask}, whose costs are joint ones. Give at least {pattern[1]}."
            )

    def gradients_at(self, sparsity: float) -> int:
        """Samples to use at a sparsity: of a dictionary, the count of the largest key at or below it."""
        if isinstance(self.num_grads, Mapping):
            return self.num_grads[max(key for key in self.num_grads if key <= sparsity + 1e-9)]
        return self.num_grads

    def most_gradients_between(self, sparsity: float, final: float) -> int:
        """The largest number of samples on the way from one sparsity to another."""
        keys = [key for key in self.num_grads if sparsity < key < final] if isinstance(self.num_grads, Mapping) else []
        return max(self.gradients_at(level) for level in [sparsity, *keys])

    def damping(self, mean_diagonal: float) -> float:
        """The ridge on the Fisher's diagonal.

        Args:
            mean_diagonal: Mean of the diagonal of `(1/m) G^T G` over the unpruned weights.
        """
        return _AUTO_PART * mean_diagonal if self.damp == AUTO else float(self.damp)

    @property
    def most_gradients(self) -> int:
        """The largest number of samples that an update may use."""
        if isinstance(self.num_grads, Mapping):
            return max(self.num_grads.values())
        return self.num_grads


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def checked_num_grads(value: Any) -> int | Mapping[float, int]:
    """Checks a number of samples, or `{sparsity: count}`.

    Raises:
        TypeError, ValueError: If it is neither.
    """
    if not isinstance(value, Mapping):
        return count("num_grads", value)
    parsed = {
        fraction("a key of num_grads", key): count("a value of num_grads", samples)
        for key, samples in by_number(value).items()
    }
    if 0.0 not in parsed:
        raise ValueError(f"num_grads as a dictionary needs the key 0.0 (the count to begin with), got {value!r}.")
    return dict(sorted(parsed.items()))
