"""What a plan says before training begins."""

import pytest

from keras_woodfisher.callbacks.update_plan import Ramps
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.options.schedule import Schedule

pytestmark = pytest.mark.once


def ramps(together, sizes, num_grads):
    options = PruningOptions(global_sparsity=together, num_grads=num_grads)
    return Ramps(Schedule(0.0, 0.9, 0.0, 2.0, 1.0, "linear"), [0.9] * len(sizes), sizes, options)


@pytest.mark.parametrize(
    ("together", "sizes", "pruned", "samples"),
    [
        # One count for all: half a weight may be missing.
        (True, [50, 50], 49, 8),
        (True, [50, 50], 50, 16),
        (True, [5, 4], 4, 16),
        # A count of each: half a weight of each may be missing.
        (False, [50, 50], 48, 8),
        (False, [50, 50], 49, 16),
    ],
)
def test_rounding_to_whole_weights_does_not_choose_fewer_samples(together, sizes, pruned, samples):
    assert ramps(together, sizes, {0.0: 8, 0.5: 16}).gradients_after(pruned) == samples
