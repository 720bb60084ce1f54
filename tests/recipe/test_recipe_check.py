"""The dry run: what it tells, and that it tells everything that would fail."""

import json
import re

import keras
import numpy as np
import pytest
from keras import ops
from keras_woodfisher_backends import get_backend
from keras_woodfisher_backends.keras_internals.training import several_steps_are_possible
from releases import MultiOptimizer

import keras_woodfisher as kw
from keras_woodfisher.gradients.sources import SampledGradients

FIELDS = {
    "params": "__ALL_PRUNABLE__",
    "init_sparsity": 0.1,
    "final_sparsity": 0.5,
    "start_epoch": 1.0,
    "end_epoch": 3.0,
    "update_frequency": 1.0,
    "num_grads": {0.0: 4, 0.3: 8},
}


HOLD = {"ConstantPruningModifier": {"params": "__ALL__"}}


def check(model, *args, tag="MFACPruningModifier", others=(), data=None, loss=None, verbose=1, **fields):
    recipe = kw.load_recipe({"modifiers": [{tag: {**FIELDS, **fields}}, *others]})
    return kw.check_recipe(recipe, model, *args, data=data, loss=loss, verbose=verbose)


def test_what_it_tells(make_mlp, blobs):
    model = make_mlp()
    before = model.get_weights()
    found = check(model, 5)
    (entry,) = found.modifiers
    assert (found.epochs, found.steps_per_epoch, found.problems) == (3, 5, ())
    assert [name.split("/", 1)[1] for name in entry.variables] == ["hidden/kernel", "out/kernel"]
    assert (entry.weights, entry.source) == (240, "buffer")
    rows = [(u.epoch, u.step, round(u.sparsity, 4), u.num_grads, u.kept, u.steps_before) for u in entry.updates]
    # 0.1, then 0.1 + 0.4 (1 - 1/8) = 0.45, then 0.5.
    assert rows == [(1, 0, 0.1, 4, 240, 5), (2, 0, 0.45, 4, 216, 10), (2, 5, 0.5, 8, 132, 15)]
    assert entry.cost.gradient_bytes == 4 * 8 * 132
    assert entry.cost.buffer_bytes == 4 * 8 * 240
    assert entry.cost.host_bytes > entry.cost.gradient_bytes + entry.cost.buffer_bytes
    text = str(found)
    assert "4,224 bytes at the update that needs most, from buffer" in text
    assert "no problems" in text
    assert "buffer: 7,680 bytes beside the optimizer's variables; full enough at each update" in text
    assert "too few steps come before 1 of 3 updates" in str(check(model, 3))
    assert "give steps_per_epoch to know whether" in str(check(model))
    again = json.loads(json.dumps(found.as_dict()))
    assert again["modifiers"][0]["updates"][2]["num_grads"] == 8
    sampled = check(model, 5, data=blobs)
    assert sampled.modifiers[0].source == "data"
    assert sampled.modifiers[0].cost.buffer_bytes == 0
    assert sampled.modifiers[0].cost.gradient_seconds > 0
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert model.get_layer("hidden").kernel.constraint is None


def test_it_prints_what_it_returns(make_mlp, capsys):
    found = check(make_mlp(), 5)
    assert capsys.readouterr().out == f"\n{found}\n"
    check(make_mlp(), 5, verbose=0)
    assert capsys.readouterr().out == ""


def test_the_plan_of_several_modifiers(make_mlp):
    later = FIELDS | {"start_epoch": 3.0, "end_epoch": 4.0, "init_sparsity": "__FROM_PARAM__", "final_sparsity": 0.75}
    found = check(
        make_mlp(), 20, others=[{"MFACPruningModifier": later}, {"ConstantPruningModifier": {"params": "__ALL__"}}]
    )
    assert not found.problems
    second = found.modifiers[1]
    # The second one begins with what the first one leaves.
    assert [round(u.sparsity, 3) for u in second.updates] == [0.5, 0.75]
    assert [u.num_grads for u in second.updates] == [0, 8]
    assert "update" in str(found) and "ConstantPruningModifier" in str(found)


def entry(tag, **fields):
    return {tag: {k: v for k, v in {**FIELDS, **fields}.items() if tag.startswith("MFAC") or k != "num_grads"}}


