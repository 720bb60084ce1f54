import math
import time

import pytest

from keras_woodfisher.recipe.syntax.errors import RecipeError
from keras_woodfisher.recipe.syntax.outline import read_outline
from keras_woodfisher.recipe.syntax.yaml_tree import scalar_value


def value_of(expression, variables="", **overrides):
    """What a field that says `eval(expression)` holds."""
    text = f"{variables}\nmodifiers:\n  - !A\n    x: eval({expression})\n"
    return read_outline(text, overrides or None).stages[0].entries[0].fields["x"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("7 / 2", 3.5),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("7 % 4", 3),
        ("2 ** 10", 1024),
        ("2 ** -1", 0.5),
        ("-2 ** 2", -4),
        ("+3", 3),
        ("--3", 3),
        ("1e-5 * 2", 2e-5),
        ("0x10", 16),
        ("abs(-2.5)", 2.5),
        ("float(2)", 2.0),
        ("int(2.9)", 2),
        ("int(-2.9)", -2),
        ("max(1, 2.5, 2)", 2.5),
        ("min(3, 1)", 1),
        ("round(2.567, 1)", 2.6),
        ("round(1234, -2)", 1200),
        ("round(2.5)", 2),
        ("10 ** 250", 10**250),
        (" 1 +\n      2 ", 3),
    ],
)
def test_arithmetic(expression, expected):
    value = value_of(expression)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("variables", "expression", "expected"),
    [
        ("a: 3\nb: 0.5", "a * b", 1.5),
        ("a: eval(b + 1)\nb: eval(c * 2)\nc: 4", "a", 9),
        ("names: [x/kernel, y/kernel]", "names", ["x/kernel", "y/kernel"]),
        ("name: __ALL__", "name", "__ALL__"),
        ("name: __ALL__", "(name)", "__ALL__"),
        ("switch: false", "switch", False),
        ("nothing: null", "nothing", None),
        ("limit: .inf", "limit", math.inf),
        ("a: 2\nlist: [eval(a), [eval(a * a)], {eval(a): eval(name)}]\nname: n", "list", [2, [4], {2: "n"}]),
        ("max: 3", "max(max, 2)", 3),
        ('a: "eval(1 + 1)"', "a", 2),
        ("epoch_π: 3", "epoch_π + 1", 4),
    ],
)
def test_variables(variables, expression, expected):
    assert value_of(expression, variables) == expected


@pytest.mark.parametrize("text", ["$a", "{a}", "${a}", "1 + eval(a)", "eval (a)", "Eval(a)", "eval(a) + 1", "a"])
def test_nothing_else_is_substituted(text):
    outline = read_outline(f"a: 1\nmodifiers:\n  - !A\n    x: '{text}'\n")
    assert outline.stages[0].entries[0].fields["x"] == text


