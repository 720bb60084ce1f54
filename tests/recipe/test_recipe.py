"""What recipes mean: dialects, fields, stages, the canonical form, and how they run."""

import copy
import json
import random
import time
from pathlib import Path

import jsonschema
import keras
import numpy as np
import pytest
from keras import ops
from recipe_mutations import SEEDS, mutate

import keras_woodfisher as kw
from keras_woodfisher.options.schedule import INTERPOLATIONS
from keras_woodfisher.recipe.modifiers import pruning as modifiers
from keras_woodfisher.recipe.modifiers.validation import TAGS

BACKEND = keras.backend.backend()
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("[0-9]*"))

NESTED = """
modifiers:
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.85
    start_epoch: 1.0
    end_epoch: 5.0
    update_frequency: 2
    mfac_options:
      num_grads: {0.0: 8, 0.5: 16}
      fisher_block_size: 50
      available_gpus: [cpu]
"""
FLAT = """
pruning_modifiers:
  - !MFACPruningModifier
    params: __all_prunable__
    init_sparsity: 0.05
    final_sparsity: 0.85
    start_epoch: 1.0
    end_epoch: 5.0
    update_frequency: 2.0
    num_grads: {0.0: 8, 0.5: 16}
    fisher_block_size: 50
    available_gpus: cpu
"""
YOUNGEST = FLAT.replace("available_gpus: cpu", "available_devices: [cpu]\n    global_sparsity: true\n    phased: false")


def pruning(tag="MFACPruningModifier", **fields):
    """A recipe of one pruning modifier, as plain data."""
    known = {
        "params": "__ALL_PRUNABLE__",
        "init_sparsity": 0.0,
        "final_sparsity": 0.5,
        "start_epoch": 0.0,
        "end_epoch": 1.0,
        "update_frequency": 1.0,
    }
    return {"modifiers": [{tag: {k: v for k, v in (known | fields).items() if v is not ...}}]}


def only(recipe):
    (modifier,) = kw.load_recipe(recipe).modifiers
    return modifier


def zeros(model):
    return {v.name.split("/")[-2]: v.pruned / v.weights for v in kw.sparsity_report(model).variables}


def test_three_dialects_are_one_recipe(make_mlp):
    recipes = [kw.load_recipe(text) for text in (NESTED, FLAT, YOUNGEST)]
    assert recipes[0] == recipes[1] == recipes[2]
    assert hash(recipes[0].modifiers[0].params)
    model = make_mlp()
    plans = [kw.check_recipe(recipe, model, steps_per_epoch=20).as_dict()["modifiers"][0] for recipe in recipes]
    for plan in plans:
        for measured in ("gradient_seconds", "inverse_seconds"):
            plan["cost"].pop(measured)
        plan["cost"]["memory"].pop("limit")  # a part of what is free at the moment
    assert plans[0] == plans[1] == plans[2]
    assert [(u["epoch"], u["step"], u["num_grads"]) for u in plans[0]["updates"]] == [(1, 0, 8), (3, 0, 8), (4, 20, 16)]


def test_defaults_of_each_tag():
    mfac = only(pruning())
    assert (mfac.num_grads, mfac.damp, mfac.fisher_block_size, mfac.global_sparsity) == (64, 1e-5, 2000, True)
    assert only(pruning("WoodFisherPruningModifier")) == only(pruning("MFACGlobalPruningModifier")) == mfac
    obs = only(pruning("OBSPruningModifier"))
    assert (obs.num_grads, obs.damp, obs.fisher_block_size, obs.global_sparsity) == (1024, 1e-7, 50, True)
    assert only(pruning("GMPruningModifier")) == only(pruning("MagnitudePruningModifier"))
    assert only(pruning("GMPruningModifier")).global_sparsity is False
    assert only(pruning("GlobalMagnitudePruningModifier")).global_sparsity is True
    by_level = pruning(final_sparsity={0.9: ["a"], 0.8: ["b"]}, params=[])
    assert only(by_level).global_sparsity is False
    assert only(pruning(inter_func=...)).inter_func == "cubic"
    assert set(INTERPOLATIONS) == {"linear", "cubic", "inverse_cubic"}


SAME = [
    ({"fisher_block_size": 0}, {"fisher_block_size": None}, "fisher_block_size"),
    ({"update_frequency": -1}, {"update_frequency": 0}, "update_frequency"),
    ({"start_epoch": -1}, {"start_epoch": 0}, "start_epoch"),
    ({"mask_type": "tensorrt"}, {"mask_type": "2:4"}, "mask_type"),
    ({"params": ["__ALL__"]}, {"params": "__all__"}, "params"),
    ({"grad_sampler_kwargs": {"batch_size": 8}}, {"grad_batch_size": 8}, "grad_batch_size"),
    ({"num_grads": {"0.0": 8, "0.5": 9}}, {"num_grads": {0.5: 9, 0.0: 8.0}}, "num_grads"),
    ({"available_gpus": []}, {"available_gpus": None}, "available_gpus"),
    ({"score_type": "MFAC", "log_types": "__ALL__", "phased": False}, {}, "score_type"),
]


