"""Sparse least squares against exhaustive search, and layers as matrix products against the layers themselves."""

from itertools import combinations

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_woodfisher_backends.keras_internals import RELEASE
from keras_woodfisher_backends.least_squares import exchange as exchange_module
from keras_woodfisher_backends.least_squares import kept_values
from keras_woodfisher_backends.least_squares import support as support_module
from keras_woodfisher_backends.least_squares.arithmetic import DOUBLE, SINGLE, OnDevice, arithmetic_for
from keras_woodfisher_backends.least_squares.exchange import Moves, best_moves, exchange, pairs_of
from keras_woodfisher_backends.least_squares.kept_values import conjugate_gradients, least_squares
from keras_woodfisher_backends.least_squares.normal_equations import NormalEquations
from keras_woodfisher_backends.least_squares.parts import Call, Side, parts_of
from keras_woodfisher_backends.least_squares.paths import best_sizes
from keras_woodfisher_backends.least_squares.support import sparse_support


def _largest(number):
    def project(values):
        kept = np.zeros(values.size, bool)
        kept[np.argsort(-np.abs(values), axis=None, kind="stable")[:number]] = True
        return kept.reshape(values.shape)

    return project


def _problem(seed, shape=(1, 7, 2), rows=60, correlated=0.8):
    rng = np.random.default_rng(seed)
    g, k, o = shape
    mix = np.eye(k) + correlated * rng.normal(size=(k, k)) / np.sqrt(k)
    x = (rng.normal(size=(g, rows, k)) @ mix).astype(np.float32)
    w = rng.normal(size=shape)
    return x, (x @ w + 0.1 * rng.normal(size=(g, rows, o))).astype(np.float32), w


def _error(x, t, w):
    return float(np.square(x.astype(np.float64) @ w - t).sum() / np.square(t.astype(np.float64)).sum())


def test_normal_equations_are_sums_over_rows():
    x, t, w = _problem(0, (3, 5, 2), rows=9000)
    equations = NormalEquations.empty((3, 5, 2))
    equations.add(x[:, :4000], t[:, :4000])
    equations.add(x[:, 4000:], t[:, 4000:])
    x, t = x.astype(np.float64), t.astype(np.float64)
    np.testing.assert_allclose(equations.gram, x.swapaxes(1, 2) @ x, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(equations.cross, x.swapaxes(1, 2) @ t, rtol=1e-5, atol=1e-2)
    assert equations.rows == 9000
    assert equations.error(0.5 * w) == pytest.approx(_error(x, t, 0.5 * w), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 7, 3), (4, 9, 1), (1, 80, 3), (2, 70, 2)])
def test_values_are_those_of_least_squares_on_each_support(shape):
    x, t, _ = _problem(1, shape, rows=400)
    kept = np.random.default_rng(2).random(shape) < 0.4
    kept[0, :, 0] = False
    x, t = x.astype(np.float64), t.astype(np.float64)
    found = least_squares(x.swapaxes(1, 2) @ x, x.swapaxes(1, 2) @ t, kept)
    for branch in range(shape[0]):
        for column in range(shape[2]):
            support = np.flatnonzero(kept[branch, :, column])
            wanted = np.zeros(shape[1])
            wanted[support] = np.linalg.lstsq(x[branch][:, support], t[branch, :, column], rcond=None)[0]
            np.testing.assert_allclose(found[branch, :, column], wanted, rtol=1e-6, atol=1e-9)


def test_values_of_wide_branches_begin_where_they_are_told_to(monkeypatch):
    """Each branch at its own start; what is right already stays to the bit."""
    x, t, _ = _problem(1, (2, 70, 3), rows=400)
    kept = np.random.default_rng(2).random((2, 70, 3)) < 0.4
    x, t = x.astype(np.float64), t.astype(np.float64)
    system = x.swapaxes(1, 2) @ x, x.swapaxes(1, 2) @ t, kept
    truth = least_squares(*system)
    monkeypatch.setattr(kept_values, "_STEPS", 0)  # However dense, by conjugate gradients.
    np.testing.assert_allclose(least_squares(*system), truth, rtol=1e-3, atol=1e-5)
    assert (least_squares(*system, start=truth + ~kept) == truth).all()
    assert (least_squares(*system, start=truth[::-1]) != truth).any()


