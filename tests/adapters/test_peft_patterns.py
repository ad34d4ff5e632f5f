"""Patterns from files of others: the same matches as PEFT's, and none that runs for long."""

import json
import re
import sys
import time
from contextlib import suppress

import pytest
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from lightning_qlora.adapters.peft_files import WEIGHTS_FILE, write_adapter
from lightning_qlora.adapters.peft_patterns import check_few_ways
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.config import fits
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
        assert fits(name, pattern) == (get_pattern_key([pattern], name) == pattern and _matches(pattern, name))


def _matches(pattern, name):  # get_pattern_key returns the name itself if no pattern matches
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def with_patterns(patterns, folder):
    write_adapter(adapter(3), folder)
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, metadata={"format": "pt"})  # as PEFT
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": patterns}))
    return path


@pytest.mark.parametrize("pattern", ["(a+)+$b", "((a*)*)*b", "(a{1,1000}){1,1000}b", "(a|b|ab)*c"])
def test_no_pattern_hangs(pattern, tmp_path):
    path, start = with_patterns({pattern: 2}, tmp_path), time.perf_counter()
    with pytest.raises(ValueError, match=f"{path.name}: alpha_pattern: .* may take years to match"):
        read_adapter(tmp_path)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$b", "(a|a)*b", ".*.*.*.*.*.*x", "((a*)*)*b", "(a{1,1000}){1,1000}b", "a{1000000000}", "(a|b|ab)*c"],
)
@pytest.mark.parametrize("length", [40, 5000])
def test_a_pattern_is_matched_soon_or_refused(pattern, length):
    name, start = "a" * length, time.perf_counter()
    with suppress(ValueError):
        check_few_ways("alpha_pattern", [pattern], [name])
        assert not fits(name, pattern)
    assert time.perf_counter() - start < 5


def test_many_patterns_that_are_slow_together_are_refused():
    with pytest.raises(ValueError, match="may take years to match"):
        check_few_ways("alpha_pattern", [f"{i}.*.*.*.*" for i in range(200)], ["a" * 60])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"(" * 1500 + ")" * 1500: 2}, "not a valid regular expression"),
        ({"(a{1,9}){1,9}" * 3000: 2}, "a pattern of 39000 characters is longer than 4000"),
    ],
)
def test_an_error_names_the_file_and_the_key(patterns, message, tmp_path):
    path = with_patterns(patterns, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(error.value) and path.name in str(error.value) and "\n" not in str(error.value)


def test_thousands_of_names_are_no_problem():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(1500)]
    start = time.perf_counter()
    assert sum(fits(name, pattern) for name in names[:20] for pattern in names) == 20
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
        check_few_ways("target_modules", [pattern], ["a" * 60] * 500)
    for pattern in HOSTILE if sys.version_info >= (3, 11) else HOSTILE[:-1]:  # atomic groups
        with pytest.raises(ValueError, match=r"^exclude_modules: .* may take years to match"):
            check_few_ways("exclude_modules", [pattern], ["a" * 60])