@pytest.mark.parametrize("one, other, field", SAME, ids=[field for _, _, field in SAME])
def test_two_ways_of_saying_the_same(one, other, field):
    assert only(pruning(**one)) == only(pruning(**other))
    if field != "score_type":
        text = str(kw.load_recipe(pruning(**one)))
        assert kw.load_recipe(text) == kw.load_recipe(pruning(**other))


REFUSED = [
    ({"final_sparsity": 1.5}, r"final_sparsity must lie in \[0, 1\), got 1.5"),
    ({"final_sparsity": -0.5}, r"final_sparsity must lie in \[0, 1\), got -0.5"),
    ({"final_sparsity": 1}, r"final_sparsity must lie in \[0, 1\), got 1"),
    ({"final_sparsity": True}, r"final_sparsity: got True, but it should be a valid number"),
    ({"final_sparsity": "0.5"}, r"final_sparsity: got '0.5', but it should be a valid number"),
    ({"final_sparsity": {0.9: ["a"]}}, r"params must be \[\] where final_sparsity is a mapping"),
    ({"final_sparsity": {0.9: ["a"]}, "params": [], "global_sparsity": True}, "global_sparsity must not be true"),
    ({"final_sparsity": {9: ["a"]}, "params": []}, r"a key of final_sparsity must lie in \[0, 1\), got 9"),
    ({"params": []}, "params must name something"),
    ({"params": ["re:("]}, "isn't a regular expression"),
    ({"params": ["re:a{9999}"]}, r"params: The pattern 're:a\{9999\}' repeats too often"),
    ({"params": ["re:(?x)a"]}, "has the flag x"),
    ({"params": ["re:" + "a" * 5000]}, "has 5000 characters, of 4000 allowed"),
    ({"exclude": ["re:(?:.{40}){40}"]}, "repeats too often"),
    ({"final_sparsity": {0.9: ["re:(?:.{40}){40}"]}, "params": []}, "repeats too often"),
    ({"params": 3}, "params: got 3, but it should be a valid string"),
    ({"init_sparsity": ...}, "init_sparsity is required"),
    ({"init_sparsity": 0.9}, "init_sparsity=0.9 is above final_sparsity=0.5"),
    ({"init_sparsity": "__FROM__"}, "init_sparsity: got '__FROM__', but it should be .*'__FROM_PARAM__'"),
    ({"end_epoch": -2}, "end_epoch must be at least 0"),
    ({"start_epoch": 3}, "end_epoch=1 lies before start_epoch=3"),
    ({"update_frequency": -3}, "update_frequency must be a positive number of epochs"),
    ({"inter_func": "square"}, "inter_func: got 'square', but it should be 'linear', 'cubic' or 'inverse_cubic'"),
    ({"mask_type": "4:2"}, "mask_type must be unstructured, .*got '4:2'"),
    ({"mask_type": [0, 4]}, "mask_type: the sides of a block must be at least 1"),
    ({"num_grads": 0}, "num_grads must be at least 1, got 0"),
    ({"num_grads": 2.5}, "num_grads: got 2.5, but it should be a valid integer"),
    ({"num_grads": {0.5: 3}}, r"num_grads as a dictionary needs the key 0.0"),
    ({"num_grads": 8, "mfac_options": {"num_grads": 8}}, "num_grads: written in mfac_options and beside it"),
    ({"available_gpus": ["cpu"], "available_devices": ["cpu"]}, "available_gpus and available_devices are the same"),
    ({"available_devices": ["cpu"], "mfac_options": {"available_gpus": ["cpu"]}}, "in mfac_options and beside it"),
    ({"mfac_options": {"num_grad": 8}}, r"mfac_options.num_grad: there is no such field. Do you mean num_grads\?"),
    ({"grad_sampler_kwargs": {"batch_size": 0}}, r"grad_sampler_kwargs\.batch_size: batch_size must be at least 1"),
    ({"grad_sampler_kwargs": {"size": 8}}, "grad_sampler_kwargs"),
    ({"grad_sampler_kwargs": {"batch_size": 2}, "grad_batch_size": 2}, "are the same field"),
    ({"num_recomputations": 0}, "num_recomputations must be at least 1"),
    ({"log_types": "python"}, "log_types: got 'python', but it must be __ALL__ or be left out: what is logged goes"),
    ({"log_types": ["__ALL__", "x"]}, r"log_types: got \['__ALL__', 'x'\], but it must be __ALL__"),
    (
        {"phased": True},
        "phased: got True, but it must be false or be left out: phases, in which pruned",
    ),
    ({"score_type": "movement"}, "score_type must be MFAC, the score of a MFACPruningModifier, .*got 'movement'"),
    ({"score_type": "OBS"}, "score_type must be MFAC"),
    ({"leave_enabled": "yes"}, "leave_enabled: got 'yes', but it should be a valid boolean"),
    ({"damp": 0.0}, "damp must be above 0, got 0"),
    ({"sparsity": 0.3}, r"sparsity: there is no such field. .*There are: params, init_sparsity, final_sparsity"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=[f"{i}-{next(iter(f))}" for i, (f, _) in enumerate(REFUSED)])
def test_what_a_recipe_refuses(fields, message):
    with pytest.raises(kw.RecipeError, match=f"(?s)MFACPruningModifier.*{message}"):
        kw.load_recipe(pruning(**fields))


@pytest.mark.parametrize("pattern", [".*conv.*kernel", r"(block\d{1,2}_)+\w", "[a-z]+_(a|b|c)?/.*/x{3}", "(?i)A.*?B"])
def test_patterns_that_can_not_take_long(pattern):
    assert only(pruning(params=["re:" + pattern])).params == ("re:" + pattern,)


RATE = {"lr_func": "linear", "init_lr": 0.1, "final_lr": 0.01, "start_epoch": 0, "end_epoch": 2}


def test_a_recipe_can_not_be_changed():
    recipe = kw.load_recipe(pruning(num_grads={0.0: 5, 0.5: 9}))
    with pytest.raises(TypeError, match=r"can't be changed\. Load it again"):
        recipe.modifiers[0].num_grads[0.0] = 99
    with pytest.raises(TypeError, match="can't be changed"):
        recipe.modifiers[0].num_grads.update({})
    again = kw.load_recipe(pruning(num_grads={0.0: 5, 0.5: 9}))
    assert recipe == again and hash(recipe) == hash(again)
    assert copy.deepcopy(recipe) == recipe
    steps = {"lr_class": "MultiStepLR", "lr_kwargs": {"milestones": [1, 2]}, "init_lr": 0.1}
    other = kw.load_recipe({"modifiers": [{"LearningRateModifier": steps}]})
    assert len({recipe, again, other}) == 2
    assert kw.load_recipe(str(other)) == other
    with pytest.raises(TypeError, match="can't be changed"):
        other.modifiers[0].lr_kwargs.clear()


@pytest.mark.parametrize(
    "fields",
    [
        {"final_sparsity": {"0.9": ["a"], 0.9: ["b"]}, "params": []},
        {"num_grads": {"0.0": 10, 0.0: 20, 0.5: 30}},
        {"mfac_options": {"num_grads": {"0.0": 10, 0: 20}}},
    ],
)
def test_keys_that_are_the_same_number(fields):
    with pytest.raises(kw.RecipeError, match=r"are the same number\. Keep one of them"):
        kw.load_recipe(pruning(**fields))


def test_whole_numbers_from_arithmetic_in_schedules():
    text = """n: 4
modifiers:
  - !LearningRateModifier
    lr_class: StepLR
    lr_kwargs: {step_size: eval(n / %s), gamma: 0.5}
    init_lr: 0.1
"""
    assert kw.load_recipe(text % 2).modifiers[0].lr_kwargs["step_size"] == 2
    with pytest.raises(kw.RecipeError, match=r"line 5, LearningRateModifier\.lr_kwargs\.step_size: .*whole number"):
        kw.load_recipe(text % 3)


def test_what_no_float32_holds():
    for fields in (
        {"SetWeightDecayModifier": {"weight_decay": 1e39}},
        {"SetLearningRateModifier": {"learning_rate": 1e39}},
        {"LearningRateFunctionModifier": RATE | {"init_lr": 1e39}},
    ):
        with pytest.raises(kw.RecipeError, match=r"must be below 3.4e\+38, got 1e\+39"):
            kw.load_recipe({"modifiers": [fields]})


def test_a_stage_holds_nothing_that_begins_at_its_end():
    rate = {"lr_class": "ExponentialLR", "lr_kwargs": {"gamma": 0.5}, "init_lr": 0.1}
    two = {"EpochRangeModifier": {"end_epoch": 2}}
    stages = {
        "a": {"modifiers": [two, {"LearningRateModifier": rate | {"start_epoch": 2}}]},
        "b": {"modifiers": [{"EpochRangeModifier": {"end_epoch": 2}}]},
    }
    with pytest.raises(kw.RecipeError, match="start_epoch: it begins where its stage ends, so it would do nothing"):
        kw.load_recipe(stages)
    stages["a"]["modifiers"][1]["LearningRateModifier"]["start_epoch"] = 1
    assert kw.load_recipe(stages).modifiers[1].end_epoch == 2
    far = {"modifiers": [{"EpochRangeModifier": {"end_epoch": 900_000}}]}
    with pytest.raises(kw.RecipeError, match=r"stages end at epoch 1.8e\+06"):
        kw.load_recipe({"a": far, "b": far})


SLOW = "re:(.|[^!])*[XYZ]"


@pytest.mark.once
@pytest.mark.parametrize(
    "change",
    [
        {"params": [SLOW]},
        {"exclude": [SLOW]},
        {"final_sparsity": {0.5: [SLOW]}, "params": []},
        {"params": ["nothing", SLOW]},
    ],
)
def test_patterns_that_take_long_are_stopped_when_they_are_matched(make_mlp, change):
    model = make_mlp()
    recipe = kw.load_recipe(pruning("MagnitudePruningModifier", **change))
    start = time.perf_counter()
    found = kw.check_recipe(recipe, model, steps_per_epoch=4, verbose=0)
    assert any("takes too long to match" in p.message or "nothing" in p.message for p in found.problems)
    with pytest.raises((ValueError, KeyError), match=r"takes too long to match|nothing"):
        recipe.apply(model, verbose=0)
    assert time.perf_counter() - start < 20.0


def test_what_is_missing_or_too_large_is_told_with_its_field():
    with pytest.raises(kw.RecipeError, match="ConstantPruningModifier: params is required"):
        kw.load_recipe({"modifiers": [{"ConstantPruningModifier": {"start_epoch": 1}}]})
    with pytest.raises(kw.RecipeError, match=r"num_grads: got 1e\+300"):
        kw.load_recipe(pruning(num_grads=1e300))
    with pytest.raises(kw.RecipeError, match=r"final_sparsity: got \{'high': \['a'\]\}, but it"):
        kw.load_recipe(pruning(final_sparsity={"high": ["a"]}, params=[]))
    with pytest.raises(kw.RecipeError, match=r"params: got \[3\], but it should be a valid string"):
        kw.load_recipe(pruning(params=[3]))
    with pytest.raises(kw.RecipeError, match=r"mask_type: got \[1, 2, 3\], but it should be .* at most 2 items"):
        kw.load_recipe(pruning(mask_type=[1, 2, 3]))
    with pytest.raises(kw.RecipeError, match=r"available_devices: The pattern 're:\(' isn't a regular expression"):
        kw.load_recipe(pruning(available_devices="re:("))
    with pytest.raises(kw.RecipeError) as caught:
        kw.load_recipe(pruning(mask_type="x" * 200_000))
    assert len(str(caught.value)) < 500
    with pytest.raises(kw.RecipeError, match="damp: The number 1e400 is too large"):
        kw.load_recipe("modifiers:\n  - !MFACPruningModifier\n    damp: 1e400\n")
    with pytest.raises(kw.RecipeError, match=r"variables\.goal: The recipe has no variable"):
        kw.load_recipe(pruning(), {"goal": 1})


@pytest.mark.parametrize("tag", ["ACDCPruningModifier", "LearningRateFinalModifier", "CyclicLearningRateModifier"])
def test_other_kinds_that_look_alike(tag):
    with pytest.raises(kw.RecipeError, match=f"!{tag} is outside this project") as caught:
        kw.load_recipe({"modifiers": [{tag: {}}]})
    assert "Do you mean" not in str(caught.value)


def test_errors_name_the_line():
    with pytest.raises(
        kw.RecipeError, match=r"recipe, line 12, MFACPruningModifier\.mfac_options\.fisher_block_size: got"
    ):
        kw.load_recipe(NESTED.replace("size: 50", "size: many"))
    with pytest.raises(kw.RecipeError, match=r"line 3, modifiers\[0\]: there is no modifier !MFACPruning. Do you mean"):
        kw.load_recipe(NESTED.replace("!MFACPruningModifier", "!MFACPruning"))
    with pytest.raises(kw.RecipeError, match="QuantizationModifier is outside this project"):
        kw.load_recipe({"modifiers": [{"QuantizationModifier": {"start_epoch": 0}}]})
    for other in ("SetParamModifier", "MixupModifier", "AlternatingPruningModifier"):
        with pytest.raises(kw.RecipeError, match=f"!{other} is outside this project"):
            kw.load_recipe({"modifiers": [{other: {"start_epoch": 0}}]})
    with pytest.raises(kw.RecipeError, match="global_sparsity: a MFACGlobalPruningModifier ranks all weights together"):
        kw.load_recipe(pruning("MFACGlobalPruningModifier", global_sparsity=False))
    rate = {"learning_rate": 0.1, "log_types": "__all__", "constant_logging": False}
    assert kw.load_recipe({"modifiers": [{"SetLearningRateModifier": rate}]}).modifiers
    with pytest.raises(kw.RecipeError, match="constant_logging: got True, but it must be false or be left out"):
        kw.load_recipe({"modifiers": [{"SetLearningRateModifier": rate | {"constant_logging": True}}]})
    with pytest.raises(kw.RecipeError, match="num_grads: there is no such field"):
        kw.load_recipe(pruning("GMPruningModifier", num_grads=3))


EVERY_TAG = {
    "WoodFisherPruningModifier": {"update": "independent", "seed": None, "exclude": ["a"], "leave_enabled": False},
    "MFACPruningModifier": {"final_sparsity": {0.9: ["a", "re:b"], 0.95: "c"}, "params": [], "damp": 1e-7},
    "MFACGlobalPruningModifier": {"num_grads": {0.0: 3, 0.5: 5}, "use_gradient_buffering": True},
    "OBSPruningModifier": {"mask_type": [4, 1], "num_recomputations": 3},
    "GMPruningModifier": {"mask_type": "2:4", "inter_func": "linear", "params": ["yes", "2:4", "1e-5", "re:é\\d"]},
    "MagnitudePruningModifier": {"init_sparsity": "__FROM_PARAM__"},
    "GlobalMagnitudePruningModifier": {"mask_type": "block4"},
    "ConstantPruningModifier": {"params": "__ALL__", "start_epoch": 0.5},
    "ReconstructionModifier": {"final_sparsity": {0.5: "a", 0.9: ["b"]}, "params": [], "num_examples": 64},
    "EpochRangeModifier": {"start_epoch": 0, "end_epoch": 3},
    "SetLearningRateModifier": {"learning_rate": 1e-05, "start_epoch": 1},
    "LearningRateFunctionModifier": {
        "lr_func": "cyclic_linear",
        "init_lr": 0.1,
        "final_lr": 0.01,
        "start_epoch": 0,
        "end_epoch": 4,
        "cycle_epochs": 2,
    },
    "LearningRateModifier": {
        "lr_class": "MultiStepLR",
        "lr_kwargs": {"milestones": [1, 2], "gamma": 0.5},
        "init_lr": 0.1,
    },
    "SetWeightDecayModifier": {"weight_decay": 0.0, "start_epoch": 2},
    "TrainableParamsModifier": {"params": ["a", "b"], "trainable": False, "start_epoch": 1, "end_epoch": 2},
}


def test_the_canonical_form_reads_back_equal(tmp_path):
    assert set(EVERY_TAG) == set(TAGS)
    fields = {
        tag: pruning(tag, **given)["modifiers"][0][tag] if issubclass(TAGS[tag], modifiers.PruningModifier) else given
        for tag, given in EVERY_TAG.items()
    }
    recipe = kw.load_recipe({"modifiers": [{tag: given} for tag, given in fields.items()]})
    recipe.save(tmp_path / "new.yaml")
    schema = jsonschema.Draft202012Validator(kw.recipe_schema())
    schema.check_schema(kw.recipe_schema())
    as_json = json.loads(json.dumps(recipe.as_dict()))
    schema.validate(as_json)
    for again in (str(recipe), tmp_path / "new.yaml", recipe.as_dict(), as_json):
        assert kw.load_recipe(again) == recipe
    # In its own words, each tag is accepted by the schema too, with expressions for values.
    for tag, given in fields.items():
        schema.validate(json.loads(json.dumps({"x": 2, "modifiers": [{tag: given}]})))
    schema.validate({"stage": {"a_modifiers": [{"EpochRangeModifier": {"end_epoch": "eval(x + 1)"}}]}})
    for wrong in ({"end_epoch": "three"}, {"end_epochs": 3, "end_epoch": 3}, {}):
        assert not schema.is_valid({"modifiers": [{"EpochRangeModifier": wrong}]})
    with pytest.raises(Exception, match="frozen"):
        recipe.modifiers[0].damp = 3.0


def test_stages_follow_each_other():
    text = """
rate: 0.1
first:
  training_modifiers:
    - !SetLearningRateModifier {learning_rate: eval(rate), start_epoch: 0}
  pruning_modifiers:
    - !GMPruningModifier
      {params: __ALL__, init_sparsity: 0.0, final_sparsity: 0.3, start_epoch: 0, end_epoch: 1.5, update_frequency: 1}
second:
  rate: 0.2
  training_modifiers:
    - !SetLearningRateModifier {learning_rate: eval(rate), start_epoch: 0}
    - !EpochRangeModifier {start_epoch: 0, end_epoch: 3}
  pruning_modifiers:
    - !GMPruningModifier
      params: __ALL__
      init_sparsity: __FROM_PARAM__
      final_sparsity: 0.6
      start_epoch: -1
      end_epoch: 2
      update_frequency: -1
    - !ConstantPruningModifier
      params: __ALL_PRUNABLE__
"""
    recipe = kw.load_recipe(text)
    where = [(m.tag[:9], getattr(m, "start_epoch", None), m.last_epoch) for m in recipe.modifiers]
    assert where == [
        ("SetLearni", 0.0, -1),
        ("Magnitude", 0.0, 1.5),
        ("SetLearni", 1.5, -1),
        ("EpochRang", 1.5, 4.5),
        ("Magnitude", 1.5, 3.5),
        ("ConstantP", 1.5, -1),
    ]
    assert [m.learning_rate for m in recipe.modifiers if m.tag.startswith("SetL")] == [0.1, 0.2]
    assert recipe.epochs == 5
    assert kw.load_recipe(str(recipe)) == recipe
    # What lasts "to the end" ends with its stage; zeros are held on.
    lasting = [
        {"TrainableParamsModifier": {"params": ["a"], "trainable": False}},
        {"ConstantPruningModifier": {"params": "__ALL__"}},
    ]
    stages = {
        "one": {"modifiers": [*lasting, {"EpochRangeModifier": {"end_epoch": 2}}]},
        "two": {"modifiers": [*lasting, {"EpochRangeModifier": {"end_epoch": 3}}]},
    }
    found = kw.load_recipe(stages).modifiers
    assert [(m.tag[:5], m.start_epoch, m.end_epoch) for m in found if not m.tag.startswith("Epoch")] == [
        ("Train", 0.0, 2.0),
        ("Const", 0.0, -1.0),
        ("Train", 2.0, -1.0),
        ("Const", 2.0, -1.0),
    ]
    assert kw.load_recipe({"modifiers": [{"ConstantPruningModifier": {"params": "__ALL__"}}]}).epochs == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"update_frequency": 1e-9},
            "=1e-09 makes more than 1,000,000 updates from epoch 0 to 1. Write 0",
        ),
        ({"end_epoch": 1e308}, r"end_epoch: got 1e\+308, but it should be less than or equal to 1000000"),
    ],
)
def test_what_would_never_end_is_refused(fields, message):
    with pytest.raises(kw.RecipeError, match=message):
        kw.load_recipe(pruning(**fields))