def rows(found):
    return [(round(u.sparsity, 3), u.num_grads) for u in found.updates]


def test_the_order_in_the_file_is_irrelevant(make_mlp):
    early = entry("GMPruningModifier", start_epoch=0.0, end_epoch=1.0, init_sparsity=0.0)
    late = entry("MFACPruningModifier", start_epoch=1.0, end_epoch=2.0, init_sparsity=0.5, final_sparsity=0.75)
    plans = []
    for items in ([early, late], [late, early]):
        found = kw.check_recipe(kw.load_recipe({"modifiers": items}), make_mlp(), 20)
        assert [m.modifier.tag for m in found.modifiers] == [
            {"GMP": "MagnitudePruningModifier", "MFA": "WoodFisherPruningModifier"}[next(iter(i))[:3]] for i in items
        ]
        plans.append(sorted(rows(m) for m in found.modifiers))
    assert plans[0] == plans[1] == [[(0.0, 0), (0.5, 0)], [(0.5, 0), (0.75, 8)]]


def test_zeros_that_are_let_go_are_no_beginning(make_mlp, blobs):
    fields = {"start_epoch": 0.0, "end_epoch": 1.0, "init_sparsity": 0.0}
    late = {"start_epoch": 2.0, "end_epoch": 2.0, "final_sparsity": 0.75, "num_grads": {0.0: 4, 0.4: 30}}
    for held, grads in ((True, 30), (False, 4)):
        items = [entry("GMPruningModifier", **fields, leave_enabled=held), entry("MFACPruningModifier", **late)]
        recipe = kw.load_recipe({"modifiers": [*items, {"EpochRangeModifier": {"end_epoch": 3}}]})
        model = make_mlp()
        found = kw.check_recipe(recipe, model, 4)
        assert rows(found.modifiers[1]) == [(0.75, grads)]
        # Eight steps come before it: training finds out as early as the dry run.
        assert bool(found.problems) == held
        run = {"epochs": 3, "batch_size": 24, "verbose": 0, "callbacks": recipe.callbacks(model, verbose=0)}
        if held:
            with pytest.raises(ValueError, match="num_grads=30 gradients can't have been buffered"):
                model.fit(*blobs, **run)
            assert kw.sparsity_report(model).pruned == 0
        else:
            model.fit(*blobs, **run)
            assert kw.sparsity_report(model).sparsity == 0.75


def test_what_is_frozen_can_not_be_pruned(make_mlp, blobs):
    def found(data=None, start=1.0, **fields):
        freeze = {"TrainableParamsModifier": {"params": ["hidden/kernel"], "trainable": False, **fields}}
        recipe = kw.load_recipe({"modifiers": [entry("MFACPruningModifier", start_epoch=start), freeze]})
        model = make_mlp()
        problems = kw.check_recipe(recipe, model, 8, data=data).problems
        run = {"epochs": 4, "batch_size": 12, "verbose": 0, "callbacks": recipe.callbacks(model, data, verbose=0)}
        if problems:
            assert "'sequential" in problems[0].message
            assert re.search("is frozen at epoch .* by TrainableParamsModifier while", problems[0].message)
            with pytest.raises(ValueError, match="frozen"):
                model.fit(*blobs, **run)
        else:
            model.fit(*blobs, **run)
        return bool(problems)

    assert found(blobs)
    assert found(blobs, end_epoch=1.5)
    assert found(end_epoch=0.5)
    assert not found(blobs, end_epoch=1.0)
    assert not found(blobs, start_epoch=3.5)


def test_what_fit_would_refuse_though_nothing_is_left_to_prune(make_mlp, blobs):
    (problem,) = check(make_mlp(), 5, data=blobs, num_grads=500, init_sparsity=0.0, final_sparsity=0.0).problems
    assert "num_grads=500 with grad_batch_size=1 needs 500 examples" in problem.message
    for wrong in ({"steps_per_epoch": 0}, {"epochs": -1}, {"epochs": 2.5}, {"steps_per_epoch": "4"}):
        with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} must be"):
            kw.check_recipe(kw.load_recipe({"modifiers": [entry("MFACPruningModifier")]}), make_mlp(), **wrong)
    for token in ("__all__", "__ALL_PRUNABLE__"):
        recipe = kw.load_recipe({"modifiers": [{"TrainableParamsModifier": {"params": token}}]})
        (only,) = kw.check_recipe(recipe, make_mlp()).modifiers
        assert (len(only.variables), only.problems) == ({"__all__": 4}.get(token, 2), ())


