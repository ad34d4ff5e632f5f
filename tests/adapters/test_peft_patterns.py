"""Patterns of an adapter folder match as in PEFT."""

import pytest
from peft.utils.other import get_pattern_key

from lightning_qlora.config import fits

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
]


@pytest.mark.parametrize("pattern", USUAL)
def test_matches_are_those_of_peft(pattern):
    for name in NAMES:
        assert fits(name, pattern) == (get_pattern_key([pattern], name) == pattern)
