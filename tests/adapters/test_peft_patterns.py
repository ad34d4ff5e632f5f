"""Patterns from a foreign adapter_config.json: the same matches as PEFT's, and none that runs for long."""

import json
import random
import re
import sys
import time
from contextlib import suppress

import pytest
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from lightning_qlora.adapters.peft_files import WEIGHTS_FILE, write_adapter
from lightning_qlora.adapters.peft_patterns import MOST_PATTERNS, PatternError, check_few_ways, fits_peft_pattern
from lightning_qlora.adapters.peft_reader import read_adapter
from tests.adapters.test_peft_metadata import adapter

NAMES = ["model.layers.0.self_attn.q_proj", "layers.11.mlp.up_proj", "q_proj", "a.b.c", "aaa", "", "x.q_proj.y", "é-1"]
USUAL = [
    "q_proj", "^q_proj$", r"^model\.layers\.0\.self_attn\.q_proj", r".*\.layers\.\d+\..*", r"layers\.(0|11)\..*",
    r"layers.[0-9]+.mlp.(?:up|down)_proj", "q_proj|c", r"[^.]*", r"\w+\.\W?", r"\D+", "a{2,3}", "a{2}", "(a*)*", "()*",
    "(a|aa)+", "(a?){50}", "", "^", "x$", "a??a", "[a-c.]{3,}", "é.1", "[^q]+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_matches_are_those_of_peft(pattern):
    for name in NAMES:
        assert fits_peft_pattern(name, pattern) == (
            get_pattern_key([pattern], name) == pattern and _matches(pattern, name)
        )


def _matches(pattern, name):  # get_pattern_key returns the name itself if no pattern matches
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def test_random_expressions_match_as_in_re():
    draw, compared = random.Random(0), 0
    parts = ["a", "b", ".", r"\.", "*", "+", "?", "|", "(", ")", "[ab]", "[^a]", "{1,2}", r"\w", "^", "$"]
    for _ in range(8000):
        pattern = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 8)))
        name = "".join(draw.choice("ab.") for _ in range(draw.randrange(8)))
        try:
            expected = _matches(pattern, name)
            found = fits_peft_pattern(name, pattern)
        except (re.error, PatternError):
            continue
        assert found == expected, (pattern, name)
        compared += 1
    assert compared > 2000


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$b", "(a|a)*b", ".*.*.*.*.*.*x", "((a*)*)*b", "(a{1,1000}){1,1000}b", "a{1000000000}", "(a|b|ab)*c"],
)
def test_no_pattern_hangs(pattern):
    start = time.perf_counter()
    assert not fits_peft_pattern("a" * 40, pattern)
    with suppress(PatternError):
        assert not fits_peft_pattern("a" * 5000, pattern)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({r"(?=proj)proj": 2}, "or has flags, look-around"),
        ({f"(a|{i})": 2 for i in range(MOST_PATTERNS + 1)}, f"101 regular expressions are more than {MOST_PATTERNS}"),
        ({"(" * 1500 + ")" * 1500: 2}, "not a valid regular expression"),
        ({"(a{1,9}){1,9}" * 3000: 2}, "a pattern of 39000 characters is longer than 4000"),
    ],
)
def test_an_error_names_the_file_and_the_key(patterns, message, tmp_path):
    write_adapter(adapter(3), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})  # as PEFT
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": patterns}))
    with pytest.raises(ValueError, match=message) as error:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(error.value) and path.name in str(error.value) and "\n" not in str(error.value)


def test_thousands_of_names_are_no_problem():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(1500)]
    start = time.perf_counter()
    assert sum(fits_peft_pattern(names[7], name) for name in names) == 1
    assert time.perf_counter() - start < 5


HOSTILE = [
    "(a+)+$",
    "(a|a)*b",
    ".*.*.*.*.*.*.*x",
    "((a*)*)*b",
    "(a?){60}b",
    "(a|a)" * 40 + "b",
    "(?=(a+)+b)a",
    "(?>(a+)+)b",
]
COMMON = [
    r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj", r"(?!vision).*\.(q_proj|v_proj)", "net[.]0|net[.]2",
    "|".join(f"model.layers.{i}.q_proj" for i in range(500)), r"(model\.)?layers\.[0-9]+\..*(up|down)_proj",
]  # fmt: skip


def test_patterns_of_a_checkpoint_are_refused_if_they_can_hang():
    for pattern in COMMON:
        check_few_ways("target_modules", pattern, 60)
    for pattern in HOSTILE if sys.version_info >= (3, 11) else HOSTILE[:-1]:  # atomic groups
        with pytest.raises(PatternError, match=r"^exclude_modules: .* may take years to match"):
            check_few_ways("exclude_modules", pattern, 60)