def test_a_name_that_matches_nothing_hides_nothing(make_mlp):
    found = check(make_mlp(), 5, params=["re:.*HIDDEN.*kernel", "out/kernel"])
    (entry,) = found.modifiers
    assert [n.split("/", 1)[1] for n in entry.variables] == ["out/kernel"]
    assert [n.split("/", 1)[1] for n in entry.nearly] == ["hidden/kernel"]
    found = check(make_mlp(), 5, params=[], final_sparsity={0.5: ["hiden/kernel"]})
    assert "final_sparsity names 'hiden/kernel', which no variable has" in found.problems[0].message


def test_what_is_frozen_is_told(make_mlp, recwarn):
    model = make_mlp()
    model.get_layer("out").trainable = False
    found = check(model, 5)
    assert not [w for w in recwarn.list if "Frozen" in str(w.message)]
    assert [n.split("/", 1)[1] for n in found.modifiers[0].frozen] == ["out/kernel"]
    assert "frozen, and left alone: " in str(found)
    assert found.as_dict()["modifiers"][0]["frozen"] == list(found.modifiers[0].frozen)


def test_modifiers_of_one_kind_are_told_apart(make_mlp):
    bad = entry("GMPruningModifier", params=["hiden/kernel"])
    recipe = kw.load_recipe({"modifiers": [entry("GMPruningModifier", params=["out/kernel"]), bad]})
    found = kw.check_recipe(recipe, make_mlp(), 5, verbose=0)
    assert [p.modifier for p in found.problems] == ["MagnitudePruningModifier 2"]
    assert "\nMagnitudePruningModifier 1\n" in str(found)


def test_what_is_checked_is_a_recipe_and_a_model(make_mlp):
    recipe = kw.load_recipe({"modifiers": [{"EpochRangeModifier": {"end_epoch": 2}}]})
    with pytest.raises(TypeError, match=r"recipe must be a Recipe, got str. Read it first: .*load_recipe"):
        kw.check_recipe("r.yaml", make_mlp())
    with pytest.raises(TypeError, match=r"model must be a Model, got str\. Load it first"):
        kw.check_recipe(recipe, "m.keras")


def test_more_updates_than_can_be_planned(make_mlp):
    found = check(make_mlp(), 100, end_epoch=20_000, update_frequency=0)
    assert any("An update at every step makes 1,999,900 updates" in p.message for p in found.problems)


@pytest.mark.skipif(several_steps_are_possible(), reason="this Keras takes several steps at a time")
def test_several_steps_at_a_time_on_torch(make_mlp):
    model = make_mlp()
    model.compile("sgd", "mse", steps_per_execution=2)
    recipe = kw.load_recipe({"modifiers": [{"EpochRangeModifier": {"end_epoch": 2}}]})
    (problem,) = kw.check_recipe(recipe, model, 5, verbose=0).problems
    assert "steps_per_execution=2 can't be trained with on torch" in problem.message


def test_the_mend_of_too_few_examples(make_mlp, blobs):
    x, y = blobs
    few = x[:32], y[:32]
    for size, message in (
        (64, "needs 512 examples, but data holds 32. grad_batch_size=4 would fit"),
        (8, "needs 64 examples, but data holds 32. num_grads=4 or grad_batch_size=4 would fit"),
    ):
        found = check(make_mlp(), 5, data=few, num_grads=8, grad_sampler_kwargs={"batch_size": size})
        assert any(message in p.message for p in found.problems), found.problems