def one_hot_blobs(count):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, count).astype("int32")
    return (rng.normal(size=(count, 12)) + 2.0 * np.eye(3, 12)[y]).astype("float32"), y


def classifier(layers):
    model = keras.Sequential([keras.layers.Input((12,)), *layers, keras.layers.Dense(3, name="logits")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3, weight_decay=1e-3), loss, metrics=["accuracy"])
    return model


def attention_model():
    inputs = keras.Input((4, 12))
    attention = keras.layers.MultiHeadAttention(2, 6, name="self_attention_layer")
    x = inputs + attention(inputs, inputs)
    x = keras.layers.Dense(16, activation="gelu", name="feedforward_intermediate_dense")(x)
    x = keras.layers.Dense(12, name="feedforward_output_dense")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x[:, 0]))
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def mobile_like():
    dense = [keras.layers.Dense(20, activation="relu", name=f"conv_pw_{i}") for i in range(1, 14)]
    return classifier(dense)


def run_example(path, model, data, steps, **kwargs):
    recipe = kw.load_recipe(path, **kwargs)
    callbacks = recipe.callbacks(model, data, verbose=0)
    used = [part[: steps * 8] for part in data]
    return model.fit(*used, batch_size=8, epochs=recipe.epochs, verbose=0, callbacks=callbacks).history


