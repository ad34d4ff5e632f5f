"""The report as people read it: in a terminal, in a notebook, and as a short repr."""

import copy
import re

import pytest
from torch import nn

from lightning_qlora import QLoRAConfig, QLoRAPrecision, convert, quantize
from lightning_qlora.training.report import CalibrationReport
from tests.toys import Lit, toy


def test_a_line_begins_with_the_whole_name_of_its_layers():
    pytest.importorskip("transformers")
    module = Lit(toy("llama", tie_word_embeddings=True))
    text = str(convert(module, r=4))
    for name, count in (("layers.*.self_attn.q_proj", 2), ("layers.*.post_attention_layernorm", 2)):
        assert re.search(rf"^model\.model\.{re.escape(name)} +x{count} ", text, re.M), text
    assert re.search(r"^model\.lm_head +x1   skipped: its weight is tied to model", text, re.M), text
    adapters = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
    dense = toy("llama", tie_word_embeddings=True).num_parameters()
    assert f"{adapters:,} of {dense + adapters:,} parameters train" in text
    assert "no weights are known to be loaded: linear layers larger than their adapter" in text


def test_the_summary_has_the_lines_that_apply():
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    *lines, last = convert(copy.deepcopy(net), r=4, target_modules=["0"]).summary().splitlines()
    assert lines == ["512 of 4,800 parameters train (10.67%)"]
    assert re.fullmatch(r"parameters take [\d.]+ kB, 17.15 kB before; converted 1 layers in [\d.]+ s", last)
    arguments = {"target_modules": ["0"], "modules_to_save": ["1"], "compute_dtype": "bf16"}
    *lines, _ = convert(net.bfloat16(), r=4, **arguments).summary().splitlines()
    assert lines == [
        "640 of 4,800 parameters train (13.33%): 512 in adapters and 128 in full",
        "what trains in full is held in fp32 (512 bytes) and computes in bfloat16",
    ]


def test_a_notebook_shows_a_table():
    report = convert(nn.ModuleDict({"a<b": nn.Linear(64, 64), "head": nn.Linear(64, 2)}), r=4)
    html = report._repr_html_()
    assert "<td>a&lt;b</td><td>4-bit + adapter, 64x64</td><td>1</td>" in html and "a<b" not in html
    assert html.count("<tr>") == 3 and report.summary().splitlines()[0] in html


def test_reprs_are_short_and_say_what_matters():
    report = convert(nn.Sequential(*(nn.Linear(64, 64) for _ in range(50))), r=4)
    assert repr(report).startswith("ConversionReport(50 layers in 4 bits, 0 trained in full, 0 skipped, 25,600 of ")
    weight = quantize(nn.Linear(128, 64).weight.detach())
    assert repr(weight).startswith("PackedWeight([64, 128], nf4, block_size=64, double_quant=True, torch.float32, 4,")
    plugin = QLoRAPrecision(r=4, exclude_modules=["head"])
    assert repr(plugin) == "QLoRAPrecision(r=4, exclude_modules=['head'])"
    assert eval(repr(plugin.config)) == plugin.config != QLoRAConfig()
    assert repr(QLoRAConfig()) == "QLoRAConfig()"


def test_what_waits_for_data_is_named_beside_what_was_calibrated():
    report = CalibrationReport(waiting=["a"], host_bytes=4096)
    assert str(report).startswith("1 adapters will be calibrated in the first step; until then 4,096 bytes")
    report.calibrated, report.rows = ["b"], 1234
    assert str(report).startswith("1 adapters calibrated on 1,234 rows")
    assert str(report).endswith("waiting for the first step of their optimizer: a")
