import math

import numpy as np
import pytest

from keras_woodfisher.options.schedule import INTERPOLATIONS, Schedule


def drawn(seed):
    """A random schedule; starts, ends and frequencies that divide, don't divide, and are longer than the ramp."""
    rng = np.random.default_rng(seed)
    start = float(rng.choice([0.0, 0.5, 0.7, 1.0, rng.uniform(0, 3)]))
    length = float(rng.choice([0.0, 0.3, 1.0, 4.0, rng.uniform(0, 6)]))
    frequency = float(rng.choice([0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0, 10.0, rng.uniform(0.05, 2)]))
    low, high = sorted(rng.uniform(0, 0.99, 2))
    return Schedule(float(low), float(high), start, start + length, frequency, str(rng.choice(list(INTERPOLATIONS))))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("cubic", [0.0, 37 / 64, 7 / 8, 63 / 64, 1.0]),
        # 1 - (1-x)^(1/3): where the cubic one has 1 - 1/8 = 7/8 at 1/2, this one has 1/2 at 7/8.
        ("inverse_cubic", [0.0, 1 - 0.75 ** (1 / 3), 1 - 0.5 ** (1 / 3), 1 - 0.25 ** (1 / 3), 1.0]),
    ],
)
def test_interpolations_at_quarters(name, values):
    ramp = Schedule(0.2, 0.7, 1.0, 5.0, 1.0, name)
    assert [ramp.sparsity(1.0 + k) for k in range(5)] == pytest.approx([0.2 + 0.5 * v for v in values])


def test_inverse_cubic_is_the_inverse_of_cubic():
    ramp = Schedule(0.0, 1 / 2, 0.0, 1.0, 0.1, "inverse_cubic")
    assert 2 * ramp.sparsity(7 / 8) == pytest.approx(1 / 2)


@pytest.mark.parametrize("seed", range(40))
def test_sparsity_never_falls_and_has_its_ends(seed):
    ramp = drawn(seed)
    positions = np.linspace(-1.0, ramp.end + 2, 300)
    values = np.array([ramp.sparsity(p) for p in positions])
    assert (np.diff(values) >= -1e-12).all()
    assert (values[positions < ramp.start] == ramp.init).all()
    assert (values[positions >= ramp.end] == ramp.final).all()
    assert values.min() >= ramp.init
    assert values.max() <= ramp.final


def test_start_at_end_is_one_step_to_the_final_sparsity():
    ramp = Schedule(0.1, 0.9, 2.0, 2.0, 1.0)
    assert [ramp.sparsity(p) for p in (0.0, 1.999, 2.0, 3.0)] == [0.1, 0.1, 0.9, 0.9]
    assert ramp.updates(steps=10) == [2.0]
    assert ramp.due(1.9) is None
    assert ramp.due(2.0) == 2.0


@pytest.mark.parametrize("seed", range(40))
def test_due_is_the_latest_point_of_a_fixed_grid(seed):
    ramp = drawn(seed)
    grid = [ramp.start + k * ramp.frequency for k in range(math.ceil(10 / ramp.frequency))]
    grid = sorted([p for p in grid if p < ramp.end - 1e-9] + [ramp.end])
    for position in np.random.default_rng(seed).uniform(-1, ramp.end + 2, 100):
        past = [p for p in grid if p <= position + 1e-9]
        assert ramp.due(position) == (pytest.approx(past[-1]) if past else None)


@pytest.mark.parametrize("steps", [1, 3, 7, 400])
@pytest.mark.parametrize("frequency", [0.5, 0.1, 0.7])
def test_the_grid_does_not_drift(steps, frequency):
    """Whatever the steps an epoch, there is at least one update for each grid point that steps can tell apart."""
    ramp = Schedule(0.0, 0.9, 0.0, 3.0, frequency)
    positions = [epoch + batch / steps for epoch in range(3) for batch in range(steps)] + [3.0]
    seen = sorted({ramp.due(p) for p in positions})
    points = np.array([k * frequency for k in range(math.ceil(3 / frequency - 1e-9))])
    reached = {max(points[points <= p + 1e-9]) for p in positions[:-1]}
    assert seen == pytest.approx(sorted(reached | {3.0}))


@pytest.mark.parametrize("first_epoch", [0, 1, 2, 9])
@pytest.mark.parametrize("seed", range(25))
def test_updates_are_what_a_run_from_an_epoch_on_finds_due(seed, first_epoch):
    ramp = drawn(seed)
    scan = np.arange(first_epoch, max(ramp.end, first_epoch) + 0.01, 0.002)
    found = [ramp.due(p) for p in scan]
    distinct = [p for p, before in zip(found, [None, *found], strict=False) if p is not None and p != before]
    assert ramp.updates(None, first_epoch) == pytest.approx(distinct)


def test_updates_at_every_step():
    ramp = Schedule(0.0, 0.5, 1.0, 2.0, 0.0)
    assert ramp.updates(steps=4) == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0])
    assert [ramp.due(p) for p in (0.9, 1.0, 1.37, 2.0, 2.2)] == [None, 1.0, 1.37, 2.0, 2.0]


def test_of_the_missed_updates_only_the_latest_is_made_up_for():
    ramp = Schedule(0.0, 0.5, 0.5, 4.0, 1.0)
    assert ramp.updates(None, first_epoch=3) == [2.5, 3.5, 4.0]
    assert ramp.updates(None, first_epoch=7) == [4.0]


@pytest.mark.parametrize(("start", "frequency", "first_epoch"), [(0.1, 0.3, 1), (0.2, 0.15, 2), (0.9, 0.7, 3)])
def test_an_update_at_the_first_epoch_is_not_counted_twice(start, frequency, first_epoch):
    # In floating point this update lies just before the epoch: 0.1 + 3 * 0.3 is 0.9999999999999999.
    updates = Schedule(0.0, 0.5, start, 5.0, frequency).updates(None, first_epoch)
    assert updates[:2] == pytest.approx([first_epoch, first_epoch + frequency])
