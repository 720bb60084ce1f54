import contextlib
import json
import math
import os
import pickle
import random
import time
import tracemalloc
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_mutations import (
    DEVICES_DIALECT,
    FLAT_DIALECT,
    IMAGENETTE,
    MNIST,
    SEEDS,
    SQUAD,
    STAGED,
    TRANSFER,
    TUTORIAL,
    mutate,
)

from keras_woodfisher import load_recipe
from keras_woodfisher.recipe.syntax.errors import RecipeError
from keras_woodfisher.recipe.syntax.outline import Outline, read_outline

pytestmark = pytest.mark.once

ONE = "modifiers:\n  - !A\n    x: 1\n"


def entries(source, **variables):
    return read_outline(source, variables or None).stages[0].entries


def fields(source):
    (entry,) = entries(source)
    return entry.fields


def with_value(text):
    """A recipe whose line 3 is a field `x` of this value."""
    return f"modifiers:\n  - !A\n    x: {text}\n"


def failure(source, message, variables=None):
    with pytest.raises(RecipeError, match=message) as caught:
        read_outline(source, variables)
    return caught.value


class TestRealRecipes:
    def test_mnist(self):
        (entry,) = entries(MNIST)
        assert entry.tag == "MFACPruningModifier"
        assert entry.fields == {
            "params": "__ALL_PRUNABLE__",
            "init_sparsity": 0.0,
            "final_sparsity": 0.35,
            "start_epoch": 0,
            "end_epoch": 1,
            "update_frequency": 1,
            "mfac_options": {"num_grads": 512, "fisher_block_size": 2000},
        }
        assert (entry.line, entry.group, entry.path) == (3, "pruning_modifiers", "pruning_modifiers[0]")
        assert entry.lines == {
            "params": 4,
            "init_sparsity": 5,
            "final_sparsity": 6,
            "start_epoch": 7,
            "end_epoch": 8,
            "update_frequency": 9,
            "mfac_options": 10,
            "mfac_options.num_grads": 11,
            "mfac_options.fisher_block_size": 12,
        }

    def test_imagenette(self):
        epochs, rate, pruning, decay = entries(IMAGENETTE)
        assert (epochs.tag, epochs.fields) == ("EpochRangeModifier", {"start_epoch": 0, "end_epoch": 3})
        assert (rate.tag, rate.fields) == ("SetLearningRateModifier", {"start_epoch": 0, "learning_rate": 0.0004})
        assert pruning.fields == {
            "params": [],
            "init_sparsity": 0.35,
            "final_sparsity": {
                0.90: ["sections.1.0.conv.weight", "sections.1.1.conv.weight", "sections.2.0.conv.weight"],
                0.95: [f"sections.{name}.conv.weight" for name in ("2.1", "3.0", "3.1", "3.2")],
                0.97: [f"sections.{name}.conv.weight" for name in ("3.3", "3.4", "3.5", "4.0", "4.1")],
            },
            "start_epoch": 1.0,
            "end_epoch": 2.0,
            "update_frequency": 1,
            "num_grads": 256,
            "fisher_block_size": 2000,
            "available_gpus": ["cuda:0"],
        }
        assert (decay.tag, decay.fields) == ("SetWeightDecayModifier", {"start_epoch": 2.0, "weight_decay": 0})
        assert decay.group == "regularization_modifiers"
        assert IMAGENETTE.split("\n")[decay.line - 1] == "  - !SetWeightDecayModifier"

    def test_tutorial(self):
        assert fields(TUTORIAL) == {
            "params": "__ALL_PRUNABLE__",
            "init_sparsity": 0.05,
            "final_sparsity": 0.85,
            "start_epoch": 1.0,
            "end_epoch": 61.0,
            "update_frequency": 4.0,
            "mfac_options": {
                "num_grads": {0.0: 256, 0.5: 512, 0.75: 1024, 0.83: 1400},
                "fisher_block_size": 10000,
                "available_gpus": ["cuda:0"],
            },
        }

    def test_transfer(self):
        epochs, rate, pruning = entries(TRANSFER)
        assert epochs.fields == {"start_epoch": 0, "end_epoch": 15}
        assert rate.fields == {
            "start_epoch": 1,
            "end_epoch": 15,
            "lr_func": "cosine",
            "init_lr": 1e-4,
            "final_lr": 5e-5,
        }
        assert (pruning.tag, pruning.fields["start_epoch"], pruning.fields["end_epoch"]) == (
            "GlobalMagnitudePruningModifier",
            1,
            10,
        )
        assert {entry.group for entry in (rate, pruning)} == {"pruning_modifiers"}
        longer = entries(TRANSFER, pruning_epochs=20)
        assert [entry.fields["end_epoch"] for entry in longer] == [26, 26, 21]

    def test_squad(self):
        epochs, pruning, rate = entries(SQUAD)
        assert epochs.fields == {"start_epoch": 0.0, "end_epoch": 30}
        assert pruning.tag == "OBSPruningModifier"
        assert pruning.fields == {
            "params": ["re:encoder.layer.*.query.weight", "re:encoder.layer.*.key.weight"],
            "init_sparsity": 0.7,
            "final_sparsity": 0.9,
            "start_epoch": 2,
            "end_epoch": 26,
            "update_frequency": 4,
            "mask_type": "unstructured",
            "global_sparsity": True,
            "num_grads": 1024,
            "damp": 1e-7,
            "fisher_block_size": 50,
            "grad_sampler_kwargs": {"batch_size": 8},
        }
        assert (rate.tag, rate.fields["lr_func"], rate.fields["cycle_epochs"]) == (
            "LearningRateFunctionModifier",
            "cyclic_linear",
            4.0,
        )

    def test_dialects(self):
        assert fields(FLAT_DIALECT)["num_grads"] == {0.0: 64, 0.5: 128}
        assert fields(FLAT_DIALECT)["mask_type"] == [1, 4]
        assert fields(DEVICES_DIALECT)["use_gradient_buffering"] is None
        assert fields(DEVICES_DIALECT)["global_sparsity"] is False
        assert fields(DEVICES_DIALECT)["start_epoch"] == -1

    def test_staged(self):
        outline = read_outline(STAGED)
        assert [stage.name for stage in outline.stages] == ["pruning_stage", "finetuning_stage"]
        epochs, pruning = outline.stages[0].entries
        assert epochs.fields == {"start_epoch": 0, "end_epoch": 4}
        assert pruning.fields == {"params": ["a/kernel"], "mask_type": "2:4", "damp": 1e-5}
        assert pruning.path == "pruning_stage/pruning_modifiers[1]"
        assert outline.stages[1].entries[0].fields["learning_rate"] == 0.01


