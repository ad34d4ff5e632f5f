"""The report as people read it: in a terminal of 80 columns, in a notebook, as a short repr, and in a logger."""

import re

import pytest
from torch import nn

from lightning_qlora import QLoRAConfig, QLoRAPrecision, convert, quantize
from lightning_qlora.training.report import break_at_dots
from tests.toys import Lit, toy


def test_names_of_layers_are_whole_in_80_columns(capsys, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("transformers")
    monkeypatch.setenv("COLUMNS", "80")
    convert(module := Lit(toy("llama", tie_word_embeddings=True)), r=4).show()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in ("of model", "model.layers.*.self_attn.q_proj", "model.layers.*.post_attention_layernorm", "lm_head"):
        assert f" {name}" in text  # the part that all share is cut, since one of them would break
    assert re.search(r"to model\.model\.embed_tokens\. .*\n.* weight ", text)
    adapters = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
    dense = toy("llama", tie_word_embeddings=True).num_parameters()
    assert f"{adapters:,} of {dense + adapters:,} parameters train" in text
    assert "no weights are known to be loaded: linear layers larger than their adapter" in text


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("a.b.c", 10, ["a.b.c"]),
        ("model.layers.*.q", 8, ["model.", "layers.", "*.q"]),
        ("a_long_name.b", 5, ["a_long_name.", "b"]),
        ("(the module itself)", 5, ["(the module itself)"]),
        ("", 5, [""]),
    ],
)
def test_long_names_break_after_dots(name, width, lines):
    assert break_at_dots(name, width).split("\n") == lines
    assert break_at_dots(name, width).replace("\n", "") == name


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
