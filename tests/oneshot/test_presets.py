"""Presets: what they choose, and what wins over them."""

import re

import pytest

from keras_woodfisher.oneshot.presets import PRESETS, Circumstances, chosen, examples_to_count, plenty, resolve
from keras_woodfisher.options.pruning_options import PruningOptions


def test_a_preset_as_it_is_where_the_data_is_plenty():
    for name, preset in PRESETS.items():
        assert chosen(name, {}, None) == chosen(name, {}, 10**6) == preset
    assert (
        PRESETS["fast"].num_recomputations
        < PRESETS["balanced"].num_recomputations
        < 14
        == PRESETS["best"].num_recomputations
    )


def test_what_is_given_wins():
    given = {"stages": 3, "num_grads": 7, "damp": 0.5, "fisher": "empirical", "newton_steps": 0, "calibration": 11}
    found = chosen("best", {**given, "update": None}, 10**6)
    assert found.report("best", PruningOptions())["stages"] == found.options()["num_recomputations"] == 3
    assert {name: found.report("best", PruningOptions())[name] for name in given} == given
    assert found.update == "calibrated"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("available", [1, 2, 9, 96, 600, 1200, 5000])
def test_it_fits_the_data(name, available):
    found = chosen(name, {}, available)
    assert found.num_grads >= 1 and found.grad_batch_size >= 1
    if available > 1:
        assert found.calibration + found.num_grads * found.grad_batch_size <= available
    assert found.calibration <= max(1, available / 10 + 1)


def test_few_examples_choose_nothing():
    for name in ("balanced", "best"):
        assert chosen(name, {}, 199) == chosen("fast", {}, 199)
        assert chosen(name, {}, 200).update == "calibrated"
        assert chosen(name, {"stages": 3, "newton_steps": 0}, 100) == chosen("fast", {"stages": 3}, 100)
        for asked in ({"update": "calibrated"}, {"calibration": 5}, {"newton_steps": 1}):
            assert chosen(name, asked, 100).update == "calibrated"


def test_what_is_plenty():
    assert plenty(PRESETS["fast"]) == 512
    assert plenty(PRESETS["balanced"]) == 2500
    assert plenty(PRESETS["best"]) == 5000
    for name, preset in PRESETS.items():
        assert chosen(name, {}, plenty(preset)) == preset


def test_block_by_block_nothing_is_held_out():
    found = chosen("best", {"update": "joint"}, 1000)
    assert (found.calibration, found.newton_steps, found.num_recomputations) == (0, 0, 14)


def test_calibrated_corrections_have_examples_whatever_the_preset():
    assert chosen("fast", {"update": "calibrated"}, None).calibration == 500


@pytest.mark.parametrize(
    "error, message, given",
    [
        (ValueError, "quality must be one of 'fast', 'balanced', 'best', got 'good'", {"quality": "good"}),
        (ValueError, "stages must be at least 1, got 0", {"stages": 0}),
        (TypeError, "stages must be a whole number, got 1.5", {"stages": 1.5}),
        (ValueError, "newton_steps must be at least 0, got -1", {"newton_steps": -1}),
        (ValueError, "calibration must be at least 1, got 0. update='calibrated' chooses by", {"calibration": 0}),
        (
            ValueError,
            "calibration is for update='calibrated', got update='joint'",
            {"calibration": 5, "update": "joint"},
        ),
        (ValueError, "newton_steps is for update='cal", {"newton_steps": 1, "update": "independent"}),
    ],
)
def test_errors(error, message, given):
    given = dict(given)
    with pytest.raises(error, match=message):
        chosen(given.pop("quality", "balanced"), given, 1000)


GGN = "fisher='ggn' needs a loss whose curvature is known."


@pytest.mark.parametrize(
    "given, circumstances, settings, note",
    [
        ({}, Circumstances(), {"fisher": "ggn", "newton_steps": 6}, None),
        ({}, Circumstances(available=150), {"update": "joint", "newton_steps": 0}, "fewer than 200 examples"),
        ({"update": "joint"}, Circumstances(available=150), {"update": "joint"}, None),
        ({}, Circumstances(unknown_curvature=GGN), {"fisher": "empirical"}, f"fisher='empirical' instead.*{GGN}"),
        ({"fisher": "ggn"}, Circumstances(unknown_curvature=GGN), {"fisher": "ggn"}, None),
        ({}, Circumstances(batchnorm=True), {"newton_steps": 0, "update": "calibrated"}, None),
        ({"newton_steps": 2}, Circumstances(batchnorm=True), {"newton_steps": 2}, None),
        ({}, Circumstances("magnitude"), {}, None),
        ({"stages": 2, "damp": 0.1}, Circumstances("magnitude"), {}, "corrects nothing: stages, damp had no"),
    ],
)
def test_settings_and_notes(given, circumstances, settings, note):
    found, notes = resolve("balanced", given, circumstances)
    assert {name: getattr(found, name) for name in settings} == settings
    assert len(notes) == (note is not None)
    assert note is None or re.search(note, notes[0])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("given", [{}, {"num_grads": 9}, {"num_grads": 9, "grad_batch_size": 2}, {"update": "joint"}])
@pytest.mark.parametrize("more", [{}, {"calibration": 9}, {"newton_steps": 0, "stages": 1}])
def test_examples_are_counted_where_their_number_matters(name, given, more):
    given = given | (more if "update" not in given else {})
    if name == "fast" and "calibration" in given:
        given["update"] = "calibrated"
    differ = {n for n in (1, 2, 50, 199, 200, 500, 2000) if chosen(name, given, n) != chosen(name, given, None)}
    assert bool(differ) == bool(most := examples_to_count(name, given))
    assert all(n < most for n in differ)
