"""Patterns of an adapter folder match as in PEFT."""

import pytest
from peft.utils.other import get_pattern_key

from lightning_qlora.config import fits

NAMES = ["model.layers.0.self_attn.q_proj", "layers.11.mlp.up_proj", "q_proj", "a.b.c", "aaa", "", "x.q_proj.y", "é-1"]
USUAL = ["q_proj", "^q_proj$", r"^model\.layers\.0\.self_attn\.q_proj", r".*\.layers\.\d+\..*", r"layers\.(0|11)\..*"]
USUAL += ["q_proj|c", r"[^.]*", r"\w+\.\W?", "a{2}", "(a|aa)+", "", "^", "x$", "a??a", "é.1"]


@pytest.mark.parametrize("pattern", USUAL)
def test_matches_are_those_of_peft(pattern):
    for name in NAMES:
        assert fits(name, pattern) == (get_pattern_key([pattern], name) == pattern)