def test_near_misses(make_mlp):
    model = make_mlp()
    found = check(model, 5, params=["re:.*HIDDEN/kernel", "out/kernel"])
    assert any("matches no variable" in p.message for p in found.problems)
    found = check(model, 5, params=["re:idden", "out/kernel"])
    assert "matches no variable from the start of its name" in found.problems[0].message
    found = check(model, 5, params=["re:.*(ut|x)/kernel"], exclude=[])
    assert found.modifiers[0].nearly == ()
    found = check(model, 5, params=["re:hidden/kern", "out/kernel"])
    assert found.modifiers[0].nearly == ()
    found = check(model, 5, params=["re:hidden/kernel"])
    assert [n.split("/", 1)[1] for n in found.modifiers[0].nearly] == []
    found = check(model, 5, params=["hidden/kernel", "re:out/k"])
    assert not found.problems
    found = check(model, 5, params=["out/kernel", "re:(?i)Out/bias"], exclude=["out/bias"])
    assert [n.split("/", 1)[1] for n in found.modifiers[0].nearly] == ["out/bias"]


PROBLEMS = [
    ((5, 2), {}, r"end_epoch=3 lies after the last epoch \(2\).*Train for epochs=3"),
    ((3,), {}, "num_grads=4 gradients can't have been buffered .*num_grads=3 would fit"),
    ((5,), {"available_gpus": ["cuda:7"]}, "There is no device 'cuda:7' here. Devices that exist: cpu"),
    ((5,), {"params": ["hiden/kernel"]}, "which no variable has. The nearest: .*hidden/kernel"),
    ((5,), {"use_gradient_buffering": False}, "so data is required"),
    ((5,), {"mask_type": [50, 50]}, r"mask_type \[50, 50\] finds no whole group in any chosen variable"),
    ((5,), {"num_grads": 10**9}, "num_grads=1000000000 .* needs at least .* may be used"),
]


@pytest.mark.parametrize("run, fields, message", PROBLEMS, ids=[str(i) for i in range(len(PROBLEMS))])
def test_everything_that_would_fail(make_mlp, run, fields, message):
    found = check(make_mlp(), *run, **fields)
    assert any(re.search(message, p.message) for p in found.problems), found.problems
    assert "problems:\n  - WoodFisherPruningModifier: " in str(found)


def test_the_memory_plan_is_that_of_the_run(make_mlp, blobs, capsys):
    model = make_mlp()
    for data, steps in ((blobs, 5), (None, 96)):
        found = check(model, steps, data=data, memory_limit="7 MB", end_epoch=2.0, verbose=0)
        assert not found.problems
        plan = found.modifiers[0].cost.memory
        assert (plan.limit, plan.storage, plan.reason) == (7_000_000, "memory", "memory_limit")
        assert (plan.ring == 0) == (data is not None)
        assert found.modifiers[0].cost.host_bytes == plan.total <= plan.limit
        assert all(line in str(found) for line in str(plan).splitlines())
        assert found.as_dict()["modifiers"][0]["cost"]["memory"]["total"] == plan.total
        json.dumps(found.as_dict())
        recipe = kw.load_recipe({"modifiers": [entry("MFACPruningModifier", memory_limit="7 MB", end_epoch=2.0)]})
        model.fit(
            *blobs,
            epochs=2,
            batch_size=96 // steps if data is None else 20,
            verbose=0,
            callbacks=recipe.callbacks(model, data, verbose=2),
        )
        assert capsys.readouterr().out.count(str(plan)) == 1
        model = make_mlp()


def test_it_takes_no_more_samples_at_a_time_than_the_plan(make_mlp, blobs, monkeypatch):
    monkeypatch.setattr("keras_woodfisher.model.batches._CHUNK_BYTES", 2 * 4 * 240)
    rows = []
    fill = SampledGradients.fill

    def watched(self, store, kept, number, *args):
        rows.append((number, store.room(number).shape))
        return fill(self, store, kept, number, *args)

    monkeypatch.setattr(SampledGradients, "fill", watched)
    found = check(make_mlp(), 5, data=blobs, verbose=0)
    assert found.modifiers[0].cost.memory.chunk == 2
    assert rows == [(2, (2, 240))] * 2
    assert found.modifiers[0].cost.gradient_seconds > 0


def test_what_does_not_fit_is_a_problem(make_mlp, blobs):
    for data in (blobs, None):
        (problem,) = check(make_mlp(), 96, data=data, memory_limit=20_000).problems
        assert re.search(r"needs at least .* 0\.0 MiB may be used \(memory_limit\).*memory_limit=", problem.message)
        assert check(make_mlp(), 96, data=data, memory_limit=20_000).modifiers[0].cost.memory is None