def test_expressions_at_any_depth_and_in_keys():
    items = "    x:\n      - {eval(a / 2): [eval(a), 'eval(a * 4)']}\n    eval(name): 1\n"
    text = f"a: 0.5\nmodifiers:\n  - !A\n{items}name: y\n"
    assert read_outline(text).stages[0].entries[0].fields == {"x": [{0.25: [0.5, 2.0]}], "y": 1}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 +", r"eval\(1 \+\) isn't an expression: invalid syntax.* Allowed are numbers, variables, \+ -"),
        ("", r"eval\(\) isn't an expression"),
        ("1 2", r"isn't an expression"),
        ("a.real", r"holds an attribute \(a dot between names\)\. Allowed are"),
        ("a[0]", r"holds the character '\['"),
        ("'x'", "holds the character"),
        ("a == 1", "holds the character '='"),
        ("a | 1", r"holds the character '\|'"),
        ("(1, 2)", r"holds a tuple \(a comma between values\)"),
        ("1 if a else 2", r"a Python construct \(IfExp\)"),
        ("lambda a", "isn't an expression"),
        ("not a", "holds the operator Not"),
        ("a and a", "BoolOp"),
        ("True + 1", "holds the value True"),
        ("None", "holds the value None"),
        ("3j", "holds the value 3j"),
        ("open(a)", "holds a call of 'open'"),
        ("eval(a)", "holds a call of 'eval'"),
        ("a.b(1)", "holds a call of an attribute"),
        ("abs(*a)", "a named or starred argument of abs"),
        ("abs()", r"abs\(\) takes 1 argument\(s\), got 0"),
        ("max(1)", r"max\(\) takes 2 or more argument\(s\), got 1"),
        ("round(1, 2, 3)", r"round\(\) takes 1 or 2 argument\(s\), got 3"),
        ("round(1, -99999999)", r"from -300 to 300, got -99999999"),
        ("round(1, 2.0)", r"a whole number of digits .* got 2\.0"),
        ("1 / 0", r"eval\(1 / 0\) can't be computed: it divides by zero"),
        ("1 % 0", "divides by zero"),
        ("0 ** -1", "divides by zero"),
        ("9 ** 9 ** 9 ** 9", "a value is infinite or too large"),
        ("2 ** 1025", "a value is infinite or too large"),
        ("10 ** 200 * 10 ** 200", "a value is infinite or too large"),
        ("1e200 * 1e200", "a value is infinite or too large"),
        ("1e200 ** 2", "a value is infinite or too large"),
        ("1e999", "holds a number that is too large"),
        ("9" * 400, "holds a number that is too large"),
        ("(-1) ** 0.5", "a fractional power of a negative number isn't a real number"),
        ("limit - limit", "a value is infinite or too large"),
        ("wrong + 1", r"a value is not a number \(NaN\)"),
        ("a + switch", "Arithmetic needs numbers, but the variable 'switch' is True"),
        ("names + 1", r"the variable 'names' is \[.*\]\. A text or list can only be given as a whole"),
        ("-text", "the variable 'text' is 'abc'"),
        ("aa", "The variable 'aa' is unknown. Did you mean 'a'. Known names: a, limit, names, switch, text, wrong"),
        ("aa + 1", "The variable 'aa' is unknown. Did you mean 'a'"),
        ("zzz", "The variable 'zzz' is unknown. Known names: a, limit"),
        ("1" + " + 1" * 300, "may have up to 1000 characters, got 1201"),
        ("1" + " + 1" * 60, "has more than 50 levels"),
        ("-" * 400 + "1", "has more than 50 levels"),
        ("(" * 400 + "1" + ")" * 400, "isn't an expression: too many nested parentheses|is nested too deeply"),
        ("a) + eval(a", r"eval\(a\) \+ eval\(a\) isn't an expression: unmatched"),
    ],
)
def test_what_is_refused(expression, message):
    variables = "a: 1\nlimit: .inf\nnames: [x]\nswitch: true\ntext: abc\nwrong: .nan\n"
    text = f"{variables}modifiers:\n  - !A\n    x:\n      - y: >-\n          eval({expression})\n"
    start = time.perf_counter()
    with pytest.raises(RecipeError, match=message) as caught:
        read_outline(text)
    assert time.perf_counter() - start < 20.0
    assert (caught.value.line, caught.value.field) == (10, "x.y")


def test_null_character_is_refused():
    with pytest.raises(RecipeError, match="holds the character"):
        read_outline({"modifiers": [{"A": {"x": "eval(1\0)"}}]})


def test_cycle():
    with pytest.raises(RecipeError, match=r"in a circle: 'a' -> 'b' -> 'c' -> 'a'. Give one") as caught:
        read_outline("a: eval(b)\nb: [eval(c + 1)]\nc: eval(a)\nmodifiers: [!A]\n")
    assert (caught.value.line, caught.value.field) == (1, "a")
    with pytest.raises(RecipeError, match="in a circle: 'a' -> 'a'"):
        read_outline("a: eval(a + 1)\nmodifiers: [!A]\n")


def test_error_names_the_variable():
    with pytest.raises(RecipeError, match="unknown") as caught:
        read_outline("a: 1\nb: eval(c)\nmodifiers: [!A]\n")
    assert (caught.value.line, caught.value.field) == (2, "b")
    assert str(caught.value).startswith("recipe, line 2, b: The variable 'c' is unknown.")


def test_long_chain_of_variables():
    chain = "".join(f"v{i}: eval(v{i + 1} + 1)\n" for i in range(1500))
    assert value_of("v0", chain + "v1500: 0") == 1500


def test_lists_of_lists_through_variables_are_bounded():
    doubled = "v0: [x]\n" + "".join(f"v{i + 1}: [eval(v{i}), eval(v{i})]\n" for i in range(25))
    with pytest.raises(RecipeError, match="more than 10000 values"):
        value_of("v25", doubled)
    nested = "v0: [x]\n" + "".join(f"v{i + 1}: [eval(v{i})]\n" for i in range(40))
    with pytest.raises(RecipeError, match="nested more than 32 levels"):
        value_of("v40", nested)


def test_a_long_list_in_many_modifiers_is_bounded():
    text = f"names: [{'n, ' * 4000}]\nmodifiers:\n" + "  - !A {params: eval(names)}\n" * 3
    with pytest.raises(RecipeError, match="more than 10000 values") as caught:
        read_outline(text)
    assert caught.value.line == 5