class TestItems:
    @pytest.mark.parametrize(
        ("item", "expected"),
        [
            ("!Tag\n    a: 1.0", {"a": 1.0}),
            ("!Tag {a: 1.0}", {"a": 1.0}),
            ("!Tag  # comment\n    a: 1.0", {"a": 1.0}),
            ("!Tag:\n    a: 1.0", {"a": 1.0}),
            ("!Tag:  # comment\n    a: 1.0", {"a": 1.0}),
            ("!Tag: {a: 1.0}", {"a": 1.0}),
            ("!Tag\n    {a: 1.0,\n     b: x}", {"a": 1.0, "b": "x"}),
            ("!Tag", {}),
            ("!Tag:", {}),
            ("!Tag  # comment", {}),
            ("!Tag {}", {}),
            ("!Tag null", {}),
            ("&name !Tag {a: 1.0}", {"a": 1.0}),
            ("!Tag &name {a: 1.0}", {"a": 1.0}),
            ("Tag: {a: 1.0}", {"a": 1.0}),
            ("Tag:\n      a: 1.0", {"a": 1.0}),
            ("'!Tag': {a: 1.0}", {"a": 1.0}),
            ("Tag: null", {}),
            ("Tag:", {}),
        ],
    )
    def test_forms(self, item, expected):
        text = f"# -----\nmodifiers:\n  - {item}\n  - !Last {{}}\n"
        first, last = entries(text)
        assert (first.tag, first.fields, first.line) == ("Tag", expected, 3)
        assert (last.tag, last.path) == ("Last", "modifiers[1]")

    def test_flow_list(self):
        assert [(e.tag, e.fields) for e in entries("modifiers: [!A, !B: {x: 1}, !C]\n")] == [
            ("A", {}),
            ("B", {"x": 1}),
            ("C", {}),
        ]

    def test_forms_within_texts_and_comments_are_text(self):
        text = "modifiers:\n  - !A\n    # - !B: {x: 1}\n    x: '- !C: {y: 2}'\n    y: |\n      - !D: z\n"
        assert fields(text) == {"x": "- !C: {y: 2}", "y": "- !D: z\n"}

    def test_aliased_item(self):
        first, second = entries("modifiers:\n  - &a !A {x: 1}\n  - *a\n")
        assert (first.tag, first.fields) == (second.tag, second.fields) == ("A", {"x": 1})
        assert first.fields is not second.fields

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ("A", r"Each item of 'modifiers' is a modifier, `- !EpochRangeModifier` .* modifiers\[0\] is 'A'"),
            ("3", r"modifiers\[0\] is 3"),
            ("", r"modifiers\[0\] is None"),
            ("[!A]", r"modifiers\[0\] is a list"),
            ("params: x", r"modifiers\[0\] is a mapping with the keys params"),
            ("a: {x: 1}\n    b: {y: 2}", r"is a mapping with the keys a, b"),
            ("1: {x: 1}", r"is a mapping with the keys 1"),
            ("A: !B {x: 1}", r"is a mapping with the keys A"),
            ("!A [x]", r"The modifier 'A' must hold fields, one `name: value` a line and indented, got a list"),
            ("!A x", r"must hold fields, .* got 'x' tagged '!A'"),
            ("!A {1: x}", r"The name of a field must be a text, got 1 in modifiers\[0\]"),
            ("!A {~: x}", r"The name of a field must be a text, got None"),
        ],
    )
    def test_what_is_refused(self, item, message):
        assert failure(f"a: 1\nmodifiers:\n  - {item}\n", message).line == 3