@pytest.fixture(params=["double", "single", "device"])
def arithmetic(request, backend):
    """Each way to compute products; the device is the framework's own processor."""
    return {"double": DOUBLE, "single": SINGLE, "device": OnDevice(backend, "cpu:0")}[request.param]


@pytest.mark.parametrize("near", [True, False])
def test_conjugate_gradients_on_all_outputs_give_the_same(arithmetic, near):
    x, t, w = _problem(3, (1, 90, 5), rows=900)
    x, t = x[0].astype(np.float64), t[0].astype(np.float64)
    gram, cross = x.T @ x + 0.1 * np.eye(90), x.T @ t
    kept = np.random.default_rng(4).random(cross.shape) < 0.7
    kept[:, 1] = False
    wanted = np.zeros(cross.shape)
    for column in range(5):
        inside = np.flatnonzero(kept[:, column])
        wanted[inside, column] = np.linalg.solve(gram[np.ix_(inside, inside)], cross[inside, column])
    found = conjugate_gradients(gram, cross, kept, w[0] if near else None, arithmetic)
    assert not found[~kept].any()
    np.testing.assert_allclose(found, wanted, atol=1e-7 if arithmetic is DOUBLE else 1e-4)


def test_supports_are_as_good_in_every_arithmetic(arithmetic):
    x, t, w = _problem(5, (2, 60, 8), rows=500, correlated=2.0)
    equations = NormalEquations.empty(w.shape)
    equations.add(x, t, SINGLE if arithmetic is DOUBLE else arithmetic)
    exact = NormalEquations.empty(w.shape)
    exact.add(x, t)
    np.testing.assert_allclose(equations.gram, exact.gram, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(equations.cross, exact.cross, rtol=1e-4, atol=1e-2)
    errors = []
    for way in (DOUBLE, arithmetic):
        kept, _ = sparse_support(exact.gram, exact.cross, w, _largest(200), arithmetic=way)
        errors.append(exact.error(least_squares(exact.gram, exact.cross, kept)))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_what_is_large_is_computed_in_float32_and_on_a_device_if_it_has_room(backend, monkeypatch):
    device = OnDevice(backend, "cpu:0")
    assert arithmetic_for((1, 576, 64)) is DOUBLE
    assert arithmetic_for((1, 4096, 4096)) is SINGLE
    assert arithmetic_for((1, 4096, 4096), device) is device
    assert arithmetic_for((1, 64, 64), device) is DOUBLE
    monkeypatch.setattr(backend, "free_memory", lambda name: 2**20)
    assert arithmetic_for((1, 4096, 4096), device) is SINGLE


def test_exchanges_are_worth_what_the_errors_say():
    """A removal costs, an addition and a pair gain, what least squares on the changed support does."""
    x, t, _ = _problem(5, (1, 9, 6), rows=80)
    gram, cross = (np.einsum("grk,gro->gko", x, other, dtype=np.float64)[0] for other in (x, t))
    kept = np.random.default_rng(6).random((9, 6)) < np.linspace(0.05, 0.9, 6)
    kept[:, 0], kept[:, 5] = False, True
    free = np.random.default_rng(7).random((9, 6)) < 0.8

    def gain(column, support):
        inside = np.flatnonzero(support)
        return cross[inside, column] @ np.linalg.solve(gram[np.ix_(inside, inside)], cross[inside, column])

    def changed(column, *places):
        support = kept[:, column].copy()
        support[list(places)] = ~support[list(places)]
        return gain(column, support) - gain(column, kept[:, column])

    for column, move in enumerate(best_moves(gram, cross, kept, free)):
        goes = np.flatnonzero(kept[:, column] & free[:, column])
        comes = np.flatnonzero(~kept[:, column] & free[:, column])
        removals, additions = {j: -changed(column, j) for j in goes}, {i: changed(column, i) for i in comes}
        pairs = {(i, j): changed(column, i, j) for i in comes for j in goes}
        assert move.removal == min(removals, key=removals.get, default=-1)
        assert move.addition == max(additions, key=additions.get, default=-1)
        assert move.pair == max(pairs, key=pairs.get, default=(-1, -1))
        assert move.cost == pytest.approx(min(removals.values(), default=np.inf))
        assert move.gain == pytest.approx(max(additions.values(), default=-np.inf))
        assert move.pair_gain == pytest.approx(max(pairs.values(), default=-np.inf))


@pytest.mark.parametrize(("numbers", "widths"), [(1, [1, 1, 1, 1]), (2 * 12 * 3, [2, 2]), (10**6, [4])])
def test_outputs_are_worked_on_together_as_far_as_a_cache_holds_them(numbers, widths, monkeypatch):
    x, t, _ = _problem(8, (1, 15, 4), rows=80)
    gram, cross = (np.einsum("grk,gro->gko", x, other, dtype=np.float64)[0] for other in (x, t))
    kept, free = np.arange(15)[:, None] < np.full(4, 3), np.ones((15, 4), bool)
    whole, found, moves = best_moves(gram, cross, kept, free), [], exchange_module._moves
    monkeypatch.setattr(exchange_module, "_NUMBERS", numbers)
    monkeypatch.setattr(exchange_module, "_moves", lambda *parts: found.append(len(parts[1])) or moves(*parts))
    parted = best_moves(gram, cross, kept, free)
    assert found == widths
    for one, other in zip(parted, whole, strict=True):
        assert one.pair == other.pair and one.pair_gain == pytest.approx(other.pair_gain)


def test_no_output_gives_to_itself_nor_twice():
    def moves(cost, gain, removal=0, addition=1, pair_gain=0.0):
        return Moves(cost, removal, gain, addition, pair_gain, (addition, removal))

    a, b, c, d = ((0, column) for column in range(4))
    # The cheapest giver is the best taker itself.
    assert pairs_of({a: moves(1.0, 9.0), b: moves(2.0, 5.0)}, 0.0) == [(b, a)]
    # What one output gains by itself is better than what two gain together.
    assert not pairs_of({a: moves(1.0, 9.0, pair_gain=8.0), b: moves(2.0, 5.0)}, 0.0)
    assert not pairs_of({a: moves(1.0, 9.0), b: moves(2.0, 5.0)}, 7.0)
    found = pairs_of({a: moves(8.0, 9.0), b: moves(1.0, 2.0), c: moves(7.0, 8.5), d: moves(0.5, 1.0)}, 0.0)
    assert found == [(d, a), (b, c)]
    # Nor better than what the giver gains by itself.
    assert not pairs_of({a: moves(1.0, 9.0), b: moves(0.5, 2.0, pair_gain=9.0)}, 0.0)
    # Neither without a weight to give, nor without one to take.
    assert not pairs_of({a: moves(1.0, 9.0, removal=-1), b: moves(2.0, 5.0, removal=-1)}, 0.0)
    assert not pairs_of({a: moves(1.0, 9.0, addition=-1), b: moves(2.0, 5.0, addition=-1)}, 0.0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("number", [3, 6, 9])
def test_the_support_is_close_to_the_best_of_all(seed, number):
    x, t, w = _problem(seed, correlated=1.0)
    x, t = x.astype(np.float64), t.astype(np.float64)
    gram, cross = x.swapaxes(1, 2) @ x, x.swapaxes(1, 2) @ t
    best = min(_best_error(x[0], t[0], gram[0], cross[0], number))
    free = np.ones(w.shape, bool)
    kept = exchange(
        gram, cross, best_sizes(gram, cross, sparse_support(gram, cross, w, _largest(number))[0], free), free
    )
    assert kept.sum() == number
    assert _error(x, t, least_squares(gram, cross, kept)) <= 1.02 * best + 1e-9


def _best_error(x, t, gram, cross, number):
    """The error of every way to keep so many weights, by the best support of each size in each column."""
    k, o = cross.shape
    per_column = []
    for column in range(o):
        sizes = []
        for size in range(k + 1):
            values = [0.0]
            if size:
                values = [
                    float(cross[list(s), column] @ np.linalg.solve(gram[np.ix_(s, s)], cross[list(s), column]))
                    for s in combinations(range(k), size)
                ]
            sizes.append(max(values))
        per_column.append(sizes)
    total = float(np.square(t).sum())
    for first in range(max(0, number - k), min(k, number) + 1):
        yield (total - per_column[0][first] - per_column[1][number - first]) / total


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_that_is_sparse_is_found(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, 500, 30)).astype(np.float32)
    true = np.where(
        rng.random((1, 30, 6)) < 0.2, rng.normal(size=(1, 30, 6)) + np.sign(rng.normal(size=(1, 30, 6))), 0.0
    )
    x64 = x.astype(np.float64)
    gram, cross = x64.swapaxes(1, 2) @ x64, x64.swapaxes(1, 2) @ (x64 @ true)
    dense = np.linalg.solve(gram, cross)
    kept, near = sparse_support(gram, cross, dense, _largest(int((true != 0).sum())))
    np.testing.assert_array_equal(kept, true != 0)
    np.testing.assert_allclose(near, true, atol=0.05)
    np.testing.assert_allclose(least_squares(gram, cross, kept), true, atol=1e-8)


@pytest.mark.parametrize(("hurried", "flops"), [(True, 1e12), (False, 4.0 * 100 * 30 * 30 * 6 / 8.0)])
def test_the_penalty_grows_faster_where_that_saves_much_work(hurried, flops, monkeypatch):
    """A much larger problem, here by a smaller measure, or one that is hurried, takes fewer iterations."""
    x, t, _ = _problem(9, (1, 30, 6), rows=300)
    gram, cross = (np.einsum("grk,gro->gko", x, other, dtype=np.float64) for other in (x, t))

    def iterations(hurried):
        calls, project = [], _largest(40)
        sparse_support(
            gram, cross, np.linalg.solve(gram, cross), lambda w: calls.append(1) or project(w), hurried=hurried
        )
        return len(calls)

    usual = iterations(False)
    monkeypatch.setattr(support_module, "_FLOPS", flops)
    assert iterations(hurried) < 0.7 * usual


LAYERS = {
    "dense": (lambda: layers.Dense(3), (5, 4)),
    "dense in a sequence": (lambda: layers.Dense(3), (5, 6, 4)),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (None, 7), bias_axes="d"), (5, 6, 4)),
    "einsum of attention": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (5, 6, 4)),
    "einsum to the output of attention": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 7)), (5, 6, 2, 3)),
    "experts": (lambda: layers.EinsumDense("abc,bcd->abd", (3, 7)), (5, 3, 4)),
    "einsum of any rank": (lambda: layers.EinsumDense("...c,cd->...d", (3, 6, 7)), (5, 3, 6, 4)),
    "einsum, outputs first": (lambda: layers.EinsumDense("abc,cd->adb", (7, None)), (5, 6, 4)),
    "conv1d": (lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (5, 9, 4)),
    "conv2d": (lambda: layers.Conv2D(3, (3, 2), strides=(2, 1), padding="same"), (5, 9, 8, 4)),
    "conv2d valid": (lambda: layers.Conv2D(3, 3, strides=2), (5, 9, 8, 4)),
    "conv2d in groups": (lambda: layers.Conv2D(6, 3, groups=2, padding="same"), (5, 6, 6, 4)),
    "conv2d dilated": (lambda: layers.Conv2D(3, 3, dilation_rate=2, padding="same"), (5, 9, 9, 4)),
    "conv3d": (lambda: layers.Conv3D(3, 2, padding="same"), (3, 4, 4, 4, 2)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2), (5, 9, 9, 4)),
    "depthwise1d": (lambda: layers.DepthwiseConv1D(3), (5, 9, 4)),
    "separable": (lambda: layers.SeparableConv2D(6, 3, padding="same", depth_multiplier=2), (5, 7, 7, 4)),
    "separable1d": (lambda: layers.SeparableConv1D(6, 3, strides=2), (5, 9, 4)),
    "transposed": (lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same"), (5, 4, 5, 4)),
    "transposed valid": (lambda: layers.Conv2DTranspose(3, 3, strides=2), (5, 4, 5, 4)),
    "transposed small": (lambda: layers.Conv1DTranspose(3, 2, strides=3, padding="same"), (5, 6, 4)),
    "transposed3d": (lambda: layers.Conv3DTranspose(2, 3, strides=2, padding="same"), (2, 3, 3, 3, 2)),
}


