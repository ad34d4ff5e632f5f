"""The report as people read it: in a terminal, in a notebook, and as a short repr."""

import copy
from dataclasses import astuple

import torch
from torch import nn

from lightning_qlora import ConversionReport, QLoRAConfig, QLoRAPrecision, convert, quantize
from lightning_qlora.calibration.calibration_report import CalibrationReport
from lightning_qlora.tensors.device_types import Held
from lightning_qlora.texts import groups, size_text
from tests.toys import pretrain


def test_the_numbers_of_a_conversion():
    """16-bit parameters in an embedding of which rows train, two 4-bit layers, a dense one, a norm, and a head."""
    linear = nn.Linear(64, 64, bias=False)
    layers = nn.Embedding(16, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64), linear, nn.Linear(64, 8)
    module = pretrain(nn.Sequential(*layers).bfloat16())
    other = copy.deepcopy(module)
    arguments = {"r": 4, "target_modules": ["1", "2"], "modules_to_save": ["5"]}
    others = 16 * 64 + 2 * 64 + 2 * 64 + 64 * 64  # without weights in 4 bits, adapters, and the head
    head = 64 * 8 + 8
    adapters = 2 * 2 * 4 * 64
    packed = quantize(torch.randn(64, 64)).nbytes
    expected = {
        "converted": ["1", "2"],
        "trained_in_full": {"5": "in modules_to_save"},
        "skipped": {"4": "not in target_modules"},
        "trainable_parameters": adapters + 3 * 64 + head,
        "total_parameters": others + 2 * 64 * 64 + head + adapters + 3 * 64,
        "bytes_before": 2 * (others + 2 * 64 * 64 + head),
        "bytes_after": 2 * others + 2 * packed + 4 * (adapters + 3 * 64 + head),
        "shapes": {"1": (64, 64), "2": (64, 64)},
        "frozen": ["3"],
        "adapter_parameters": adapters + 3 * 64,
        "trained_rows": {"0": 3},
        "full_precision_bytes": 4 * head,
        "full_precision_computes_in": ["bfloat16"],
    }
    report = convert(module, **arguments, trainable_token_indices={"0": [1, 2, 3]}, compute_dtype="bf16")
    assert report == ConversionReport(**expected, seconds=report.seconds) and 0 < report.seconds < 60
    assert not any(astuple(ConversionReport())) and not any(astuple(CalibrationReport([], 0)))
    again = convert(module, **arguments, trainable_token_indices={"0": [1, 2, 3]}, compute_dtype="bf16")
    for name in ("converted", "trainable_parameters", "total_parameters", "bytes_after", "trained_rows"):
        assert getattr(again, name) == expected[name]
    held = convert(other, **arguments, compute_dtype="fp16")
    assert (held.held_bytes, held.bytes_after) == (2 * others, 4 * (others + adapters + head) + 2 * packed)
    assert held.full_precision_computes_in == [] and held.held[0].reason.startswith("compute_dtype='fp16'")


def test_a_summary_has_no_lines_that_do_not_apply():
    first, last = convert(nn.Sequential(nn.Linear(64, 64)), r=4, target_modules=["0"]).summary().splitlines()
    assert first == "512 of 4,672 parameters train (10.96%)"
    assert last.startswith("parameters take 4.424 kB, 16.64 kB before; converted 1 layers in ")
    assert str(CalibrationReport([], 0)).startswith("0 adapters calibrated on 0 rows of data in 0.0 s; 0 bytes")


def test_a_notebook_shows_a_table():
    report = convert(pretrain(nn.ModuleDict({"a<b": nn.Linear(64, 64), "head": nn.Linear(64, 2)})), r=4)
    rows = (
        "<tr><th>layer</th><th>status</th><th>layers</th></tr>"
        "<tr><td>a&lt;b</td><td>4-bit + adapter, 64x64</td><td>1</td></tr>"
        f"<tr><td>head</td><td>trains in full: {report.trained_in_full['head']}</td><td>1</td></tr>"
    )
    assert report._repr_html_() == f"<table>{rows}</table><pre>{report.summary()}</pre>"


def test_reprs_are_short_and_say_what_matters():
    weight = quantize(nn.Linear(128, 64).weight.detach())
    assert repr(weight).startswith("PackedWeight([64, 128], nf4, block_size=64, double_quant=True, torch.float32, 4,")
    plugin = QLoRAPrecision(r=4, exclude_modules=["head"])
    assert repr(plugin) == "QLoRAPrecision(r=4, exclude_modules=['head'])"
    assert eval(repr(plugin.config)) == plugin.config != QLoRAConfig()
    assert repr(QLoRAConfig()) == "QLoRAConfig()"


def test_the_whole_text():
    calibration = CalibrationReport(["w"], 4096)
    text = (
        "1 adapters will be calibrated in the first step; until then 4,096 bytes of dense weights stay in host memory"
    )
    assert str(calibration) == text
    errors = {f"l{number}": number / 10 for number in range(7)}
    calibration = CalibrationReport(["w"], 4096, ["a", "b"], ["u"], {}, 1234, 2.0, errors)
    shapes = {"h.0.q": (64, 32), "h.1.q": (64, 32), "z": (4, 64, 32)}
    report = ConversionReport(
        list(shapes), {"head": "new"}, {"": "frozen", "1": "frozen"}, 1500, 6000, 4_000_000, 1500, 1.26, shapes,
        ["norm"], 1000, {"tokens": 3}, {"lm_head": 3_840_000, "": 0}, 1000, ["bfloat16", "float16"],
        [Held(torch.float32, "bf16 is slow"), Held(torch.float32, "fp16 is slow")], 999, calibration,
    )  # fmt: skip
    assert f"{report}\n" == TEXT
    names = "ConversionReport(3 layers in 4 bits, 1 trained in full, 2 skipped, 1,500 of 6,000 parameters train)"
    assert repr(report) == names and repr(calibration) == f"CalibrationReport({calibration})"
    assert groups(["a.0", "a.1", "b", "a.2.c", ""]) == "a.* (x2), b, a.2.c, (the module itself)"
    counts = (999, 1000, 2**20, 2**30)
    assert [*map(size_text, counts)] == ["999 bytes", "1 kB", "1.049 MB", "1.074 GB"]
    assert [size_text(count, 1024) for count in counts] == ["999 bytes", "1000 bytes", "1 MiB", "1 GiB"]


TEXT = """\
QLoRA
z                    x1   4-bit + adapter, 4 experts of 64x32
h.*.q                x2   4-bit + adapter, 64x32
head                 x1   trains in full: new
(the module itself)  x1   skipped: frozen
1                    x1   skipped: frozen
tokens               x1   3 rows train, the others are frozen
norm                 x1   frozen by conversion
1,500 of 6,000 parameters train (25.00%): 1,000 in adapters and 500 in full
bf16 is slow; fp16 is slow: so all but the 4-bit weights is kept in fp32 and computes in it (999 bytes more); \
files and merged weights have the types of before
what trains in full is kept in fp32 (1 kB) and computes in bfloat16 and float16
parameters take 1.5 kB, 4 MB before; converted 3 layers in 1.3 s
logits of lm_head: deferred, saves 3.84 MB for each 1,000 tokens
logits of (the module itself): not deferred (sharded, or its adapter has lora_dropout)
2 adapters calibrated on 1,234 rows of data in 2.0 s; 4,096 bytes of dense weights were kept until then; \
largest errors left: l6 60.0%, l5 50.0%, l4 40.0%, l3 30.0%, l2 20.0%; default initialization, because the first \
step had no input for them: u; waiting for the first step of their optimizer: w
"""