class TestTags:
    @pytest.mark.parametrize(
        "tag",
        [
            "!!python/object/apply:os.system",
            "!!python/name:os.system",
            "!!str",
            "!!map",
            "!<tag:yaml.org,2002:python/object/apply:os.system>",
            "!<!A>",
            "!",
            "!::",
            "!a!b",
            "!A%42",
            "!1",
            "!" + "a" * 300,
        ],
    )
    @pytest.mark.parametrize("place", ["modifiers:\n- {}\n", "x: 1\n{} : 1\n", "x: 1\ny: [{} [ls]]\n", "\n{} {{}}\n"])
    def test_only_names(self, tag, place):
        error = failure(place.format(tag), "Only modifiers have a tag, as in `- !EpochRangeModifier`, got '!")
        assert error.line == 2

    @pytest.mark.parametrize(
        ("text", "message", "line"),
        [
            (with_value("!B {y: 1}"), "The tag '!B' is at a place that has no tags", 3),
            (with_value("[!B 1]"), "The tag '!B' is at a place that has no tags", 3),
            (with_value("{!B y: 1}"), "A key must be a name or a number without a tag, got 'y' tagged '!B'", 3),
            ("a: !B 1\n" + ONE, "The tag '!B' is at a place", 1),
            ("a: [!B 1]\n" + ONE, "The tag '!B' is at a place", 1),
            ("__metadata__: {a: !B 1}\n" + ONE, "The tag '!B' is at a place", 1),
            ("modifiers: !B [!A]\n", "'modifiers' must hold a list .* got a list tagged '!B'", 1),
            ("modifiers: !B {x: 1}\n", "'modifiers' must hold a list .* got a mapping", 1),
            ("stage: !B {modifiers: [!A]}\n", "'stage' is a mapping", 1),
            ("!B\nmodifiers: [!A]\n", "The recipe is a mapping tagged '!B'", 1),
            ("modifiers:\n  - !A\n    <<: !B {y: 1}\n", "What `<<` merges has no tag, got '!B'", 3),
            ("modifiers:\n  - &a !A {y: 1}\n  - !B\n    x: *a\n", "The tag '!A' is at a place", 2),
        ],
    )
    def test_only_on_modifiers(self, text, message, line):
        assert failure(text, message).line == line


