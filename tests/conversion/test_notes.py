"""Rows of the report with a mark: of which modules, with which words; a warning has them where no report is printed."""

import re
import warnings

import pytest
from torch import nn
from torch.nn.utils import weight_norm

from lightning_qlora import convert
from tests.toys import pretrain, toy


def linear(*layers):
    return nn.Sequential(*layers, nn.Linear(64, 64))


def narrow(*layers):
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10), *layers)


NO_LAYER = r"no layer is in 4 bits \(target_modules='all-linear', r=1024\)"
IN_FULL = {"r": 1024, "modules_to_save": ["0", "1"]}
STAYED = "not linear, so it is frozen and not in 4 bits, as {}% of the weights: name .*, which trains them in full"
CASES = [
    (
        lambda: toy("llama", tie_word_embeddings=True),
        {"target_modules": ["all-linear", "lm_head"]},
        {"target_modules names it, and it stays dense and frozen: its weight is tied to model.embed.*": ["lm_head"]},
    ),
    (narrow, IN_FULL, {NO_LAYER: [""]}),
    (
        lambda: narrow(nn.Linear(10, 10).requires_grad_(False)),
        IN_FULL,
        {f"{NO_LAYER}; target_modules converts frozen layers that it names": [""]},
    ),
    (lambda: linear(nn.Conv2d(16, 64, 3, bias=False)), {}, {STAYED.format(66): ["0.weight"]}),
    (lambda: linear(weight_norm(nn.Linear(64, 64))), {}, {STAYED.format(47): ["0.weight_v", "0.weight_g"]}),
    (lambda: linear(nn.Conv2d(16, 64, 3)), {"modules_to_save": ["0"]}, {}),
    (lambda: linear(nn.Embedding(64, 64)), {}, {}),
    (lambda: linear(nn.BatchNorm1d(4096)), {}, {}),
    (lambda: linear(nn.Conv1d(1, 20, 20)), {}, {}),  # 8% of the weights
]


@pytest.mark.parametrize(("make", "arguments", "expected"), CASES)
def test_the_notes_of_a_conversion(make, arguments, expected):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = convert(pretrain(make()), **{"r": 4, **arguments})
    assert [*report.notes.values()] == [*expected.values()]
    assert all(map(re.fullmatch, expected, report.notes))
    assert bool(report.marked_rows()) == bool(expected)
    texts = [str(each.message) for each in seen if "rows of the report" in str(each.message)]
    assert texts == ([f"rows of the report to look at:\n{report.marked_rows()}"] if expected else [])
    assert all(f"! {text}" in str(report) for text in report.notes)