def test_example_1_one_shot(make_mlp):
    data = one_hot_blobs(512)
    model = make_mlp()
    run_example(EXAMPLES[0], model, data, steps=3)
    report = kw.load_recipe(EXAMPLES[0]).apply(make_mlp(), data, verbose=0)
    assert kw.sparsity_report(model).pruned == report.pruned == round(0.35 * 240)
    assert report.samples == 512


def test_example_2_three_levels():
    model = mobile_like()
    history = run_example(EXAMPLES[1], model, one_hot_blobs(256), steps=3)
    assert history["learning_rate"] == pytest.approx([4e-4] * 3)
    assert float(model.optimizer.weight_decay) == 0.0
    found = zeros(model)
    assert found["conv_pw_1"] == found["logits"] == 0
    wanted = {0.90: (2, 3, 4), 0.95: (5, 6, 7, 8), 0.97: (9, 10, 11, 12, 13)}
    for level, numbers in wanted.items():
        assert [found[f"conv_pw_{i}"] for i in numbers] == [round(level * 400) / 400] * len(numbers)


def test_example_3_tutorial(make_mlp):
    model = make_mlp()
    history = run_example(EXAMPLES[2], model, one_hot_blobs(1400), steps=1)
    assert [round(history["sparsity"][epoch], 3) for epoch in (0, 1, 5, 60)] == [0.0, 0.05, 0.2, 0.85]


