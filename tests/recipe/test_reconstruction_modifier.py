"""`ReconstructionModifier`: one-shot pruning by reconstruction in a recipe, its dry run, and what is refused."""

import json

import keras
import numpy as np
import pytest

import keras_woodfisher as kw
from keras_woodfisher.callbacks.keep_zeros import KeepZeros
from keras_woodfisher.recipe.one_shot_callback import OneShotPruning

HOLD = {"ConstantPruningModifier": {"params": "__ALL_PRUNABLE__"}}


def recipe_of(*others, **fields):
    return kw.load_recipe({"modifiers": [*others, {"ReconstructionModifier": {"final_sparsity": 0.5, **fields}}]})


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {"sparsity": 0.5}),
        ({"final_sparsity": {0.25: "hidden/kernel", 0.75: "out/kernel"}, "params": []}, None),
        ({"mask_type": "tensorrt", "params": ["hidden/kernel"]}, {"mask_type": "2:4", "params": ["hidden/kernel"]}),
        ({"global_sparsity": False, "num_examples": 40, "seed": 3, "memory_limit": "1 GiB"}, None),
    ],
)
def test_it_prunes_as_prune_does(make_mlp, blobs, fields, arguments):
    model, twin = make_mlp(), make_mlp()
    twin.set_weights(model.get_weights())
    report = recipe_of(**fields).apply(model, blobs[0], verbose=0)
    if arguments is None:
        arguments = {**fields, "sparsity": fields.get("final_sparsity", 0.5), "params": fields.get("params")}
        arguments.pop("final_sparsity", None)
    arguments.setdefault("params", "__ALL_PRUNABLE__")
    arguments.setdefault("sparsity", 0.5)
    kw.prune(twin, blobs[0], method="reconstruct", verbose=0, **arguments)
    for one, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert report.sparsity == pytest.approx(0.5, abs=0.26) and report.sparsity > 0.0


def test_training_begins_pruned_and_a_constant_modifier_keeps_the_zeros(make_mlp, blobs):
    model = make_mlp()
    callbacks = recipe_of(HOLD).callbacks(model, blobs, verbose=0)
    # Whatever their order in the file.
    assert [type(callback) for callback in callbacks] == [OneShotPruning, KeepZeros]
    zeros = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            zeros.append(kw.sparsity_report(self.model).sparsity)

    before = model.get_weights()
    model.fit(*blobs, epochs=2, batch_size=32, callbacks=[*callbacks, Watch()], verbose=0)
    assert set(zeros) == {0.5} and len(zeros) == 6
    assert not np.array_equal(before[1], model.get_weights()[1])


@pytest.mark.parametrize("own", [False, True])
def test_masks_are_no_constraints_of_the_user(make_mlp, blobs, own):
    model, norms = make_mlp(), []
    model.get_layer("hidden").kernel.constraint = keras.constraints.MaxNorm(0.1) if own else None

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            kernel = keras.ops.convert_to_numpy(self.model.get_layer("hidden").kernel)
            norms.append(np.linalg.norm(kernel, axis=0).max())

    pruning, hold = recipe_of(HOLD).callbacks(model, blobs, verbose=0)
    model.fit(*blobs, callbacks=[pruning, hold, Watch()], verbose=0)
    assert any("constraints of weights were applied" in note for note in pruning.report().notes) == own
    assert (norms[0] < 0.1 + 1e-4) == own


def test_training_that_goes_on_is_not_pruned_again(make_mlp, blobs):
    model = make_mlp()
    callbacks = recipe_of().callbacks(model, blobs, verbose=0)
    model.fit(*blobs, initial_epoch=1, epochs=2, callbacks=callbacks, verbose=0)
    assert kw.sparsity_report(model).sparsity == 0.0


def test_what_the_dry_run_tells(make_mlp, blobs):
    model = make_mlp()
    before = model.get_weights()
    found = kw.check_recipe(recipe_of(HOLD, num_examples=64), model, 3, 1, data=blobs, verbose=0)
    assert not found.problems
    cost = found.modifiers[1].reconstruction
    assert (cost.examples, cost.passes, cost.memory.chunks) == (64, 1, 1)
    assert 0.0 < cost.seconds < 60.0
    assert "reconstruction by 64 examples, passes: 1; examples in one pass, about" in str(found)
    again = json.loads(json.dumps(found.as_dict()))
    assert again["modifiers"][1]["reconstruction"]["memory"]["bytes"] == cost.memory.bytes
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("quality", "text"),
    [
        ("fast", ""),
        ("balanced", "; more where allocations are compared and layers fitted again"),
        ("best", "; more where allocations are compared and layers fitted again, and for 1,024 gradient steps"),
    ],
)
def test_the_dry_run_tells_what_its_time_leaves_out(make_mlp, blobs, quality, text):
    found = kw.check_recipe(recipe_of(num_examples=64, quality=quality), make_mlp(), 3, 1, data=blobs, verbose=0)
    (line,) = (line for line in str(found).splitlines() if "time: about" in line)
    assert line.endswith(f" s{text}")


