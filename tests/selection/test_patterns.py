"""Patterns of names match as in PEFT, regular expressions as in `re`, however many there are and whatever they are."""

import re

import pytest
from peft.utils.other import get_pattern_key

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
    "^",
    "x$",
    "a??a",
    "[a-c.]{3,}",
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
    r"^(?!.*self).*up_proj", r"model\.layers\.(?:[0-4]|1[01])\.mlp\.up_proj", r"(.+)\.(\w+)\.[qv]_proj\b",
    r".*(?<=q)_proj",
    r"(?:model|layers|\d+|self_attn|mlp|\.)+q_proj", r"(?s:.){5,40}_proj", r"(\w+)\.layers\.(\d)\.\w+\.(?:q|v)_proj",
)  # fmt: skip


@pytest.mark.parametrize("text", HONEST)
def test_usual_expressions_match_the_same_names(text):
    for given_as, expected in ((text, text), ({f"(?:{text})": 1}, rf"(.*\.)?({text})$")):
        asked = Patterns(given_as)
        assert [asked.match([name]) for name in LAYERS] == [bool(re.match(expected, name)) for name in LAYERS]
        assert any(asked.match([name]) for name in LAYERS)