def test_example_4_transfer():
    model = classifier([keras.layers.Dense(16, activation="relu", name="hidden")])
    history = run_example(EXAMPLES[3], model, one_hot_blobs(24), steps=3, variables={"init_lr": 1e-3})
    assert len(history["loss"]) == 15
    assert history["sparsity"][0] == 0
    assert history["sparsity"][-1] == pytest.approx(0.9)
    # Half a cosine from init to final, as it stands before the last batch of an epoch.
    cosine = [5e-5 + 0.5 * (1e-3 - 5e-5) * (1 + np.cos(np.pi * (e + 2 / 3) / 15)) for e in range(15)]
    assert history["learning_rate"][:-1] == pytest.approx(cosine[:-1], rel=1e-4)


def test_example_5_bert():
    model = attention_model()
    kw.prune(model, sparsity=0.7, method="magnitude", exclude=["logits/kernel"], verbose=0)
    before = zeros(model)
    x, y = one_hot_blobs(256)
    x = np.repeat(x[:, None], 4, axis=1)
    history = run_example(EXAMPLES[4], model, (x, y), steps=1, variables={"num_grads": 8})
    assert kw.sparsity_report(model, ["re:.*/kernel"]).pruned > 0
    assert zeros(model)["logits"] == 0
    pruned = [v for v in kw.sparsity_report(model).variables if "logits" not in v.name]
    assert sum(v.pruned for v in pruned) == round(0.9 * sum(v.weights for v in pruned))
    assert all(zeros(model)[name] >= share for name, share in before.items())
    assert history["sparsity"][-1] == pytest.approx(0.9, abs=1e-3)