AFTERWARDS = {
    "params": "__ALL_PRUNABLE__",
    "init_sparsity": "__FROM_PARAM__",
    "final_sparsity": 0.8,
    "start_epoch": 1.0,
    "end_epoch": 2.0,
    "update_frequency": 0.5,
}


def test_what_comes_afterwards_is_planned_with_its_zeros(make_mlp, blobs):
    model, found = make_mlp(), []
    recipe = recipe_of({"GMPruningModifier": AFTERWARDS})
    plan = kw.check_recipe(recipe, model, 4, 3, data=blobs, verbose=0).modifiers[0].updates

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            found.append(kw.sparsity_report(self.model).sparsity)

    callbacks = recipe.callbacks(model, blobs, verbose=0)
    model.fit(*blobs, epochs=3, batch_size=24, callbacks=[*callbacks, Watch()], verbose=0)
    assert [update.sparsity for update in plan] == pytest.approx([found[4], found[6], found[8]])
    assert plan[0].sparsity == found[0] == 0.5


def test_where_another_callback_refuses_training_the_weights_are_as_they_were(make_mlp, blobs):
    model = make_mlp(optimizer=keras.optimizers.Ftrl(0.1))
    fields = {**AFTERWARDS, "num_grads": {0.0: 4, 0.5: 8}, "use_gradient_buffering": True}
    recipe = recipe_of({"MFACPruningModifier": fields})
    message = "num_grads=8 gradients can't have been buffered by the update at epoch 1.5: only 6 steps"
    (problem,) = kw.check_recipe(recipe, model, 4, 3, data=blobs, verbose=0).problems
    assert message in str(problem)
    model.optimizer.build(model.trainable_variables)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in (*model.variables, *model.optimizer.variables)]
    with pytest.raises(ValueError, match=message):
        callbacks = recipe.callbacks(model, blobs, verbose=0)
        model.fit(*blobs, epochs=3, batch_size=24, callbacks=callbacks, verbose=0)
    for variable, old in zip((*model.variables, *model.optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)
    assert "fit" not in vars(model)
    with pytest.raises(RuntimeError, match="Nothing was pruned"):
        callbacks[0].report()


def test_only_what_comes_before_the_first_step_is_undone(make_mlp, blobs):
    class Fails(keras.callbacks.Callback):
        def __init__(self, epoch):
            super().__init__()
            self.epoch = epoch

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == self.epoch:
                raise RuntimeError("of one's own")

    model = make_mlp()
    for epoch in (0, 1):
        with pytest.raises(RuntimeError, match="of one's own"):
            callbacks = recipe_of(HOLD).callbacks(model, blobs, verbose=0)
            model.fit(*blobs, epochs=2, batch_size=32, callbacks=[*callbacks, Fails(epoch)], verbose=0)
        assert kw.sparsity_report(model).sparsity == 0.5, "another's failure isn't a refusal"
    model.fit(*blobs, epochs=1, verbose=0)
    assert "fit" not in vars(model) and kw.sparsity_report(model).sparsity < 0.5


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ({}, None, "needs examples to reconstruct layers by: pass data=x"),
        ({"memory_limit": "10 KB"}, "blobs", "Reconstruction needs at least"),
        ({"params": ["hiden/kernel"]}, "blobs", "hiden/kernel"),
    ],
)
def test_the_dry_run_tells_what_would_fail(make_mlp, blobs, fields, data, message):
    data = blobs if data else None
    found = kw.check_recipe(recipe_of(**fields), make_mlp(), 3, 1, data=data, verbose=0)
    assert len(found.problems) == 1 and message in str(found.problems[0])
    with pytest.raises((ValueError, MemoryError, KeyError), match=message):
        model = make_mlp()
        model.fit(*blobs, callbacks=recipe_of(**fields).callbacks(model, data, verbose=0), verbose=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_sparsity": 1.5}, r"ReconstructionModifier\.final_sparsity: .*1\.5"),
        ({"params": []}, "params must name something to prune"),
        ({"quality": "great"}, r"quality: got 'great'"),
        ({"num_examples": 0}, r"ReconstructionModifier\.num_examples"),
        ({"mask_type": "2:4", "final_sparsity": 0.7}, "2:4"),
        ({"num_grads": 3}, r"num_grads: there is no such field"),
        ({"memory_limit": "much"}, "memory_limit"),
    ],
)
def test_what_is_wrong_is_told(fields, message):
    with pytest.raises(kw.RecipeError, match=message):
        recipe_of(**fields)


def test_a_later_stage_is_refused():
    text = """
first:
  training_modifiers:
    - !EpochRangeModifier {start_epoch: 0, end_epoch: 3}
second:
  pruning_modifiers:
    - !ReconstructionModifier {final_sparsity: 0.5}
"""
    with pytest.raises(kw.RecipeError, match=r"line 7.*it prunes before training, but its stage begins after some"):
        kw.load_recipe(text)
