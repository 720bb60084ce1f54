"""Groups of weights in Keras's own layout of every kind of layer, and blocks of the Fisher that hold them."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_woodfisher.model.targets import find_targets
from keras_woodfisher.options.mask_types import check_final, checked_mask
from keras_woodfisher.pruning.fisher import block_slices
from keras_woodfisher.pruning.groups import Structure, arranged


def groups_of(layer, shape, mask, name="kernel"):
    """For each variable with that name an array of its shape: the group of each weight, -1 where it has none."""
    model = keras.Sequential([keras.Input(shape), layer])
    targets = [arranged(t, mask) for t in find_targets(model, "__ALL_PRUNABLE__") if t.variable.name == name]
    structure = Structure(targets, mask)
    (target,) = targets
    assert structure.covered == [int((structure.labels >= 0).sum())]
    labels = target.unflatten(structure.labels)
    found = np.unique(labels[labels >= 0])
    assert found.tolist() == list(range(structure.number))
    return labels, structure


def partition(labels):
    """The groups as sets of places."""
    flat = labels.ravel()
    return {frozenset(np.flatnonzero(flat == group).tolist()) for group in range(flat.max() + 1)}


def partition_of(groups):
    return {frozenset(np.asarray(group).ravel().tolist()) for group in groups}


def places(*shape):
    return np.arange(int(np.prod(shape))).reshape(shape)


def test_neighbours_of_dense_are_inputs_of_one_unit():
    labels, structure = groups_of(layers.Dense(3), (10,), "2:4")
    kernel = places(10, 3)
    assert partition(labels) == partition_of([kernel[low : low + 4, unit] for low in (0, 4) for unit in range(3)])
    assert (labels[8:] == -1).all(), "the rest of each unit stays dense"
    assert structure.note() == (
        f"mask_type 2:4 leaves dense what fills no group: {structure._targets[0].name} (6 of 30 weights)."
    )
    # The members of each group, in weight order.
    for group, members in enumerate(structure.members):
        assert (structure.labels[members] == group).all()


def test_bytes_of_groups_grow_with_weights_and_with_what_a_group_may_lose():
    def bytes_of(units, mask):
        return groups_of(layers.Dense(units), (16,), mask)[1].bytes

    for mask, most in (("block4", 0), ("filter", 0), ("2:4", 2), ("2:8", 6)):
        pattern = int(mask[-1]) if most else 1
        assert bytes_of(3, mask) == (32 + most) * 48 + 64 * most * 48 // pattern, mask


@pytest.mark.parametrize("channels", [8, 3])
def test_neighbours_of_convolutions_are_input_channels_at_one_position(channels):
    labels, _ = groups_of(layers.Conv2D(2, (2, 3)), (6, 6, channels), "block4")
    rows = places(2, 3, channels, 2).reshape(-1, 2)
    whole = len(rows) // 4 * 4
    assert partition(labels) == partition_of(
        [rows[low : low + 4, unit] for low in range(0, whole, 4) for unit in (0, 1)]
    )
    assert (labels == -1).sum() == 2 * (len(rows) - whole)


def test_blocks_are_outputs_by_inputs():
    labels, structure = groups_of(layers.Dense(5), (7,), (2, 3))
    kernel = places(7, 5)
    blocks = [kernel[low : low + 3, unit : unit + 2] for low in (0, 3) for unit in (0, 2)]
    assert partition(labels) == partition_of(blocks)
    assert structure.number == 4
    assert structure.largest == 6
    assert (labels[6] == -1).all()
    assert (labels[:, 4] == -1).all()


CASES = [
    (layers.Dense(3), (4,), "kernel", (4, 3), 1, 0),
    (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (5, 4), "kernel", (4, 2, 3), (1, 2), 0),
    (layers.EinsumDense("abcd,cde->abe", (None, 3)), (5, 2, 4), "kernel", (2, 4, 3), 2, (0, 1)),
    (layers.Conv1D(3, 2), (6, 4), "kernel", (2, 4, 3), 2, 1),
    (layers.Conv3D(3, 2), (4, 4, 4, 2), "kernel", (2, 2, 2, 2, 3), 4, 3),
    (layers.Conv2DTranspose(3, 2), (4, 4, 2), "kernel", (2, 2, 3, 2), 2, 3),
    (layers.SeparableConv2D(3, 2), (4, 4, 2), "pointwise_kernel", (1, 1, 2, 3), 3, 2),
    (layers.LSTM(2), (3, 5), "recurrent_kernel", (2, 8), 1, 0),
    (layers.ConvLSTM2D(2, 2), (2, 4, 4, 3), "kernel", (2, 2, 3, 8), 3, 2),
]


@pytest.mark.parametrize("layer, shape, name, kernel, outputs, inputs", CASES, ids=lambda c: getattr(c, "name", ""))
def test_filters_and_channels(layer, shape, name, kernel, outputs, inputs):
    layer = type(layer).from_config(layer.get_config())

    def slices(axes):
        axes = np.atleast_1d(axes)
        front = np.moveaxis(places(*kernel), axes, range(len(axes)))
        return front.reshape(-1, int(np.prod(front.shape[len(axes) :])))

    by_filter, _ = groups_of(layer, shape, "filter", name)
    assert by_filter.shape == kernel
    assert partition(by_filter) == partition_of(slices(outputs))
    again = type(layer).from_config(layer.get_config())
    by_channel, structure = groups_of(again, shape, "channel", name)
    assert partition(by_channel) == partition_of(slices(inputs))
    # Whole groups are runs in weight order, so that a block of the Fisher can hold them.
    assert np.count_nonzero(np.diff(structure.labels)) == structure.number - 1


def test_channels_of_grouped_and_depthwise_convolutions():
    grouped, _ = groups_of(layers.Conv2D(6, 2, groups=3), (4, 4, 6), "channel")
    kernel = places(2, 2, 2, 6)
    assert partition(grouped) == partition_of(
        [kernel[:, :, channel, 2 * part : 2 * part + 2] for part in range(3) for channel in range(2)]
    )
    depthwise, _ = groups_of(layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4), "channel")
    assert partition(depthwise) == partition_of([places(3, 3, 4, 2)[:, :, channel] for channel in range(4)])
    filters, _ = groups_of(layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4), "filter")
    kernel = places(9, 4, 2)
    assert partition(filters) == partition_of([kernel[:, c, k] for c in range(4) for k in range(2)])
    four, _ = groups_of(layers.DepthwiseConv2D(3), (5, 5, 2), "block4")
    assert partition(four) == partition_of([places(9, 2)[low : low + 4, c] for low in (0, 4) for c in range(2)])


def test_a_variable_without_a_group_stays_dense_and_none_at_all_is_an_error():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="few"), layers.Dense(2, name="many")])
    targets = [arranged(t, "2:4") for t in find_targets(model, "__ALL_PRUNABLE__")]
    structure = Structure(targets, "2:4")
    assert structure.covered == [0, 8]
    assert structure.edges == [0, 0, 2]
    assert "few/kernel (12 of 12 weights)" in structure.note()
    with pytest.raises(ValueError, match=r"2:4 finds no whole group in any chosen variable: .*few/kernel \(3, 4\)"):
        Structure(targets[:1], "2:4")


def test_blocks_of_the_fisher_end_between_groups():
    rng = np.random.default_rng(0)
    for _ in range(200):
        kept = rng.integers(0, 30, rng.integers(1, 5)).tolist()
        runs = rng.integers(1, 7, 200)
        # Runs that never span two variables.
        labels, group = [], 0
        for width in kept:
            part = np.repeat(np.arange(200), runs)[:width] + group
            labels.append(part)
            group = part.max() + 1 if width else group
        labels, size = np.concatenate(labels), int(rng.integers(1, 12))
        blocks = block_slices(kept, size, labels)
        assert [c for b in blocks for c in range(b.start, b.stop)] == list(range(sum(kept)))
        edges = set(np.cumsum([0, *kept]).tolist())
        for block in blocks:
            assert 0 < block.stop - block.start <= size
            inside = block.stop not in edges and labels[block.stop - 1] == labels[block.stop]
            run = np.count_nonzero(labels == labels[block.stop - 1])
            assert not inside or run > size or np.ptp(labels[block]) == 0
    whole = np.zeros(10, int)
    assert block_slices([10], 4, whole) == block_slices([10], 4)
    assert block_slices([10], None, whole) == [slice(0, 10)]


@pytest.mark.parametrize("value", ["unstructured", "2:4", "1:4", "4:8", "block4", "filter", "channel", [1, 4], (2, 2)])
def test_mask_types(value):
    assert checked_mask(checked_mask(value)) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("4:2", ValueError, "mask_type must be unstructured, .*got '4:2'"),
        ("0:4", ValueError, "got '0:4'"),
        ("2:4 ", ValueError, "got '2:4 '"),
        ("block", ValueError, "got 'block'"),
        ([0, 4], ValueError, r"the sides of a block must be at least 1, got \[0, 4\]"),
        ([4], TypeError, r"must be two whole numbers, \[outputs, inputs\], got \[4\]"),
        ([1.0, 4], TypeError, "must be two whole numbers"),
        ([True, 4], TypeError, "must be two whole numbers"),
        (4, TypeError, "mask_type must be a text"),
        (None, TypeError, "mask_type must be a text"),
    ],
)
def test_wrong_mask_types(value, error, message):
    with pytest.raises(error, match=message):
        checked_mask(value)


def test_a_sparsity_that_a_pattern_can_not_reach():
    for mask, final in (("2:4", 0.5), ("1:3", 0.667), ("1:4", 0.75), ("filter", 0.99), ("unstructured", 0.99)):
        check_final(mask, final)
    with pytest.raises(ValueError, match=r"2:4 keeps 2 of 4 weights, so the final sparsity is at most 0.5, got 0.6"):
        check_final("2:4", 0.6)