class TestYaml:
    def test_anchors_aliases_and_merges(self):
        text = (
            "base: &list [x, y]\n"
            "modifiers:\n"
            "  - &a !A {p: 1, q: 2}\n"
            "  - &b !B {q: 3, r: 4}\n"
            "  - !C\n"
            "    <<: [*a, *b]\n"
            "    r: 5\n"
            "    names: *list\n"
            "  - !D {<<: *a, '<<': text}\n"
        )
        third, fourth = entries(text)[2:]
        assert third.fields == {"p": 1, "q": 2, "r": 5, "names": ["x", "y"]}
        assert third.lines == {"r": 7, "names": 8, "p": 3, "q": 3}
        assert fourth.fields == {"p": 1, "q": 2, "<<": "text"}

    def test_quoted_and_block_texts_stay_texts(self):
        text = (
            "modifiers:\n  - !A\n    a: '1'\n    b: \"true\"\n    c: |\n      1\n    d: >-\n      null\n    e: null\n"
        )
        assert fields(text) == {"a": "1", "b": "true", "c": "1\n", "d": "null", "e": None}

    def test_plain_scalars(self):
        text = with_value("[1e-5, 2:4, yes, off, 1_000, 0o17, 2024-01-02, .inf, ~, 010]")
        assert fields(text)["x"] == [1e-5, "2:4", "yes", "off", "1_000", 15, "2024-01-02", math.inf, None, 10]

    @pytest.mark.parametrize(
        ("text", "message", "line"),
        [
            (
                "modifiers:\n  - !A\n    x: 1\n    y: 2\n    x: 3\n",
                r"The key 'x' is there twice .* \(first on line 3\)",
                5,
            ),
            (with_value("{1: a, 1.0: b}"), "The key 1.0 is there twice", 3),
            (with_value("{a: 1, 'a': 2}"), "The key 'a' is there twice", 3),
            (with_value("{0.5: 1, eval(1/2): 2}"), "The key 0.5 is there twice", 3),
            ("modifiers: [!A]\nmodifiers: [!B]\n", "The key 'modifiers' is there twice", 2),
            ("a: &a {}\nmodifiers:\n  - !A\n    <<: *a\n    <<: *a\n", "`<<` is there twice", 5),
            (with_value("{<<: 3}"), "`<<` merges a mapping or a list of mappings, got 3", 3),
            (with_value("{<<: [[]]}"), "`<<` merges a mapping .* got a list", 3),
            (with_value("{[a]: 1}"), "A key must be a name or a number without a tag, got a list", 3),
            (with_value("{eval(y): 1}\ny: [1]"), r"A key must be a name .* 'eval\(y\)' gives a list", 3),
            (with_value("{" + "k" * 300 + ": 1}"), "A key may have up to 256 characters", 3),
            (with_value("*nope"), r"The alias \*nope has no anchor before it. Write &nope", 3),
            (with_value("&a [*a]"), r"The alias \*a stands within its own anchor", 3),
            (with_value("&a {b: {c: *a}}"), r"The alias \*a stands within its own anchor", 3),
            (ONE + "---\na: 1\n", "A second YAML document begins here", 4),
            (ONE + "...\n---\n" + ONE, "A second YAML document begins here", 5),
            ("modifiers:\n\t- !A\n", r"found character '\\t' .* Indent with spaces", 2),
            (with_value("a\0b"), r"The character U\+0000 may not be in a recipe", 3),
            (with_value("a\x1bb"), r"The character U\+001B may not be in a recipe", 3),
            (with_value("a\ud800b"), r"The character U\+D800 may not be in a recipe", 3),
            (with_value('"\\ud800"'), r"half of a character \(the lone surrogate U\+D800\)", 3),
            (with_value('"\\UFFFFFFFF"'), "an escape or a directive holds a number that is too large", 3),
            (with_value('"\\q"'), "This isn't YAML: .*unknown escape character 'q'", 3),
            (with_value("*"), "This isn't YAML: while scanning an alias", 3),
            (with_value("'open"), "This isn't YAML: while scanning a quoted scalar", 4),
            (with_value("a: b"), "mapping values are not allowed here. Quote a text that holds a colon", 3),
            (with_value("[1, 2"), "This isn't YAML: while parsing a flow sequence", 4),
            (with_value("@x"), "found character '@' .* Quote a text that begins with @", 3),
            ("%YAML 1." + "9" * 5000 + "\n---\n" + ONE, "a directive holds a number that is too large", 1),
            ("%YAML 3.0\n---\n" + ONE, "This isn't YAML: found incompatible YAML document", 1),
        ],
    )
    def test_what_is_refused(self, text, message, line):
        assert failure(text, message).line == line

    def test_yaml_directive(self):
        assert fields("%YAML 1.2\n---\n" + ONE) == {"x": 1}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[" * 100_000, "nested more than 32 levels"),
            ("{a: " * 50_000, "nested more than 32 levels"),
            ("- " * 100_000, "nested more than 32 levels"),
            ("? " * 100_000, "nested more than 32 levels"),
            (with_value("[" + "a, " * 12_000 + "]"), "more than 10000 values"),
            ("".join(f"k{i}: 1\n" for i in range(12_000)), "more than 10000 values"),
            (with_value("a" * 262_144), "may have up to 262144 bytes, got 262170"),
            (with_value("é" * 200_000), "may have up to 262144 bytes, got 400026"),
            (
                "a: &a {" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}\n" + "b: {<<: *a}\n" * 3,
                "more than 10000 values",
            ),
            (
                "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(40)),
                "nested more than 32 levels",
            ),
        ],
    )
    def test_bounds(self, text, message):
        start = time.perf_counter()
        failure(text, message)
        assert time.perf_counter() - start < 20.0

    def test_deepest_and_largest(self):
        # The levels above the list are: recipe, group, modifier.
        deep = fields(with_value("[" * 29 + "]" * 29))["x"]
        for _ in range(28):
            (deep,) = deep
        assert deep == []
        assert len(fields(with_value("[" + "a, " * 9_000 + "]"))["x"]) == 9_000

    @pytest.mark.parametrize("pattern", ["[{}]", "{{{}}}"])
    def test_billion_laughs(self, pattern):
        parts = ["a0: &a0 [lol]"]
        for i in range(30):
            parts.append(f"a{i + 1}: &a{i + 1} " + pattern.format(", ".join(
                f"*a{i}" if pattern == "[{}]" else f"k{j}: *a{i}" for j in range(9)
            )))  # fmt: skip
        text = "\n".join([*parts, ONE])
        tracemalloc.start()
        start = time.perf_counter()
        try:
            failure(text, "more than 10000 values, counted with every alias and variable written out")
            taken, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken < 2.0
        assert peak < 20e6


