import re
import time

import pytest

from keras_woodfisher.options.patterns import check_pattern, matches_pattern

pytestmark = pytest.mark.once

NAMES = [
    "block_12/attention/self/query/kernel",
    "block_12.attention.self.query.weight",
    "sections.1.0.conv.weight",
    "Dense/bias",
    "",
]
ORDINARY = [
    "",
    "block",
    "attention",
    r".*attention.*(query|key)\.weight$",
    r"sections\.[0-3]\.\d+\.conv",
    r"(?!.*bias).*",
    r".*(?<=self/)query",
    r"block_(\d)\d*.*\1",
    r"(?i)dense/BIAS",
    r"\w+_1{1,2}2/",
    r"[^/]*/[^/]*$",
    r".*?kernel\b",
    r"(?:.{0,99}x){3,99}",
]

HOSTILE = [
    "(.+)+[XYZ]",
    "(a|(b*c){2,})*",
    ".*" * 7 + "[XYZ]",
    "(?=(.*)*)[XYZ]",
    "(.|[^!])*[XYZ]",
    "(?:.{0,19}){0,19}[XYZ]",
    "(?:.{1,3}){1,60}[XYZ]",
    ".{0,9}" * 6 + "[XYZ]",
    r"(?:(.)\1?|..|.)*[XYZ]",
    "(a+)+$",
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_match_as_in_python(pattern):
    check_pattern("re:" + pattern)
    for name in NAMES:
        assert matches_pattern("re:" + pattern, name) is (re.match(pattern, name) is not None)
        for start in range(len(name)):
            found = matches_pattern("re:" + pattern, name, start, ignore_case=True)
            assert found is (re.compile(pattern, re.IGNORECASE).match(name, start) is not None)


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("repeated", [1, 5])
def test_no_pattern_takes_long(pattern, repeated):
    check_pattern("re:" + pattern)
    name = "a" * 30 + NAMES[0] * repeated
    start = time.perf_counter()
    try:
        assert matches_pattern("re:" + pattern, name) is (pattern == HOSTILE[1])
    except ValueError as error:
        assert f"The pattern {f're:{pattern}'[:60]!r} takes too long to match on {name[:60]!r}" in str(error)
    assert time.perf_counter() - start < 20.0


def test_a_pattern_that_takes_too_long_is_stopped():
    with pytest.raises(ValueError, match=r"'re:\(\.\|\[\^!\]\)\*\[XYZ\]' takes too long to match on 'block_12/"):
        matches_pattern("re:(.|[^!])*[XYZ]", NAMES[0])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "The pattern 're:\\(' in params isn't a regular expression: missing \\)"),
        ("(" * 1900 + ")" * 1900, "isn't a regular expression: maximum recursion depth"),
        ("a{99999999999999999999}", "repeats too often"),
        ("a{99999999}", "repeats too often: its counts in braces may be up to 1000"),
        ("(?:" * 4 + "a" + "{100})" * 4, "repeats too often"),
        ("b{0}(?:a{500}){500}", "repeats too often"),
        ("(?x)a{ 999999999 }", "in params has the flag x, which isn't supported"),
        ("(?i:(?sx:a))", "has the flag x"),
        ("a" * 5000, "in params has 5000 characters, of 4000 allowed. List the names"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_pattern("re:" + pattern, " in params")
    assert len(str(caught.value)) < 400


def test_names_are_no_patterns():
    check_pattern("a(b{99999999}")
