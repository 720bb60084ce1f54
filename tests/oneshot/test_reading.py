"""How often `prune` begins to read the data that it is given."""

import keras
import pytest
from keras import layers

import keras_woodfisher as kw

ROWS, SIZE = 240, 32


class Stream:
    """A callable that counts how often it is called."""

    def __init__(self, parts):
        self.parts = parts
        self.starts = 0

    def __call__(self):
        self.starts += 1
        return (tuple(part[i : i + SIZE] for part in self.parts) for i in range(0, ROWS, SIZE))


class Dataset(keras.utils.PyDataset):
    """Counts how often its first batch is read: each time that it is opened, to know its length, or read."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self.starts = 0

    @property
    def num_batches(self):
        return -(-ROWS // SIZE)

    def __getitem__(self, index):
        self.starts += index == 0
        return tuple(part[index * SIZE : (index + 1) * SIZE] for part in self.parts)


@pytest.fixture
def parts(rng):
    return rng.normal(size=(ROWS, 4)).astype("float32"), rng.integers(0, 3, ROWS).astype("int32")


def model_of():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((4,)), layers.Dense(6), layers.BatchNormalization(), layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


GIVEN = {"quality": "fast", "num_grads": 16, "grad_batch_size": 1}


@pytest.mark.parametrize(
    "options, stream, dataset",
    [
        # A look at the first group, then the samples of each stage; a dataset's length tells how much it holds.
        # Where that is known, some are held out to compare with magnitude pruning on.
        (GIVEN, 2, 4),
        (GIVEN | {"damp": 1e-4}, 2, 3),
        (GIVEN | {"stages": 2}, 3, 5),
        # Examples are counted, once.
        ({"quality": "fast"}, 3, 3),
        (GIVEN | {"reestimate_batchnorm": True}, 3, 5),
        # What is held out; a gradient for each step that is tried.
        (GIVEN | {"update": "calibrated", "calibration": 20, "newton_steps": 0}, 3, 4),
        (GIVEN | {"update": "calibrated", "newton_steps": 0}, 4, 4),
        ({"method": "magnitude"}, 0, 0),
        ({"method": "magnitude", "reestimate_batchnorm": True}, 1, 2),
    ],
)
def test_data_is_opened_once(parts, options, stream, dataset):
    for data, expected in ((Stream(parts), stream), (Dataset(parts), dataset)):
        kw.prune(model_of(), data, 0.5, verbose=0, **options)
        assert data.starts == expected


def test_sensitivity_opens_data_once(parts):
    stream, dataset = Stream(parts), Dataset(parts)
    for data in (stream, dataset):
        kw.sensitivity(model_of(), data, [0.5], num_grads=16, verbose=0)
    # To measure losses, to look at the first group, and for the samples.
    assert (stream.starts, dataset.starts) == (3, 4)
