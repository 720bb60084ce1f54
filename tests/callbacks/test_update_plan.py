"""What a plan says before training begins."""

import pytest

import keras_woodfisher as kw
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


@pytest.mark.parametrize(("end", "epochs", "first"), [(2.0, None, 2), (2.5, None, 2), (2.0, 6, 2), (2.0, 2, 1)])
def test_the_first_epoch_that_ends_at_the_final_sparsity(end, epochs, first):
    assert kw.WoodFisherPruning(0.5, end_epoch=end).task.first_final_epoch(epochs) == first