def test_one_shot(make_mlp, blobs):
    by_level = pruning(final_sparsity={0.75: ["hidden/kernel"], 0.5: ["re:.*kernel"]}, params=[], num_grads=16)
    model = make_mlp()
    report = kw.load_recipe(by_level).apply(model, blobs, verbose=0)
    assert (zeros(model), report.pruned, report.samples) == ({"hidden": 0.75, "out": 0.5}, 144 + 24, 16)
    # As the same call of prune.
    other, third = make_mlp(), make_mlp()
    other.set_weights(third.get_weights())
    kw.load_recipe(pruning(num_grads={0.0: 4, 0.5: 16}, damp=1e-4, fisher_block_size=40)).apply(other, blobs, verbose=0)
    kw.prune(third, blobs, 0.5, quality="fast", num_grads=16, damp=1e-4, fisher_block_size=40, verbose=0)
    for a, b in zip(other.get_weights(), third.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # All of its prunings, or none.
    two = {"modifiers": [*pruning("GMPruningModifier", params=["out/kernel"])["modifiers"], *by_level["modifiers"]]}
    before = third.get_weights()
    with pytest.raises(ValueError, match="prune needs data"):
        kw.load_recipe(two).apply(third, verbose=0)
    for a, b in zip(third.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="prunes nothing"):
        kw.load_recipe({"modifiers": [{"EpochRangeModifier": {"end_epoch": 2}}]}).apply(model, blobs)


@pytest.mark.parametrize("tag", ["MFACPruningModifier", "GMPruningModifier"])
@pytest.mark.parametrize("mask", ["2:4", "tensorrt", "block4", [2, 4], "filter", "channel"])
def test_masks_of_recipes(make_mlp, blobs, tag, mask):
    fields = {"num_grads": 8, "damp": 1e-2} if tag == "MFACPruningModifier" else {}
    recipe = kw.load_recipe(pruning(tag, mask_type=mask, **fields))
    assert kw.load_recipe(str(recipe)) == recipe
    (callback,) = recipe.callbacks(make_mlp(), blobs)
    wanted = "2:4" if mask == "tensorrt" else tuple(mask) if isinstance(mask, list) else mask
    assert callback.options.mask_type == wanted
    model, twin = make_mlp(), make_mlp()
    twin.set_weights(model.get_weights())
    check = kw.check_recipe(recipe, model, steps_per_epoch=12, data=blobs, verbose=0)
    assert not check.problems
    assert [update.sparsity > 0 for update in check.modifiers[0].updates] == [False, True]
    report = recipe.apply(model, blobs, verbose=0)
    method = {"method": "magnitude", "global_sparsity": False} if tag == "GMPruningModifier" else fields
    alone = kw.prune(twin, blobs, 0.5, quality="fast", mask_type=wanted, verbose=0, **method)
    assert 0.3 < report.sparsity < 0.7
    assert len(report.notes) == len(alone.notes)
    assert report.notes == ((check.modifiers[0].dense,) if check.modifiers[0].dense else ())
    assert check.modifiers[0].dense in str(check)
    for a, b in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stages_and_gauss_newton_samples_of_recipes(make_mlp, blobs, monkeypatch):
    fields = {"num_grads": 8, "fisher": "ggn", "damp": "auto", "num_recomputations": 3}
    recipe = kw.load_recipe(pruning(**fields))
    assert kw.load_recipe(str(recipe)) == recipe
    (callback,) = recipe.callbacks(make_mlp(), blobs)
    assert {name: getattr(callback.options, name) for name in fields} == fields
    model, twin = make_mlp(), make_mlp()
    twin.set_weights(model.get_weights())
    report = recipe.apply(model, blobs, verbose=0)
    del fields["num_recomputations"]
    kw.prune(twin, blobs, 0.5, quality="fast", stages=3, verbose=0, **fields)
    assert report.samples == 3 * 8
    assert [stage.samples for stage in report.stages] == [8, 8, 8]
    assert report.settings["fisher"] == "ggn" and report.settings["stages"] == 3
    for a, b in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # The same machine and the same second a sample: three stages take three times as long.
    monkeypatch.setattr("keras_woodfisher.recipe.dry_run.check.probed_seconds", lambda *given: 2.0)
    monkeypatch.setattr("keras_woodfisher.recipe.dry_run.costs._gemm_rate", lambda: 1e9)
    alone = kw.load_recipe(pruning(**fields))
    checks = [kw.check_recipe(r, model, steps_per_epoch=12, data=blobs, verbose=0) for r in (alone, recipe)]
    once, thrice = (check.modifiers[0].cost for check in checks)
    assert thrice.gradient_seconds == pytest.approx(3 * once.gradient_seconds)
    assert thrice.inverse_seconds == pytest.approx(3 * once.inverse_seconds)
    buffered = kw.check_recipe(recipe, model, steps_per_epoch=12, verbose=0)
    assert any("needs data to sample from" in problem.message for problem in buffered.problems)


def test_masks_that_a_recipe_refuses(make_mlp, blobs):
    with pytest.raises(kw.RecipeError, match=r"2:4 keeps 2 of 4 weights, .* at most 0\.5, got 0\.8"):
        kw.load_recipe(pruning(mask_type="2:4", final_sparsity=0.8))
    with pytest.raises(kw.RecipeError, match="fisher_block_size=2 can't hold the groups of 4"):
        kw.load_recipe(pruning(mask_type="2:4", fisher_block_size=2))
    constant = {"modifiers": [{"ConstantPruningModifier": {"params": "__ALL__", "mask_type": "block4"}}]}
    assert only(constant) == only({"modifiers": [{"ConstantPruningModifier": {"params": "__ALL__"}}]})
    with pytest.raises(kw.RecipeError, match="mask_type must be unstructured"):
        kw.load_recipe({"modifiers": [{"ConstantPruningModifier": {"params": "__ALL__", "mask_type": "4:2"}}]})
    none = kw.load_recipe(pruning(mask_type=[50, 50], num_grads=8))
    (problem, *_) = kw.check_recipe(none, make_mlp(), steps_per_epoch=12, data=blobs, verbose=0).problems
    assert "finds no whole group" in problem.message


def test_where_gradients_come_from(make_mlp, blobs, monkeypatch):
    def sources(data, **fields):
        (callback,) = kw.load_recipe(pruning(**fields)).callbacks(make_mlp(), data)
        return callback.task.data is not None, callback.options.grad_batch_size

    sampler = {"grad_sampler_kwargs": {"batch_size": 4}}
    assert sources(blobs, **sampler) == (True, 4)
    assert sources(None, **sampler) == (False, 1)
    assert sources(blobs, use_gradient_buffering=True, **sampler) == (False, 1)
    assert sources(blobs, use_gradient_buffering=False) == (True, 1)
    with pytest.raises(ValueError, match="use_gradient_buffering is false, so data is required"):
        sources(None, use_gradient_buffering=False)
    with pytest.raises(KeyError, match="hiden/kernel"):
        kw.load_recipe(pruning(params=["hiden/kernel"])).callbacks(make_mlp())


def test_callbacks_have_an_order(make_mlp, blobs):
    constant = {"ConstantPruningModifier": {"params": "__ALL__", "start_epoch": 2}}
    late = pruning("GMPruningModifier", start_epoch=1, end_epoch=2, init_sparsity="__FROM_PARAM__", final_sparsity=0.8)
    rate = {"SetLearningRateModifier": {"learning_rate": 0.125, "start_epoch": 0.5}}
    items = [rate, constant, *late["modifiers"], *pruning("GlobalMagnitudePruningModifier")["modifiers"]]
    recipe = kw.load_recipe({"modifiers": items})
    model = make_mlp()
    callbacks = recipe.callbacks(model, verbose=0)
    assert [type(c).__name__ for c in callbacks] == ["WoodFisherPruning"] * 2 + ["KeepZeros", "SetLearningRate"]
    history = model.fit(*blobs, batch_size=24, epochs=3, callbacks=callbacks, verbose=0).history
    assert [round(s, 2) for s in history["sparsity"]] == [0.0, 0.5, 0.8]
    assert zeros(model) == {"hidden": pytest.approx(0.8, abs=0.003), "out": pytest.approx(0.8, abs=0.011)}
    assert history["learning_rate"] == [0.125] * 3
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == 0.125


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_is_a_recipe_or_an_error(seed):
    rng = random.Random(seed)
    for _ in range(40):
        text = mutate(rng, rng.choice(SEEDS))
        try:
            recipe = kw.load_recipe(text)
        except kw.RecipeError as error:
            assert error.message
        else:
            assert kw.load_recipe(str(recipe)) == recipe
