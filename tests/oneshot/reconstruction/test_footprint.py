"""The memory plan of reconstruction: it fits the limit, and uses what is there."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from keras import layers
from keras_woodfisher_backends.least_squares.normal_equations import ROWS
from keras_woodfisher_backends.least_squares.parts import parts_of

from keras_woodfisher.memory.free_memory import give_back_memory
from keras_woodfisher.oneshot.reconstruction import problem as problem_module
from keras_woodfisher.oneshot.reconstruction.footprint import TOGETHER, Needs, plan_chunks
from keras_woodfisher.oneshot.reconstruction.problem import Problem

NEEDS = Needs(example=100, live=5_000, sums=(20_000, 70_000, 50_000, 10_000), work=90_000)


def test_what_it_takes_is_examples_chunk_sums_and_work():
    # 100 examples and 10 held out; 20 at a time twice, with inputs three times over; the two largest sums.
    assert NEEDS.bytes(100, 20, 2) == 110 * 100 + 20 * 2 * (5_000 + 2 * 100) + 120_000 + 90_000


@pytest.mark.parametrize("limit", np.geomspace(210_000, 3_000_000, 40).astype(int))
def test_plans_fit_and_waste_nothing(limit):
    plan = plan_chunks(200, NEEDS, int(limit), "memory_limit")
    assert plan.bytes <= limit and plan.chunk * plan.chunks >= 200 > plan.chunk * (plan.chunks - 1)
    assert plan.bytes == NEEDS.bytes(200, plan.chunk, plan.together)
    if plan.chunks > 2:
        assert NEEDS.bytes(200, plan.chunk + 1, plan.together) > limit
    if plan.together < TOGETHER:
        assert NEEDS.bytes(200, 16, plan.together + 1) > limit


@pytest.mark.parametrize("limit", np.geomspace(260_000, 2_000_000, 20).astype(int))
def test_half_of_what_is_left_is_for_what_passes_leave_to_the_next(limit):
    plan = plan_chunks(200, replace(NEEDS, amid=2_000), int(limit), "memory_limit")
    assert plan.chunks > 1
    assert plan.bytes == plan.room + NEEDS.bytes(200, plan.chunk, plan.together) <= limit
    left = limit - min(limit, *(NEEDS.bytes(200, 16, n) for n in range(1, TOGETHER + 1)))
    assert 0 <= plan.room <= left // 2
    # What half of the places leave fits: then layers are solved one by one.
    assert plan.together == 1 if plan.room >= 2 * 200 * 2_000 else plan.together >= 1
    assert plan.chunk >= min(16, plan_chunks(200, NEEDS, int(limit), "memory_limit").chunk)


def test_one_pass_where_all_fit():
    whole = NEEDS.bytes(200, 200, TOGETHER)
    assert plan_chunks(200, NEEDS, whole, "memory_limit").chunks == 1
    assert plan_chunks(200, NEEDS, whole - 1, "memory_limit").chunks == 2


def test_what_can_not_fit_says_what_would():
    least = NEEDS.bytes(200, 1, 1)
    assert plan_chunks(200, NEEDS, least, "memory_limit").chunk == 1
    with pytest.raises(MemoryError, match=r"needs at least 0\.2 MiB .* Give memory_limit=\"1 MiB\""):
        plan_chunks(200, NEEDS, least - 1, "memory_limit")
    with pytest.raises(MemoryError, match=r"may be used \(all that is free\)\. Choose fewer or smaller variables"):
        plan_chunks(200, NEEDS, least - 1, "all that is free", least - 1)


def test_young_cycles_of_references_are_freed():
    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.itself, alive = node, weakref.ref(node)
        del node
        assert alive() is not None
        give_back_memory()
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("inputs", "units"), [(300, 10), (3, 40_000), (4, 2), (2_000, 10)])
def test_a_problem_takes_its_sums_and_the_larger_of_rows_and_solution(inputs, units):
    layer = layers.Dense(units)
    layer.build((None, inputs))
    problem = Problem(layer, parts_of(layer)[0], {}, {}, 0)
    # H and B; then the rows that they are sums of, or H four times over and seven arrays of the kernel's shape.
    assert problem.sums == 8 * (inputs**2 + inputs * units)
    rows, solution = 8 * ROWS * (inputs + units), 8 * (4 * inputs**2 + 7 * inputs * units)
    assert problem.work == max(rows, solution)


@pytest.mark.parametrize(
    ("most", "masked", "number"), [(7, True, 7), (1000, True, 13), (7, False, 10), (1000, False, 40)]
)
def test_of_the_positions_that_count_each_is_used_once(most, masked, number, monkeypatch):
    """Without a mask as many of each of the five examples."""
    layer = layers.Dense(3)
    layer.build((None, None, 4))
    problem = Problem(layer, parts_of(layer)[0], {}, {}, 0)
    monkeypatch.setattr(problem_module, "most_rows", lambda inputs: most)
    mask = np.arange(40).reshape(5, 8) % 3 == 1 if masked else None
    places = problem.places(np.zeros((5, 8, 3)), mask, 1.0)
    assert len(places) == number and (np.diff(places) > 0).all()
    assert np.isin(places, np.arange(40) if mask is None else np.flatnonzero(mask)).all()
