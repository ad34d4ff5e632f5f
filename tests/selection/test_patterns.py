"""Patterns of names match as in PEFT, regular expressions as in `re`, however many there are and whatever they are."""

import itertools
import re
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lightning_qlora.selection import patterns
from lightning_qlora.selection.patterns import Patterns

NAMES = ["model.layers.0.self_attn.q_proj", "layers.11.mlp.up_proj", "q_proj", "a.b.c", "aaa", "", "x.q_proj.y", "é-1"]
USUAL = [
    "q_proj",
    "^q_proj$",
    r"^model\.layers\.0\.self_attn\.q_proj",
    r".*\.layers\.\d+\..*",
    r"layers\.(0|11)\..*",
    r"layers.[0-9]+.mlp.(?:up|down)_proj",
    "q_proj|c",
    r"[^.]*",
    r"\w+\.\W?",
    r"\D+",
    "a{2,3}",
    "a{2}",
    "(a*)*",
    "()*",
    "(a|aa)+",
    "(a?){50}",
    "",
    "^",
    "x$",
    "a??a",
    "[a-c.]{3,}",
    "é.1",
    "[^q]+",
    "a.b",
    r"a\.b\.c",
    r"é\-1",
    *("^" + re.escape(name) for name in NAMES),
]


@pytest.mark.parametrize("pattern", USUAL)
def test_keys_match_as_in_peft(pattern):
    for name in NAMES:
        assert Patterns({pattern: 1}).match([name]) == (get_pattern_key([pattern], name) == pattern)


def test_the_first_key_that_matches_counts_as_in_peft():
    """Of all keys together, in both orders."""
    for keys in (USUAL, USUAL[::-1]):
        values = {key: number for number, key in enumerate(keys)}
        for name in NAMES:
            expected = get_pattern_key(keys, name)
            assert Patterns(values).value([name], None) == values.get(expected)
    assert Patterns({"b": 1, "a": 2}).value(["a", "b"], 3) == 1
    assert Patterns(None).value(["a"], 3) == Patterns({"b": 1}).value(["a"], 3) == 3


@pytest.mark.parametrize(
    ("patterns", "matching", "others"),
    [
        (["q_proj"], ["model.layers.0.q_proj", "q_proj"], ["model.layers.0.seq_proj", "q_proj.base", ""]),
        (["0.q_proj", "x"], ["layers.0.q_proj", "x"], ["layers.10.q_proj", "q_proj"]),
        (["a.b"], ["a.b", "x.a.b"], ["a-b"]),  # no expression
        (r".*\.q_proj", ["model.layers.0.q_proj"], ["q_proj"]),
        ("q_proj.", [], ["model.layers.0.q_proj", "q_proj"]),
        (r"model\.layers\.\d+\.q_proj", ["model.layers.0.q_proj"], ["net.model.layers.0.q_proj"]),
        (None, [], ["", "q_proj"]),
        ([], [], ["", "q_proj"]),
    ],
)
def test_a_list_has_name_endings_and_a_text_is_an_expression_for_the_whole_name(patterns, matching, others):
    for name in (*matching, *others):
        assert Patterns(patterns).match([name]) == Patterns(patterns).match(["none", name]) == (name in matching)


@pytest.mark.parametrize("patterns", [["vision", "b.c"], r"vision|.*\.vision|b\.c|.*\.b\.c"])
def test_the_name_of_a_module_around_a_layer_matches_for_the_layer(patterns):
    for name in ("vision.layers.0.up", "model.vision.up", "vision", "b.c", "a.b.c.d"):
        assert Patterns(patterns).match_outer([name])
    for name in ("", "visions.up", "b", "a.c.b"):
        assert not Patterns(patterns).match_outer([name])
    assert not Patterns("").match_outer(["a.b"])