class TestStructure:
    def test_a_scalar_is_a_variable_whatever_its_key(self):
        (entry,) = entries("most_modifiers: 3\nmodifiers:\n  - !A\n    x: eval(most_modifiers + 1)\n")
        assert entry.fields == {"x": 4}

    @pytest.mark.parametrize(
        ("text", "message", "line"),
        [
            ("", "The recipe is empty. A recipe is a mapping of groups", None),
            ("# only a comment\n", "The recipe is empty", None),
            ("---\n---\n", "The recipe is empty", None),
            ("null", "The recipe is empty", None),
            ("just a text", "The recipe is 'just a text'. .* In Markdown, it stands between two lines", 1),
            ("# Title\n\nSome Markdown.\n", "The recipe is 'Some Markdown.'", 3),
            ("- !A {x: 1}\n", "The recipe is a list", 1),
            ("a: 1\nb: [2]\n", "The recipe has no modifier: its keys are a, b", None),
            ("modifiers: []\nb_modifiers:\n", "The recipe has no modifier: its keys are modifiers, b_modifiers", None),
            ("s: {modifiers: []}\n", "The recipe has no modifier: its keys are s", None),
            ("a: {b: 1}\n" + ONE, "'a' is a mapping in the recipe, but no group of modifiers is in it", 1),
            ("s: {modifiers: [!A], a: {b: 1}}\n", "'a' is a mapping in the stage 's', but no group", 1),
            ("s: {modifiers: [!A], t: {modifiers: [!B]}}\n", "'t' is a mapping in the stage 's'", 1),
            (ONE + "s: {modifiers: [!A]}\n", r"has stages \(s\) and groups outside of them \(modifiers\)", 4),
            ("modifiers: {A: {x: 1}}\n", "'modifiers' must hold a list of modifiers, .* got a mapping", 1),
            ("modifiers: 3\n", "The recipe has no modifier: its keys are modifiers", None),
            ("1: 2\n" + ONE, "The name of a group, variable or stage must be a text, got 1", 1),
            ("'': 2\n" + ONE, "must be a text, got ''", 1),
        ],
    )
    def test_what_is_refused(self, text, message, line):
        assert failure(text, message).line == line

    def test_groups_and_variables(self):
        text = "a_modifiers: [!A]\nempty_modifiers: []\nnone_modifiers:\nlist: [1]\nmodifiers_b: [!B, !C]\n"
        assert [(e.tag, e.group, e.path) for e in entries(text)] == [
            ("A", "a_modifiers", "a_modifiers[0]"),
            ("B", "modifiers_b", "modifiers_b[0]"),
            ("C", "modifiers_b", "modifiers_b[1]"),
        ]
        assert read_outline(text).stages[0].name == ""

    def test_metadata_is_ignored(self):
        text = "__metadata__: {a: {b: eval(nope)}}\nrecipe_metadata:\n  c: 1\n" + ONE
        assert fields(text) == {"x": 1}

    def test_a_stage_may_be_empty(self):
        outline = read_outline("first: {modifiers: []}\nsecond: {modifiers: [!A]}\n")
        assert [(stage.name, len(stage.entries)) for stage in outline.stages] == [("first", 0), ("second", 1)]