def test_problems_of_the_data_and_of_training(make_mlp, blobs):
    few = tuple(part[:6] for part in blobs)
    (problem,) = check(make_mlp(), 5, data=few).problems
    assert "num_grads=8 with grad_batch_size=1 needs 8 examples, but data holds 6" in problem.message
    bare = make_mlp(compile=False)
    assert "isn't compiled" in check(bare, 5).problems[0].message
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert not check(bare, 5, data=blobs, loss=loss).problems
    twice = check(make_mlp(), 5, others=[{"GMPruningModifier": {k: v for k, v in FIELDS.items() if k != "num_grads"}}])
    assert "are pruned by WoodFisherPruningModifier at the same time, from epoch 1 on" in twice.problems[0].message
    schedule = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))
    rate = [{"SetLearningRateModifier": {"learning_rate": 0.1}}]
    (problem,) = check(make_mlp(schedule), 5, others=rate).problems
    assert problem.modifier == "SetLearningRateModifier"
    assert "ExponentialDecay" in problem.message
    (problem,) = check(
        make_mlp(), 5, 3, others=[{"ConstantPruningModifier": {"params": "__ALL__", "start_epoch": 4}}]
    ).problems
    assert "start_epoch=4 lies after the last epoch" in problem.message
    (problem,) = check(make_mlp(), 5, others=[{"TrainableParamsModifier": {"params": ["x/kernel"]}}]).problems
    assert "x/kernel" in problem.message


def both(make, items, data, message, run=(5, None), **fit):
    """The dry run and `fit` refuse the same, or neither does."""
    recipe = kw.load_recipe({"modifiers": items})
    found = kw.check_recipe(recipe, make(), *run, verbose=0)
    if message is None:
        assert not found.problems
    else:
        assert any(re.search(message, p.message) for p in found.problems), found.problems
    model = make()
    run_it = {"batch_size": 24, "epochs": run[1] or recipe.epochs, "verbose": 0}
    return lambda: model.fit(*data, callbacks=recipe.callbacks(model, verbose=0), **run_it)


def without_loss(make_mlp):
    model = make_mlp(compile=False)
    model.compile("sgd")
    return model


def with_nan(make_mlp):
    model = make_mlp()
    kernel = ops.convert_to_numpy(model.layers[0].kernel).copy()
    kernel[0, 0] = np.nan
    model.layers[0].kernel.assign(kernel)
    return model


def with_two_optimizers(make_mlp):
    model = make_mlp(compile=False)
    model.layers[0].trainable = False
    parts = [keras.optimizers.SGD(0.1), keras.optimizers.Adam()]
    optimizer = MultiOptimizer(lambda variable: parts["hidden" in variable.path])
    optimizer._inner_optimizers.extend(parts)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_a_model_that_can_not_be_trained(make_mlp, blobs):
    magnitude = [entry("GMPruningModifier")]
    fit = both(lambda: without_loss(make_mlp), magnitude, blobs, "compiled without a loss.*Compile it with one")
    if keras.backend.backend() != "jax":  # where nothing is lowered, without a word
        with pytest.raises(ValueError, match="No loss to compute"):
            fit()
    for tag in ("GMPruningModifier", "MFACPruningModifier"):
        fit = both(lambda: with_nan(make_mlp), [entry(tag, num_grads=4)], blobs, "weights aren't finite: 1 of 192 of")
        with pytest.raises(FloatingPointError, match="weights aren't finite"):
            fit()
    bare = make_mlp(compile=False)
    bare.compile(optimizer=None, loss="mse")
    (problem,) = kw.check_recipe(kw.load_recipe({"modifiers": magnitude}), bare).problems
    assert "must be compiled with an optimizer" in problem.message


def test_a_multi_optimizer_that_can_not_grow(make_mlp, blobs):
    grow = [{"TrainableParamsModifier": {"params": ["hidden/kernel"], "start_epoch": 1}}]
    message = "was frozen when the MultiOptimizer was built"
    fit = both(lambda: with_two_optimizers(make_mlp), grow, blobs, message, run=(4, 2))
    with pytest.raises(ValueError, match=message):
        fit()


