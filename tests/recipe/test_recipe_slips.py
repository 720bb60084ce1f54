"""Slips of the pen, and recipes of other tools: each is told what it is, and how to write it."""

import json

import pytest

import keras_woodfisher as kw

GOOD = """modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.0
    final_sparsity: 0.8
    start_epoch: 0.0
    end_epoch: 3.0
    update_frequency: 1.0
"""
RIGHT = kw.load_recipe(GOOD)


def failure(source):
    with pytest.raises(kw.RecipeError) as caught:
        kw.load_recipe(source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tag", "meant"),
    [
        ("MFACPrunningModifier", "MFACPruningModifier"),
        ("MFACPruningModifer", "MFACPruningModifier"),
        ("mfacpruningmodifier", "MFACPruningModifier"),
        ("sparseml.pytorch.MFACPruningModifier", "MFACPruningModifier"),
        ("GlobalMFACPruningModifier", "MFACGlobalPruningModifier"),
        ("WoodFisherPrunerModifier", "WoodFisherPruningModifier"),
        ("OBS_Pruning_Modifier", "OBSPruningModifier"),
        ("ConstantPruning", "ConstantPruningModifier"),
        ("EpochsRangeModifier", "EpochRangeModifier"),
        ("SetLearningRate", "SetLearningRateModifier"),
        ("TrainableParamModifier", "TrainableParamsModifier"),
    ],
)
def test_tags(tag, meant):
    assert f"line 2, modifiers[0]: there is no modifier !{tag}. Do you mean !{meant}?" in failure(
        GOOD.replace("GMPruningModifier", tag)
    )


def test_tags_of_others():
    for tag, whose in (
        ("SparseGPTModifier", "LLM Compressor's; what prunes in one shot here is !ReconstructionModifier."),
        ("GPTQModifier", "LLM Compressor's: remove it."),
        ("LayerPruningModifier", "SparseML's: remove it."),
    ):
        text = failure(GOOD.replace("GMPruningModifier", tag))
        assert f"!{tag} is outside this project, which prunes and schedules training. It is {whose}" in text


@pytest.mark.parametrize(
    "name", ["final_sparisty", "finalSparsity", "Final_Sparsity", "final-sparsity", "finalsparsity"]
)
def test_fields(name):
    text = failure(GOOD.replace("final_sparsity", name))
    assert f"line 5, GMPruningModifier.{name}: there is no such field. Do you mean final_sparsity?" in text


def test_keywords_and_groups():
    text = failure(GOOD.replace("PRUNABLE", "PRUNEABLE"))
    assert (
        "line 3, GMPruningModifier.params: got '__ALL_PRUNEABLE__', but it must be __ALL__ or __ALL_PRUNABLE__" in text
    )
    text = failure(GOOD.replace("modifiers:", "pruning_modifers:"))
    assert "line 1, pruning_modifers: 'pruning_modifers' holds modifiers, but the name of a group must contain" in text


@pytest.mark.parametrize(
    ("written", "mend"),
    [
        ("80%", "Write 0.8 for 80 %."),
        ("80 %", "Write 0.8 for 80 %."),
        ("'12.5%'", "Write 0.125 for 12.5 %."),
        ("{80%: [a]}", "Write 0.8 for 80 %."),
        ("0,8", "Write 0.8."),
        ("'0.8'", "Write it without quotation marks."),
        ("80", "write 0.8 for 80 %."),
        ("4/5", "Write 0.8."),
        ("\uff10.\uff18", "Write 0.8."),
        ("8_000", "Write 8000."),
        ("${goal}", "Write eval(goal) for the variable goal of the recipe."),
        ("$goal", "Write eval(goal) for the variable goal of the recipe."),
    ],
)
def test_percentages(written, mend):
    text = failure(GOOD.replace("0.8", written).replace("__ALL_PRUNABLE__", "[]" if "{" in written else "__ALL__"))
    assert "line 5, GMPruningModifier.final_sparsity: " in text and text.endswith(mend)


@pytest.mark.parametrize(
    ("written", "mend"),
    [("yes", "Write true."), ("Off", "Write false."), ("'true'", "Write it without quotation marks.")],
)
def test_truth_values(written, mend):
    text = failure(f"{GOOD}    leave_enabled: {written}\n")
    assert "GMPruningModifier.leave_enabled: " in text and text.endswith(mend)


def test_percentages_of_variables_and_arguments():
    goal = "goal: 80%\n" + GOOD.replace("0.8", "eval(goal)")
    assert failure(goal).endswith("Write 0.8 for 80 %.")
    assert "Write 0.8 for 80 %." in failure(goal.replace("eval(goal)", "eval(goal / 2)"))
    with pytest.raises(
        TypeError, match=r"final_sparsity must be a fraction in \[0, 1\), got '80%'\. Write 0\.8 for 80 %\."
    ):
        kw.WoodFisherPruning("80%", end_epoch=2)