def test_expressions_together_are_bounded():
    text = "modifiers:\n  - !A\n" + "".join(f"    x{i}: eval({i}{' + 1' * 40})\n" for i in range(1000))
    with pytest.raises(RecipeError, match="up to 50000 characters together"):
        read_outline(text)


def test_values_are_not_shared():
    text = "names: [a]\nmodifiers:\n  - !A {x: eval(names), y: eval(names)}\n"
    fields = read_outline(text).stages[0].entries[0].fields
    fields["x"].append("b")
    assert fields["y"] == ["a"]


class TestOverrides:
    def test_values(self):
        text = "a: 1\nb: eval(a * 2)\nc: [x]\nmodifiers:\n  - !A {a: eval(a), b: eval(b), c: eval(c)}\n"
        fields = read_outline(text, {"a": 5, "c": ("y", "z")}).stages[0].entries[0].fields
        assert fields == {"a": 5, "b": 10, "c": ["y", "z"]}

    def test_expression_and_plain_text(self):
        assert value_of("a", "a: 1\nb: 3", a="eval(b + 1)") == 4
        assert value_of("a", "a: 1\nb: 3", a="1e-5") == "1e-5"

    def test_stages(self):
        text = "a: 1\ns: {a: 2, modifiers: [!A {x: eval(a)}]}\nt: {b: 3, modifiers: [!A {x: eval(a + b)}]}\n"
        values = [s.entries[0].fields["x"] for s in read_outline(text).stages]
        assert values == [2, 4]
        values = [s.entries[0].fields["x"] for s in read_outline(text, {"a": 10, "b": 20}).stages]
        assert values == [10, 30]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"epoch": 1}, r"no variable 'epoch' to override. Did you mean 'epochs'\? Known names: epochs, rate"),
            (
                {"epochs": {"a": 1}},
                "variables.epochs: The override of 'epochs' must be a scalar or a list, got a mapping",
            ),
            ({"epochs": {1}}, r"variables.epochs: A recipe holds plain data .*, got builtins.set"),
            ({"epochs": [object()]}, r"variables.epochs\[0\]: .*, got builtins.object"),
            ({1: 1}, "variables must have texts as names, got int"),
            ([1], "variables must be a mapping of names and values, got list"),
            ({"epochs": "eval(rat)"}, "variable 'rat' is unknown. Did you mean 'rate'"),
            ({"modifiers": []}, "no variable 'modifiers'"),
        ],
    )
    def test_what_is_refused(self, overrides, message):
        with pytest.raises(RecipeError, match=message):
            read_outline("epochs: 1\nrate: 2\nmodifiers: [!A]\n", overrides)

    def test_without_variables(self):
        with pytest.raises(RecipeError, match=r"no variable 'a' to override. Known names: none"):
            read_outline("modifiers: [!A]\n", {"a": 1})


def test_variables_of_a_stage_shadow_only_there():
    text = (
        "a: 1\ntotal: eval(a * 100)\n"
        "s: {a: 2, c: eval(total), modifiers: [!A {x: eval(a), y: eval(c)}]}\n"
        "t: {modifiers: [!A {x: eval(a)}]}\n"
    )
    first, second = (stage.entries[0].fields for stage in read_outline(text).stages)
    assert first == {"x": 2, "y": 100}
    assert second == {"x": 1}
    with pytest.raises(RecipeError, match="The variable 'c' is unknown"):
        read_outline(text.replace("x: eval(a)}]}\n", "x: eval(c)}]}\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("4e-4", 4e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e+3", -500.0),
        ("+1", 1),
        ("-12", -12),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("NULL", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("+.Inf", math.inf),
        *(
            (text, text)
            for text in (
                "2:4",
                "1:30:00",
                "yes",
                "No",
                "on",
                "OFF",
                "2024-01-02",
                "1_000",
                "1_0.5",
                "0b11",
                "-0x1",
                "e5",
                ".",
                "1.2.3",
                "-",
                "+",
                "tRue",
                "inf",
                "nan",
                "1e",
                "\uff11\uff12",
                "=",
            )
        ),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, expected):
    value = scalar_value(text)
    assert value == expected
    assert type(value) is type(expected)


def test_not_a_number():
    assert math.isnan(scalar_value(".nan"))
    assert math.isnan(scalar_value(".NaN"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1" * 10_000, r"may have up to 100 characters, got '1{60}'\.\.\. \(10000 characters\)"),
        ("0." + "1" * 200, "may have up to 100 characters"),
        ("0x" + "f" * 200, "may have up to 100 characters"),
        ("1e400", "The number 1e400 is too large for a float. Infinity is written .inf"),
    ],
)
def test_bounds_of_numbers(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        read_outline(f"modifiers:\n  - !A\n    x: {text}\n")
    assert caught.value.line == 3
