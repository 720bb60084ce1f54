"""The dry run is the run: what it tells is what the callback of the recipe then does."""

from dataclasses import asdict

import keras
import pytest

import keras_woodfisher as kw
from keras_woodfisher.callbacks.pruning_run import Run
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.pruning.workspace import Workspace

BATCH, STEPS = 16, 6

FIELDS = {
    "params": "__ALL_PRUNABLE__",
    "init_sparsity": 0.1,
    "final_sparsity": 0.5,
    "start_epoch": 1.0,
    "end_epoch": 2.0,
    "update_frequency": 0.5,
    "num_grads": {0.0: 4, 0.3: 6},
    # What is free may change between the two.
    "memory_limit": "7 MB",
}


def recipe_of(*fields):
    return kw.load_recipe({"modifiers": [{"MFACPruningModifier": FIELDS | given} for given in fields]})


@pytest.fixture
def opened(monkeypatch):
    """Each run whose source of gradients was opened, with its plan."""
    runs = []
    open_source = Run.open_source

    def watched(run, updates, loss=None):
        open_source(run, updates, loss)
        runs.append((run, list(updates)))

    monkeypatch.setattr(Run, "open_source", watched)
    return runs


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"grads_device": "disk", "grads_dtype": "float16", "fisher_block_size": 20},
        {"available_gpus": ["cpu", "cpu:0"], "fisher_block_size": 20, "global_sparsity": False},
        {"mask_type": "2:4", "final_sparsity": 0.4},
    ],
)
def test_its_plan_is_that_of_training(make_mlp, blobs, opened, fields, sampled):
    data = blobs if sampled else None
    model = make_mlp()
    before = model.get_weights()
    checked = kw.check_recipe(recipe_of(fields), model, STEPS, 2, data=data, verbose=0)
    assert not checked.problems
    (entry,) = checked.modifiers
    assert all((now == then).all() for now, then in zip(model.get_weights(), before, strict=True))
    callbacks = recipe_of(fields).callbacks(model, data, verbose=0)
    model.fit(*blobs, batch_size=BATCH, epochs=2, verbose=0, callbacks=callbacks)
    (planned, _), (trained, updates) = opened
    assert trained is callbacks[0].run
    assert [asdict(update) for update in entry.updates] == [asdict(update) for update in updates]
    assert asdict(entry.cost.memory) == asdict(trained.pruner.memory)
    assert planned.pruner.workspace.devices == trained.pruner.workspace.devices
    assert type(planned.source) is type(trained.source) or not sampled
    # What was planned is what was done.
    stages = trained.report().stages
    assert [stage.samples for stage in stages] == [update.num_grads for update in entry.updates if update.num_grads]
    assert [stage.epoch for stage in stages] == [update.position for update in entry.updates if update.num_grads]


def test_it_builds_one_pruner_for_each_modifier(make_mlp, blobs, monkeypatch):
    model, built = make_mlp(), []
    for kind in (Pruner, Workspace):
        init = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, init=init: (built.append(type(self)), init(self, *a))[1])
    names = ["hidden/kernel", "out/kernel"]
    checked = kw.check_recipe(
        recipe_of(*({"params": [name]} for name in names)), model, STEPS, 2, data=blobs, verbose=0
    )
    assert not checked.problems
    assert built == [Pruner, Workspace] * len(names)


def test_devices_that_are_missing_are_left_out(make_mlp, blobs):
    found = kw.check_recipe(
        recipe_of({"available_gpus": ["cpu:0", "gpu:7"]}), make_mlp(), STEPS, 2, data=blobs, verbose=0
    )
    (problem,) = found.problems
    assert "There is no device 'gpu:7' here" in problem.message
    assert list(found.modifiers[0].cost.device_bytes) == ["cpu:0"]
    (update, *_) = found.modifiers[0].updates
    assert update.num_grads and found.modifiers[0].cost.memory is not None


def test_nothing_is_buffered_by_it(make_mlp):
    model = make_mlp()
    variables = len(model.optimizer.variables)
    kw.check_recipe(recipe_of({}), model, STEPS, 2, verbose=0)
    assert len(model.optimizer.variables) == variables
    assert "apply" not in vars(model.optimizer)
    assert keras.ops.convert_to_numpy(model.optimizer.iterations) == 0