MARKDOWN_RECIPE = "---\nmodifiers:\n- !EpochRangeModifier {end_epoch: 3}\n---\n"


@pytest.mark.parametrize(
    "rest",
    [
        "finetune:\n  training_modifiers:\n  - !SetLearningRateModifier {learning_rate: 0.1}\n",
        "other_modifiers: [ !EpochRangeModifier {end_epoch: 9} ]\n",
        "Text.\n- !EpochRangeModifier\n",
    ],
)
def test_nothing_of_a_recipe_is_lost_after_the_front_matter(rest):
    with pytest.raises(RecipeError, match="stands after the line '---' that ends the recipe"):
        load_recipe(MARKDOWN_RECIPE + rest)
    assert load_recipe(MARKDOWN_RECIPE + "```\n" + rest + "```\n").epochs == 3
    assert load_recipe(MARKDOWN_RECIPE + "About modifiers: they prune.\n").epochs == 3


def test_json_as_other_programs_write_it(tmp_path):
    path = tmp_path / "r.json"
    plain = {"note\U0001f600": "a\\tb\U0001f600", "modifiers": [{"EpochRangeModifier": {"end_epoch": 3}}]}
    path.write_text(json.dumps(plain, indent="\t"))
    assert load_recipe(path).epochs == 3
    path.write_text(json.dumps(plain | {"half": "\ud83d"}))
    with pytest.raises(RecipeError, match="half of a character"):
        load_recipe(path)


