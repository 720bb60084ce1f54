"""What an update of a model is made of: one typed field an option, which is its row of the table of options, too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras_woodfisher.options import kinds
from keras_woodfisher.options.checks import checked_num_grads, count, number
from keras_woodfisher.options.mask_types import UNSTRUCTURED, mask_text, pattern_of
from keras_woodfisher.options.option import (
    CALLBACK,
    INVERSE,
    PRUNE,
    RAMP,
    RECIPE,
    SENSITIVITY,
    UPDATE,
    option,
    options_of,
)

UPDATES = ("joint", "independent")
CALIBRATED = "calibrated"
AUTO = "auto"
PAPERS_DAMP = 1e-5
"""The ridge of the papers and of recipes that name none."""


def _checked_damp(name: str, value: Any) -> float | str:
    mend = 'Damping is added to the Fisher\'s diagonal; "auto" finds it from the samples.'
    return AUTO if value == AUTO else number(name, value, above=0.0, mend=mend)


def _checked_block_size(name: str, value: Any) -> int | None:
    # Recipes write 0 for "one block over everything".
    return count(name, value, "Write None for one block.", least=0) or None


GRADIENTS = kinds.Kind(lambda name, value: checked_num_grads(value), {"type": kinds.whole_text(1), "metavar": "N"})
DAMP = kinds.Kind(
    _checked_damp, {"type": lambda text: AUTO if text == AUTO else kinds.positive_text(text), "metavar": "DAMP"}
)
BLOCK_SIZE = kinds.Kind(_checked_block_size, kinds.COUNT_OR_ZERO.notation)
_VERBOSE = kinds.choice(0, 1, 2)
VERBOSITY = kinds.Kind(lambda name, value: _VERBOSE.check(name, 1 if value == "auto" else value))
WOODFISHER, MAGNITUDE, RECONSTRUCT = "woodfisher", "magnitude", "reconstruct"
_METHOD = kinds.choice(WOODFISHER, MAGNITUDE, prune=(RECONSTRUCT,), sensitivity=(RECONSTRUCT,))
_COMMANDS: Any = {"commands": (PRUNE, SENSITIVITY)}
_NOT_SENSITIVITY: Any = {"callers": (CALLBACK, PRUNE)}
_UNLESS_GIVEN: Any = {"defaults": {CALLBACK: None, PRUNE: None, SENSITIVITY: None, RECIPE: None}}
_SECOND_ORDER: Any = _COMMANDS | {"second_order": True, "reported": True}
_BY_QUALITY: Any = _SECOND_ORDER | {"defaults": {PRUNE: None}}
_NUM_GRADS: Any = _SECOND_ORDER | {"defaults": {PRUNE: None, SENSITIVITY: None}, "help": "gradient samples"}
_SEED: Any = {"takes_none": True, "reported": True}
_STAGES: Any = _BY_QUALITY | _NOT_SENSITIVITY | {"commands": (PRUNE,), "renamed": {PRUNE: "stages"}}


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """How one pruning update works."""

    params: str | tuple[str, ...] = option(
        "__ALL_PRUNABLE__",
        kinds.PARAMS,
        'kernels of Dense, EinsumDense, convolutions and recurrent layers; `"__ALL__"`: embeddings and weights of '
        "other layers too; or a list of these, names and `re:` patterns",
        RAMP,
        **_COMMANDS | {"defaults": {CALLBACK: None, PRUNE: None, RECIPE: ...}},
    )
    global_sparsity: bool = option(
        True,
        kinds.FLAG,
        "rank all weights together, or each variable by itself",
        RAMP,
        **_NOT_SENSITIVITY | _UNLESS_GIVEN,
    )
    mask_type: str | tuple[int, int] = option(
        UNSTRUCTURED,
        kinds.MASK,
        'single weights, or groups of them: `"N:M"` (such as `"2:4"`), `"block4"`, `[a, b]`, `"filter"`, `"channel"`',
        RAMP,
        **_NOT_SENSITIVITY | {"commands": (PRUNE,), "help": "unstructured, 2:4, block4, 4,1, filter, channel"},
    )
    exclude: tuple[str, ...] = option((), kinds.NAMES, "names and `re:` patterns to leave out", RAMP, **_COMMANDS)
    method: str = option(
        WOODFISHER,
        _METHOD,
        '`"woodfisher"`; `"magnitude"`: no gradients, no corrections; `"reconstruct"` (`prune`, and its default '
        "with `quality` above `\"fast\"`; `sensitivity`): each layer's output as near as can be to the dense one's, "
        "without labels",
        **_COMMANDS | {"defaults": {PRUNE: None}},
    )
    num_grads: int | Mapping[float, int] = option(
        64, GRADIENTS, "gradient samples m, or `{sparsity: count}`", INVERSE, **_NUM_GRADS
    )
    grad_batch_size: int = option(1, kinds.COUNT, "examples averaged into one sample", UPDATE, **_BY_QUALITY)
    fisher: str = option(
        "empirical",
        kinds.choice("empirical", "ggn"),
        'samples are gradients of the loss; with `"ggn"`, of an unbiased sketch of the Gauss-Newton matrix '
        "(cross-entropy, squared error)",
        UPDATE,
        **_BY_QUALITY,
    )
    damp: float | str = option(
        AUTO,
        DAMP,
        'ridge on the Fisher\'s diagonal; `"auto"`: found from the samples, and checked on held-out examples',
        INVERSE,
        **_BY_QUALITY | {"defaults": {PRUNE: None, RECIPE: PAPERS_DAMP}},
    )
    update: str = option(
        "joint",
        kinds.choice(*UPDATES, prune=(CALIBRATED,)),
        'corrections for all weights pruned in a block at once; or `"independent"`: the papers\' sum of single ones; '
        '`"calibrated"` (`prune` only): over all kept weights, with the damping that is best on held-out examples',
        UPDATE,
        **_BY_QUALITY,
    )
    num_recomputations: int = option(
        1,
        kinds.COUNT,
        "stages of one update, each with new gradients; the kept fraction falls by the same factor in each",
        UPDATE,
        **_STAGES,
    )
    fisher_block_size: int | None = option(
        2000,
        BLOCK_SIZE,
        "weights in one block; None: one block over everything (`sensitivity`: each variable is one)",
        INVERSE,
        help="weights in one block; 0: one block over everything (sensitivity: each variable is one)",
        takes_none=True,
        **_SECOND_ORDER,
    )
    available_gpus: tuple[str, ...] = option(
        (),
        kinds.NAMES,
        'devices for the inverse, such as `["cuda:0", "cpu"]`; `"all"`: every GPU; none: the CPU',
        INVERSE,
        **_UNLESS_GIVEN,
    )
    memory_limit: int | str | None = option(
        None,
        kinds.SIZE,
        'bytes that updates may take beside the training\'s own, or a text such as `"4GiB"`',
        INVERSE,
        shown="a quarter of what is free",
        help="such as 4GiB (default: 1/4 of what is free)",
        **_COMMANDS | {"takes_none": True, "second_order": True},
    )
    grads_device: str = option(
        "cpu",
        kinds.DEVICE,
        'where gradients are kept: `"cpu"` (memory, or disk as the limit has it), `"disk"`, or a device',
        INVERSE,
    )
    grads_dtype: str = option(
        "float32",
        kinds.choice("float32", "float16"),
        'how they are kept; `"float16"`, with a scale a sample: half the memory, entries off by up to 4.9e-4 of '
        "themselves",
        INVERSE,
    )
    num_pages: int = option(
        1,
        kinds.COUNT,
        "with one block over everything: keep one of so many pages of columns in memory, the others on disk",
        INVERSE,
        **_NOT_SENSITIVITY,
    )
    seed: int | None = option(
        0, kinds.COUNT_OR_ZERO, "seed of the choice of examples from arrays; None: anew each time", UPDATE, **_SEED
    )
    verbose: int = option(1, VERBOSITY, "0 silent, 1 progress bars, 2 a line a phase")

    def __post_init__(self) -> None:
        for row in options_of(type(self)):
            object.__setattr__(self, row.name, row.checked(getattr(self, row.name)))
        self._check_mask()
        if self.num_pages > 1 and self.fisher_block_size is not None:
            raise ValueError(
                f"num_pages={self.num_pages} is for one block over everything (fisher_block_size=None), got "
                f"fisher_block_size={self.fisher_block_size}: blocks are worked on one at a time anyway. Leave "
                "num_pages out; memory_limit bounds the memory."
            )

    @classmethod
    def of(cls, **given: Any) -> "PruningOptions":
        """The options as users write them: lists for tuples, and None for what is left out."""
        left_out = {row.name for row in options_of(cls) if row.default_in(CALLBACK) is None and not row.takes_none}
        return cls(**{name: value for name, value in given.items() if value is not None or name not in left_out})

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a function's arguments that are options."""
        return {row.name: arguments[row.name] for row in options_of(cls) if row.name in arguments}

    @property
    def second_order(self) -> bool:
        """Whether updates take gradients; magnitude pruning doesn't."""
        return self.method == WOODFISHER

    def settings(self) -> dict[str, Any]:
        """What a report says of how updates were made; nothing of magnitude pruning."""
        if not self.second_order:
            return {}
        values = {row.name: getattr(self, row.name) for row in options_of(type(self)) if row.reported}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    def _check_mask(self) -> None:
        mask = self.mask_type
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

    @property
    def most_gradients(self) -> int:
        """The largest number of samples that an update may use."""
        return max(self.num_grads.values()) if isinstance(self.num_grads, Mapping) else self.num_grads