LAYERS = [f"model.layers.{n}.{part}_proj" for n in range(12) for part in ("self_attn.q", "self_attn.v", "mlp.up")]
HONEST = (
    r".*q_proj", r"(.*\.)?(.*q_proj)$", r".*layers.*self.*(q|v)_proj", r"(?:\w+\.)*(q|v)_proj",
    r"(?i)MODEL\..*UP_PROJ",
    r"^(?!.*self).*up_proj", r"model\.layers\.(?:[0-4]|1[01])\.mlp\.up_proj", r"(.+)\.(\w+)\.[qv]_proj\b",
    r".*(?<=q)_proj",
    r"(?:model|layers|\d+|self_attn|mlp|\.)+q_proj", r"(?s:.){5,40}_proj", r"(\w+)\.layers\.(\d)\.\w+\.(?:q|v)_proj",
)  # fmt: skip
OPENINGS = ("(", "(?:", "(?i:", "(?-i:", "(?=", "(?!")
ATOMS = (
    *("a", "b", ".", "[ab]", r"\w", r"\.", "[^a]", r"\d", "A"),
    *("^", "$", r"\b", r"\B", r"\A", r"\Z", "(?<=a)", "(?<!b)", "(?!)"),
)
REPEATS = ("", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}")
# `re` would take years for most of these; none matches a name below, but those of MATCHING.
HOSTILE = (
    "(a+)+b", "([a-z]|[a-z]+)+!", "(.*)*b", "(?:a?){30}a{30}b", "a?" * 40 + "a" * 40 + "b", ".*" * 30 + "b",
    "(" * 30 + "a*" + ")*" * 30 + "b", "(?=(a+)+b)" * 9, "(a{1,1000}){1,1000}b", "(" + "|".join(["a"] * 50) + ")*b",
    "(?:a{2}|a{3}|a{5}){0,99999}b", "(a*)*(a*)*(a*)*b", r"(\w*\w*)*-", "(?:(?!b)a+)*b", "((a{0,9}){0,9}){0,9}b",
    "(?i:.*)" * 500 + "!", "(?=.*" * 20 + "x" + ")" * 20, r"(\w|.|[a-z]|\S)*!|" * 30 + "x", "(?:$|^|\\b|\\B|.)*!" * 9,
)  # fmt: skip
MATCHING = ("(a|aa)+$", r"(a*)*\1", "(?:a|(?:a|(?:a|(?:a|a*!)*!)*!)*!)*")


def texts(atoms):
    pieces = st.tuples(atoms, st.sampled_from(REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
    branches = st.lists(pieces, max_size=3).map("".join)
    return st.lists(branches, min_size=1, max_size=3).map("|".join)


def groups(inner):
    return st.tuples(st.sampled_from(OPENINGS), inner).map(lambda pair: f"{pair[0]}{pair[1]})")


EXPRESSIONS = texts(st.sampled_from(ATOMS) | groups(texts(st.sampled_from(ATOMS))))


@given(st.sampled_from(("", "(?i)", "(?s)", "(?m)", "(?a)")), EXPRESSIONS, st.text("abA.1\né", min_size=1, max_size=5))
def test_a_text_matches_what_re_matches(flags, text, name):
    assert Patterns(flags + text).match([name]) == bool(re.fullmatch(flags + text, name))


@pytest.mark.parametrize("text", HONEST)
def test_usual_expressions_match_the_same_names(text):
    for given_as, expected in ((text, text), ({f"(?:{text})": 1}, rf"(.*\.)?({text})$")):
        asked = Patterns(given_as)
        if "(?i)" in text and isinstance(given_as, dict):
            continue
        assert [asked.match([name]) for name in LAYERS] == [bool(re.match(expected, name)) for name in LAYERS]
        assert any(asked.match([name]) for name in LAYERS)


@pytest.mark.parametrize("text", HOSTILE + MATCHING)
def test_an_expression_of_others_is_answered_or_refused(text, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    asked = Patterns(text)
    for name in ("a" * 30, "a" * 100, "a" * 29 + "c"):
        with suppress(ValueError):  # as below
            assert asked.match([name]) == (text in MATCHING and "c" not in name)


def test_an_expression_with_many_paths_is_refused_also_for_the_names_after():
    asked = Patterns({"(a|aa)+x": 1, "(a|aa)+y": 2})
    asked._seconds = 0.01
    for name in ("a" * 200 + "c", "a" * 200 + "d"):
        with pytest.raises(ValueError, match=r"'\(a\|aa\)\+x': this regular expression takes too long"):
            asked.value([name], None)


def test_the_work_of_other_threads_does_not_count(monkeypatch):
    """Threads of torch wait by spinning, on each core; the time of the process has theirs."""
    monkeypatch.setattr(time, "process_time", itertools.count(step=100).__next__)
    asked = Patterns(".*q_proj")
    assert [asked.match([name]) for name in LAYERS] == [name.endswith("q_proj") for name in LAYERS]


def test_groups_in_groups_are_refused():
    with pytest.raises(ValueError, match=r"this regular expression can't be used \(maximum recursion depth"):
        Patterns("(a|" * 300 + ")*" * 300)
