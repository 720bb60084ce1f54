"""Whatever a fit is composed of, its zeros hold and nothing stays: a few drawn here, many by `make fuzz`."""

import os
import pathlib
import tempfile
import zipfile

import keras
import numpy as np
from composed_fits import BACKEND, CASES, STEPS, Watch, given_to_fit, model_of, others, policy, pruner_of, released
from hypothesis import HealthCheck, Phase, given, settings
from keras import ops
from leftovers import left_in

import keras_woodfisher as kw

MANY = int(os.environ.get("FITS", "0"))
"""How many fits `make fuzz` draws anew; the suite always takes the same few."""


@settings(
    max_examples=MANY or (6 if BACKEND == "torch" else 4),
    derandomize=not MANY,
    print_blob=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if MANY else [])],
)
@given(case=CASES)
def test_a_composed_fit(case):
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    with policy(case["policy"]), tempfile.TemporaryDirectory() as folder:
        check(case, pathlib.Path(folder))


def check(case, folder):
    model, data = model_of(case)
    pruner = pruner_of(case, data)
    watch = Watch(pruner, 5 if case["broken"] else None)
    train = {"epochs": case["epochs"], "verbose": 0, "callbacks": [pruner, *others(case, folder), watch]}
    # On JAX, Keras itself can't train a second time with averages.
    again = BACKEND != "jax" or not case["knobs"].startswith("ema")
    try:
        model.fit(**given_to_fit(case["data"], data), **train)
    except InterruptedError:
        if again:
            model.fit(**given_to_fit(case["data"], data), verbose=0)
            assert left_in(model) == []
        return
    assert left_in(model) == []
    final_count_is_exact(case, pruner.run, model)
    for path in folder.glob("*.keras"):
        is_bare(path, model)
    if again:
        before = {v.path: ops.convert_to_numpy(v) == 0 for v in model.trainable_variables if "kernel" in v.path}
        model.fit(**given_to_fit(case["data"], data), verbose=0, callbacks=[kw.KeepZeros()])
        assert left_in(model) == []
        for variable in model.trainable_variables:
            here = before.get(variable.path)
            # A variable that is zero as a whole isn't held.
            if here is not None and not here.all():
                assert not ops.convert_to_numpy(variable)[here].any()


def final_count_is_exact(case, run, model):
    """The zeros are `final` of all weights, or of each variable, to the nearest one."""
    values = [ops.convert_to_numpy(target.variable) for target in run.targets]
    assert all(np.isfinite(value).all() for value in values)
    if released(run):
        return
    zeros, sizes = [int((value == 0).sum()) for value in values], [value.size for value in values]
    if case["global"]:
        zeros, sizes = [sum(zeros)], [sum(sizes)]
    for number, size in zip(zeros, sizes, strict=True):
        # Ftrl's own steps make zeros where there is no gradient.
        above = np.inf if case["optimizer"] == "ftrl" else 0.5
        assert -0.5 <= number - case["final"] * size <= above
    assert run.pruner.sparsity == sum(run.pruner.zeros) / sum(t.size for t in run.targets)
    steps = int(ops.convert_to_numpy(model.optimizer.iterations))
    assert steps > 0 and steps <= STEPS * case["epochs"]


def is_bare(path, model):
    """A file has the variables of a stock optimizer, and no word of this package."""
    with zipfile.ZipFile(path) as archive:
        assert not any(b"woodfisher" in archive.read(name) for name in archive.namelist())
    loaded = keras.saving.load_model(path)
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    assert all(v.constraint is None or type(v.constraint).__module__.startswith("keras.") for v in loaded.weights)