def test_training_that_is_not_followed(make_mlp, blobs, monkeypatch):
    message = "training with TPUStrategy isn't supported. Train with torch's DistributedDataParallel"
    monkeypatch.setattr(type(get_backend(keras.backend.backend())), "unfollowed", lambda self, model: "TPUStrategy")
    for tag in ("GMPruningModifier", "MFACPruningModifier"):
        fit = both(make_mlp, [entry(tag, num_grads=4)], blobs, message)
        with pytest.raises(ValueError, match=message):
            fit()
    both(make_mlp, [{"EpochRangeModifier": {"start_epoch": 0.0, "end_epoch": 1.0}}], blobs, None)()


@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_of_torch(make_mlp, blobs, scaled):
    from keras.src.backend.torch.optimizers.torch_adam import Adam

    def make():
        optimizer = Adam(1e-3)
        return make_mlp(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)

    name = keras.backend.backend()
    if name == "torch":
        both(make, [entry("GMPruningModifier")], blobs, None)()
        return
    message = f"optimizer is torch's own Adam.*can't train on {name}. Compile the model again"
    fit = both(make, [entry("GMPruningModifier")], blobs, message)
    with pytest.raises(ValueError, match=message):
        fit()
    # Without pruning no callback looks: Keras itself fails, in its own words.
    fit = both(make, [{"SetLearningRateModifier": {"learning_rate": 0.1}}], blobs, message, run=(5, 1))
    with pytest.raises(Exception):  # noqa: B017
        fit()


class OwnLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(x**2))
        return x


def test_a_loss_that_is_not_compiled_is_no_problem(blobs):
    inputs = keras.Input((12,))
    own = keras.Model(inputs, OwnLoss()(keras.layers.Dense(3)(inputs)))
    regular = keras.Sequential([inputs, keras.layers.Dense(3, kernel_regularizer="l2")])
    active = keras.Sequential([inputs, keras.layers.Dense(3, activity_regularizer="l2")])
    recipe = kw.load_recipe({"modifiers": [entry("GMPruningModifier")]})
    for model in (own, regular, active):
        model.compile("sgd")
        assert not kw.check_recipe(recipe, model).problems
        model.fit(blobs[0], epochs=3, verbose=0, callbacks=recipe.callbacks(model, verbose=0))
        assert kw.sparsity_report(model).sparsity == 0.5


def test_a_rate_that_overflows(make_mlp, blobs):
    rate = {"lr_class": "ExponentialLR", "lr_kwargs": {"gamma": 1e300}, "init_lr": 1.0}
    message = "rate is infinite by epoch 4. Lower gamma"
    fit = both(make_mlp, [{"LearningRateModifier": rate}], blobs, message, (4, 4))
    with pytest.raises(ValueError, match=message):
        fit()
    both(make_mlp, [{"LearningRateModifier": rate | {"end_epoch": 1.0}}], blobs, None, (4, 4))()


def test_freezing_that_ends_in_time_is_no_problem(make_mlp, blobs):
    freeze = {"params": ["hidden/kernel"], "trainable": False}
    prune = entry("GMPruningModifier")
    after = {"TrainableParamsModifier": freeze | {"start_epoch": 3}}
    both(make_mlp, [prune, after], blobs, None, (4, 4))()
    # Of two that name one variable, the one that began last holds.
    thaw = {"TrainableParamsModifier": {"params": "__ALL__", "start_epoch": 0.5}}
    both(make_mlp, [prune, {"TrainableParamsModifier": freeze}, thaw], blobs, None)()
    amid = {"TrainableParamsModifier": freeze | {"start_epoch": 2}}
    fit = both(make_mlp, [prune, thaw, amid], blobs, "is frozen at epoch 2 by")
    with pytest.raises(ValueError, match="is frozen at epoch 2 by"):
        fit()


def test_a_buffer_that_is_empty_at_the_first_update(make_mlp):
    (problem,) = check(make_mlp(), 4, start_epoch=0.0).problems
    assert "only 0 steps come before it. Set start_epoch to 1 or later, or give data=." in problem.message