class TestSource:
    @pytest.mark.parametrize("ending", ["yaml", "yml", "YAML", "md"])
    def test_files(self, tmp_path, ending):
        path = tmp_path / f"recipe.{ending}"
        path.write_text(f"---\n{ONE}---\n")
        for source in (path, str(path)):
            outline = read_outline(source)
            assert outline.source == f"recipe.{ending}"
            assert (outline.stages[0].entries[0].line, outline.stages[0].entries[0].lines) == (3, {"x": 4})

    def test_text(self):
        assert read_outline(ONE).source == "recipe"
        assert fields("{modifiers: [!A {x: 1}]}") == {"x": 1}

    @pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: t.replace("\n", "\r"),
                                        lambda t: "\ufeff" + t, lambda t: t.replace("---\n", "---  \t\n")])  # fmt: skip
    @pytest.mark.parametrize(
        "head", ["", "# Comment\n# -----\n\n", "<!--\nLicense\n---\n-->\n", "<!-- a -->\n# b\n<!-- c\n-->\n"]
    )
    def test_front_matter(self, tmp_path, head, change):
        text = change(f"{head}---\n# -----\n{ONE}# --- x\n---\n# Title\n\n---\n\n```yaml\nmodifiers:\n```\n")
        path = tmp_path / "card.md"
        path.write_bytes(text.encode())
        for source in (text, path):
            (entry,) = entries(source)
            assert entry.fields == {"x": 1}
            assert entry.line == head.count("\n") + 4

    def test_comment_line_of_dashes(self):
        text = "# head\n# -----\na: 1\n# ---\n" + ONE + "# ------\nb_modifiers: [!B]\n"
        assert [entry.tag for entry in entries(text)] == ["A", "B"]

    def test_a_line_of_dashes_within_a_text(self):
        assert fields("---\nmodifiers:\n  - !A\n    x: |\n      ---\n---\n") == {"x": "---\n"}

    @pytest.mark.parametrize(
        ("text", "message", "line"),
        [
            ("# Title\n\nText.\n", "two lines that are exactly '---', but it begins with 'Text.'", 3),
            ("Text\n---\n" + ONE + "---\n", "but it begins with 'Text'. Only comments may stand before", 1),
            ("# a\n---\n" + ONE, "but its front matter isn't closed", 2),
            ("----\n" + ONE + "----\n", "but it begins with '----'", 1),
            ("", "but it is empty", 1),
            ("# Title\n", "but it is empty", 1),
            ("---\n" + ONE + "---\nb_modifiers:\n  - !B\n", "'b_modifiers:' stands after the line '---' that ends", 6),
        ],
    )
    def test_markdown_without_front_matter(self, tmp_path, text, message, line):
        path = tmp_path / "card.md"
        path.write_text(text)
        error = failure(path, message)
        assert (error.line, error.source) == (line, "card.md")

    def test_second_document_in_a_file(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(f"---\n{ONE}---\nb: 1\n")
        error = failure(path, "A second YAML document begins here")
        assert str(error).startswith("a.yaml, line 5: A second")

    def test_files_that_cannot_be_read(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert failure("nothing.yaml", "The file 'nothing.yaml' isn't found").source == "nothing.yaml"
        assert failure(Path("no") / "nothing.md", "isn't found").source == "nothing.md"
        (tmp_path / "folder.yaml").mkdir()
        failure("folder.yaml", "A recipe must be a file, but 'folder.yaml' is a folder")
        failure(tmp_path, "is a folder")
        (tmp_path / "recipe.txt").write_text("{}")
        failure("recipe.txt", r"A recipe's file ends in .yaml, .yml, .md, .json, got 'recipe.txt'")
        (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
        assert failure("latin.yaml", "The file isn't UTF-8 text .* Save it as UTF-8").line == 2
        (tmp_path / "large.yaml").write_bytes(b"#" * 300_000)
        failure("large.yaml", "up to 262144 bytes, got 300000")
        os.mkfifo(tmp_path / "pipe.yaml")
        failure("pipe.yaml", "'pipe.yaml' is no ordinary file")
        failure(Path("nul\0l.yaml"), "can't be read: embedded null byte")
        failure("x" * 5000 + ".yaml", "can't be read: .*File name too long")

    @pytest.mark.parametrize("source", [None, 3, b"modifiers: [!A]", ["modifiers"], object()])
    def test_other_things(self, source):
        failure(source, f"recipe: A recipe is a path, the text itself or a mapping, got {type(source).__name__}")

    def test_path_of_bytes(self):
        class BytesPath(os.PathLike):
            def __fspath__(self):
                return b"a.yaml"

        failure(BytesPath(), "A path must be a text, got bytes")


class TestMappings:
    def test_values(self):
        source = MappingProxyType({
            "epochs": np.float32(0.5),
            "n": np.int64(3),
            "pruning_modifiers": [
                {"MFACPruningModifier": {"x": ("a", "b"), "y": {"eval(n)": "eval(epochs * n)"}, "z": np.bool_(True)}},
                {"EpochRangeModifier": None},
            ],
        })  # fmt: skip
        first, second = entries(source)
        assert first.fields == {"x": ["a", "b"], "y": {3: 1.5}, "z": True}
        assert type(first.fields["z"]) is bool
        assert first.lines == {"x": None, "y": None, "y.3": None, "z": None}
        assert (first.tag, first.line, first.path) == ("MFACPruningModifier", None, "pruning_modifiers[0]")
        assert (second.tag, second.fields) == ("EpochRangeModifier", {})
        assert read_outline(source, {"n": 4}).stages[0].entries[0].fields["y"] == {4: 2.0}

    def test_stages(self):
        outline = read_outline({"b": {"modifiers": [{"A": {}}]}, "a": {"modifiers": [{"A": {}}]}})
        assert [(stage.name, stage.entries[0].path) for stage in outline.stages] == [
            ("b", "b/modifiers[0]"),
            ("a", "a/modifiers[0]"),
        ]
        assert outline.source == "recipe"

    def test_the_mapping_is_left_as_it_is(self):
        source = {"a": 1, "modifiers": [{"A": {"x": ["eval(a)"], "y": {"z": [1]}}}]}
        found = fields(source)
        found["y"]["z"].append(2)
        assert source == {"a": 1, "modifiers": [{"A": {"x": ["eval(a)"], "y": {"z": [1]}}}]}

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (object(), r"modifiers\[0\].A.x: A recipe holds plain data .*, got builtins.object"),
            ({1, 2}, "got builtins.set"),
            (b"a", "got builtins.bytes"),
            (1j, "got builtins.complex"),
            (np.zeros(2), "got numpy.ndarray"),
            ([0, {"b": open}], r"modifiers\[0\].A.x\[1\].b: .* got builtins.builtin_function_or_method"),
            ({("a", "b"): 1}, r"a key of modifiers\[0\].A.x: .* got builtins.tuple"),
            (1 << 5000, "A number may have up to 1024 bits, got an integer of 5001 bits"),
            ("\udc80", "half of a character"),
            ({1: "a", "1": "b", 0.5: None}, None),
            ({"a": 1, np.str_("b"): 2}, None),
            (["x"] * 12_000, "more than 10000 values"),
            ("eval(nope)", r"modifiers\[0\]\.x: The variable 'nope' is unknown"),
            ({"y": "eval(1 / 0)"}, r"modifiers\[0\]\.x\.y: eval\(1 / 0\) can't be computed"),
        ],
    )
    def test_plain_data(self, value, message):
        source = {"modifiers": [{"A": {"x": value}}]}
        if message is None:
            assert fields(source)["x"] == value
        else:
            assert failure(source, message).line is None

    def test_structure(self):
        failure({}, "The recipe has no modifier: its keys are none")
        failure({"modifiers": [3]}, r"recipe, modifiers\[0\]: Each item of 'modifiers' is a modifier")
        failure({"s": {"modifiers": [{"A": [1]}]}}, r"recipe, s/modifiers\[0\]: .* is a mapping with the keys A")
        failure({"modifiers": [{"A": {1: 2}}]}, r"The name of a field must be a text, got 1 in modifiers\[0\]")

    def test_within_itself(self):
        inner: dict = {}
        inner["y"] = [inner]
        failure({"modifiers": [{"A": {"x": inner}}]}, "A list or mapping holds itself")
        wide: list = []
        wide.extend([wide] * 10)
        failure({"modifiers": wide}, r"recipe, modifiers\[0\]: A list or mapping holds itself")

    def test_bounds(self):
        deep: list = []
        for _ in range(10_000):
            deep = [deep]
        failure({"modifiers": deep}, "nested more than 32 levels")
        laughs: list = ["x"]
        for _ in range(40):
            laughs = [laughs] * 9
        failure({"modifiers": laughs}, "nested more than 32 levels")
        failure({"a": dict.fromkeys(range(20_000))}, "more than 10000 values")


class TestError:
    def test_parts(self):
        assert str(RecipeError("Wrong.")) == "Wrong."
        assert str(RecipeError("Wrong.", line=3)) == "line 3: Wrong."
        error = RecipeError("Wrong.", line=12, field="end_epoch", source="recipe.yaml")
        assert str(error) == "recipe.yaml, line 12, end_epoch: Wrong."
        assert isinstance(error, ValueError)
        assert (error.message, error.line, error.field, error.source) == ("Wrong.", 12, "end_epoch", "recipe.yaml")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)

    def test_messages_stay_short(self):
        for text in ("a" * 100_000, with_value("*" + "a" * 100_000), "".join(f"k{i}: 1\n" for i in range(4000))):
            assert len(str(failure(text, "recipe"))) < 1000


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(SEEDS) - 1), st.integers(0, 2**32))
def test_damaged_recipes_are_read_or_refused(which, seed):
    text = mutate(random.Random(seed), SEEDS[which])
    try:
        assert isinstance(read_outline(text), Outline)
    except RecipeError as error:
        assert str(error).startswith("recipe")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_value_is_read_or_refused(text):
    for source in (text, with_value(text), with_value(f"eval({text})"), {"modifiers": [{"A": {text: text}}]}):
        with contextlib.suppress(RecipeError):
            assert isinstance(read_outline(source), Outline)