BLANKS = "\u00a0\u2003\u3000\u200b\u2060\u00ad\u202f"


@pytest.mark.parametrize("character", [*BLANKS, "\ufeff", "\u2028", "\u0085"], ids=lambda c: f"U+{ord(c):04X}")
@pytest.mark.parametrize(
    ("line", "place"),
    [
        (5, "    @final"),
        (5, "sparsity:@0.8"),
        (5, "0.8@"),
        (2, "-@!GM"),
        (2, "!@GM"),
        (7, "end@_epoch"),
        (7, "@ end_epoch"),
    ],
)
def test_blanks_that_only_look_like_blanks(character, line, place):
    text = GOOD.replace(
        place.replace("@", "" if "@0" not in place and "-@" not in place else " "), place.replace("@", character)
    )
    assert text != GOOD
    if character in "\u2028\u0085":
        # YAML takes them for the end of a line.
        try:
            assert kw.load_recipe(text) == RIGHT
        except kw.RecipeError as error:
            assert "line" in str(error)
        return
    found = failure(text)
    assert f"line {line}" in found and f"(U+{ord(character):04X}), as web pages" in found


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        (3, "__ALL_PRUNABLE__", "\u201c__ALL_PRUNABLE__\u201d"),
        (2, "- !", "\u2013 !"),
        (6, "start_epoch: 0.0", "start_epoch: \u22121"),
        (5, "final_sparsity:", "final_sparsity\uff1a"),
    ],
)
def test_characters_that_only_look_alike(line, right, wrong):
    found = failure(GOOD.replace(right, wrong))
    assert f"line {line}" in found and "as web pages and word processors write it" in found


def test_blanks_are_fine_in_comments_and_in_quotation_marks():
    assert kw.load_recipe(GOOD.replace("0.8", "0.8 # eighty\u00a0% \u2013 of \u201call\u201d")) == RIGHT
    assert kw.load_recipe("\ufeff" + GOOD) == RIGHT
    recipe = kw.load_recipe(GOOD.replace("__ALL_PRUNABLE__", "['a\u00a0b', \"c\u2003d\"]"))
    assert recipe.modifiers[0].params == ("a\u00a0b", "c\u2003d")


LLM_COMPRESSOR = """sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
"""
FLAT = """pruning_modifiers:
  MagnitudePruningModifier: {init_sparsity: 0.0, final_sparsity: 0.5, start: 0.0, end: 2.0, targets: ["re:.*weight"]}
"""


@pytest.mark.parametrize("ending", [None, ".yaml", ".md", ".json"])
def test_recipes_of_llm_compressor(tmp_path, ending):
    sources = [LLM_COMPRESSOR, FLAT]
    if ending == ".json":
        sources = [
            json.dumps({"test_stage": {"obcq_modifiers": {"SparseGPTModifier": {"sparsity": 0.5}}}}),
            json.dumps({"pruning_modifiers": {"MagnitudePruningModifier": {"final_sparsity": 0.5}}}),
        ]
    for source, first in zip(sources, ("SparseGPT", "MagnitudePruning"), strict=True):
        if ending:
            path = tmp_path / f"r{ending}"
            path.write_text(f"---\n{source}---\n# A model\n" if ending == ".md" else source)
        text = failure(path if ending else source)
        assert "That is how LLM Compressor, and SparseML from release 1.6 on, write recipes" in text
        assert f"Write `- !{first}Modifier` with its fields indented below it" in text


def test_fields_of_llm_compressor():
    for theirs, ours in (("targets", "params"), ("start", "start_epoch"), ("mask_structure", "mask_type")):
        text = failure(GOOD + f"    {theirs}: 0\n")
        assert (
            f"GMPruningModifier.{theirs}: there is no such field. It is LLM Compressor's name; here it is {ours}."
            in text
        )
    text = failure("SparseGPTModifier:\n  sparsity: 0.5\n")
    assert (
        "Modifiers stand in a group: write `modifiers:`, and below it `- !SparseGPTModifier` with its fields." in text
    )


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ('{"input_info": {"sample_size": [1, 3]}, "compression": {"algorithm": "magnitude_sparsity"}}', "NNCF"),
        ("version: 1\npruners:\n  low:\n    class: AutomatedGradualPruner\n", "Distiller"),
        ("model:\n  name: net\nquantization:\n  approach: static\n", "Intel Neural Compressor"),
        ("pruning_schedule:\n  class_name: PolynomialDecay\n", "TensorFlow Model Optimization"),
    ],
)
def test_configurations_of_other_tools(text, tool):
    assert f"is a key of {tool}'s configurations, which this package doesn't read" in failure(text)


def test_variables_and_stages_may_have_such_names():
    assert kw.load_recipe(f"model: [1, 2]\n{GOOD}").modifiers == RIGHT.modifiers
    indented = "".join(f"  {line}\n" for line in GOOD.splitlines())
    assert kw.load_recipe(f"quantization:\n{indented}").modifiers == RIGHT.modifiers