if keras.backend.backend() == "torch" and RELEASE < (3, 15):
    # There it pads them otherwise than on the other backends.
    LAYERS = {kind: given for kind, given in LAYERS.items() if kind not in ("transposed", "transposed3d")}
if keras.backend.backend() != "tensorflow":
    # TensorFlow has no dilated ones on a CPU.
    LAYERS["transposed dilated"] = lambda: layers.Conv1DTranspose(3, 3, dilation_rate=2, padding="same"), (5, 6, 4)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_its_rows_times_its_matrix(kind):
    make, shape = LAYERS[kind]
    keras.utils.set_random_seed(0)
    layer = make()
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    output = layer(ops.convert_to_tensor(x))
    if getattr(layer, "bias", None) is not None:
        layer.bias.assign(np.zeros(layer.bias.shape))
        output = layer(ops.convert_to_tensor(x))
    names = [name for part in parts_of(layer) for name in part.forms]
    kernels = {name: ops.convert_to_numpy(getattr(layer, name)) for name in names}
    assert names == ["depthwise_kernel", "pointwise_kernel"] if "separable" in kind else names == ["kernel"]
    for part in parts_of(layer):
        side = Side(ops.convert_to_tensor(x), kernels, None)
        inputs, wanted = part.seen(Call(side, side, output))
        (wanted,) = part.ready([ops.convert_to_numpy(wanted)])
        number = len(wanted) * int(np.prod(part.positions(wanted)))
        places = np.random.default_rng(1).permutation(number)[: max(1, number * 2 // 3)]
        targets = part.targets(wanted, places)
        rows = part.rows(part.ready([ops.convert_to_numpy(one) for one in inputs]), places)
        matrix = part.matrix(kernels)
        assert matrix.shape == part.shape and rows.shape == (part.shape[0], len(places), part.shape[1])
        np.testing.assert_allclose(rows @ matrix, targets, atol=2e-5 * float(np.abs(targets).max()))
        for name, kernel in part.kernels(matrix).items():
            np.testing.assert_array_equal(kernel, kernels[name])


def test_an_einsum_that_sums_over_positions_has_no_form():
    layer = layers.EinsumDense("abc,cd->ad", (7,))
    layer.build((5, 6, 4))
    assert not parts_of(layer)


def test_an_einsum_whose_outputs_do_not_begin_with_the_examples_has_no_form():
    layer = layers.EinsumDense("abc,cd->dab", (5, 6))
    layer.build((5, 6, 4))
    assert not parts_of(layer)


class ScaledCell(layers.LSTMCell):
    """Multiplies something else than it gets."""

    def call(self, inputs, states, training=False):
        return super().call(inputs * 0.5, states, training=training)


class PlainCell(layers.GRUCell):
    """Does what its class does."""

    def call(self, inputs, states, training=False):
        return super().call(inputs, states, training=training)


class ClippedLSTM(layers.LSTM):
    """The layer, not its cell, changes the input."""

    def call(self, sequences, initial_state=None, mask=None, training=False):
        return super().call(ops.clip(sequences, -20.0, 20.0), initial_state, mask, training)


class SquaredSeparable(layers.SeparableConv1D):
    """The same between a depthwise and a pointwise kernel."""

    def call(self, inputs):
        return super().call(inputs * inputs)


class Wider(layers.SeparableConv1D):
    """It gives more than it convolved."""

    def call(self, inputs):
        return ops.pad(super().call(inputs), [[0, 0], [0, 0], [0, 1]])


class Choosy(layers.SeparableConv1D):
    """It takes sequences of its own length only."""

    def call(self, inputs):
        if inputs.shape[1] != 5:
            raise ValueError("five steps")
        return super().call(inputs)


OWN = {
    "scaled": (lambda: layers.RNN(ScaledCell(3)), 0),
    "plain": (lambda: layers.RNN(PlainCell(3), stateful=True), 2),
    "clipped": (lambda: ClippedLSTM(3), 0),
    "squared": (lambda: SquaredSeparable(3, 2), 0),
    "wider": (lambda: Wider(3, 2), 0),
    "choosy": (lambda: Choosy(3, 2), 0),
}


@pytest.mark.parametrize("kind", OWN)
def test_layers_of_ones_own_have_parts_where_they_do_as_keras_does(kind):
    make, number = OWN[kind]
    layer = make()
    layer(np.ones((2, 5, 4), "float32"))
    assert len(parts_of(layer)) == number
    assert "call" not in vars(layer) and "call" not in vars(getattr(layer, "cell", layer))


def test_a_layer_without_a_product_has_no_parts():
    assert not parts_of(layers.Embedding(5, 3))
    assert not parts_of(layers.ConvLSTM1D(2, 3))
