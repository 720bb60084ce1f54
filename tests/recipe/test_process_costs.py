"""What the dry run tells of several processes, from the formulas."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_woodfisher as kw
from keras_woodfisher.cli import main
from keras_woodfisher.options.sizes import size_text
from keras_woodfisher.pruning.share import ON_THE_WAY

SAMPLES, WIDTH = 64, 100


def recipe(**fields):
    settings = {"params": "__ALL_PRUNABLE__", "init_sparsity": 0.2, "final_sparsity": 0.8, "start_epoch": 0.0}
    settings |= {"end_epoch": 2.0, "update_frequency": 1.0, "num_grads": SAMPLES, "fisher_block_size": WIDTH}
    return {"modifiers": [{"MFACPruningModifier": settings | fields}]}


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    model = keras.Sequential([layers.Input((50,)), layers.Dense(100, name="a"), layers.Dense(4, name="b")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, (rng.normal(size=(1024, 50)).astype("float32"), rng.integers(0, 4, 1024))


def cost(made, ranks, hosts=None, **fields):
    check = kw.check_recipe(
        kw.load_recipe(recipe(**fields)), made[0], 10, 3, data=made[1], ranks=ranks, hosts=hosts, verbose=0
    )
    assert not check.problems
    return check.modifiers[0].process


def test_what_each_holds_sends_and_computes_follows_from_the_formulas(made):
    # The first update has all weights, of whole blocks but for the last one of each variable.
    rows, columns = SAMPLES // 2, 50 * 100 // 2 + 200
    found = cost(made, 2)
    assert found.gradient_bytes >= 4 * (rows * 5400 + SAMPLES * columns)
    # A piece that is on its way, here all rows, is there several times.
    assert found.gradient_bytes <= 4 * ((1 + ON_THE_WAY) * rows * 5400 + SAMPLES * (columns + WIDTH))
    assert found.gradient_bytes < found.expected_bytes <= found.held_bytes
    assert f"{size_text(found.expected_bytes)} expected at the peak, {size_text(found.held_bytes)} at most" in str(
        found.lines()
    )
    assert found.sent_bytes == 4 * rows * (5400 - columns) + 16 * columns
    assert found.operations == pytest.approx(27 * (2 * SAMPLES**2 * WIDTH + 2 * SAMPLES**3 / 3))
    more = cost(made, 4)
    assert more.sent_bytes < found.sent_bytes and more.operations < found.operations
    assert more.gradient_bytes < found.gradient_bytes and more.limit_bytes < found.limit_bytes
    assert cost(made, 4, hosts=2).limit_bytes > more.limit_bytes
    assert cost(made, None) is None


def test_how_many_processes_would_fit(made):
    many = {"num_grads": 1024}
    limit = 2 * (cost(made, 64, hosts=32, **many).held_bytes + 2**16)
    found = cost(made, 2, memory_limit=limit, **many)
    assert found.limit_bytes == limit // 2 < found.held_bytes and 2 < found.fitting <= 64 and found.fitting % 2 == 0
    enough = cost(made, found.fitting, hosts=found.fitting // 2, memory_limit=limit, **many)
    assert enough.held_bytes <= enough.limit_bytes == limit // 2
    lines = "\n".join(found.lines())
    assert f"that is too much: {found.fitting} processes would fit, with as many on each machine" in lines


def test_numbers_of_processes_are_checked(made):
    ready = kw.load_recipe(recipe())
    with pytest.raises(ValueError, match=r"hosts=2 says where processes run: give ranks="):
        kw.check_recipe(ready, made[0], hosts=2, verbose=0)
    with pytest.raises(ValueError, match=r"ranks=2 processes can't run on hosts=3 machines"):
        kw.check_recipe(ready, made[0], ranks=2, hosts=3, verbose=0)
    with pytest.raises(ValueError, match="ranks"):
        kw.check_recipe(ready, made[0], ranks=0, verbose=0)


def test_the_command_line_tells_it(made, tmp_path, capsys):
    made[0].save(tmp_path / "m.keras")
    np.savez(tmp_path / "d.npz", x=made[1][0], y=made[1][1])
    kw.load_recipe(recipe()).save(tmp_path / "r.yaml")
    data = ["--steps-per-epoch", "10", "--epochs", "3", "--data", str(tmp_path / "d.npz")]
    assert (
        main(["check", str(tmp_path / "r.yaml"), str(tmp_path / "m.keras"), *data, "--ranks", "8", "--hosts", "2"]) == 0
    )
    assert "8 processes on 2 machines like this one, each: " in capsys.readouterr().out
