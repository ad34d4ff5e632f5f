"""Tiny transformers models of many kinds; what is checked of each is in `tests/architectures/checks.py`."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
import transformers
from torch import nn

from lightning_qlora import QLoRAConfig
from lightning_qlora.layers.selection import select_in_part
from tests.architectures.checks import CHECKS, known
from tests.architectures.models import ALL, FOLDERS, MODELS, configuration

# Loading and merging are worth a test where transformers converts the tensors of a folder; the others are slow tests.
DEFAULT = {
    "trains": MODELS,
    "recomputes": MODELS,
    "loads": ["nomic_bert", "dinov2:swiglu"],
    "merges": ["vit", *FOLDERS],
    "4-bit folder": ["nomic_bert", "conditional_detr"],
    "PEFT": [],
    "generates": [],
}
CASES = [
    pytest.param(check, kind, marks=[] if kind in DEFAULT[check] else pytest.mark.slow, id=f"{kind}-{check}")
    for kind in ALL
    for check in CHECKS
]


@pytest.mark.parametrize(("check", "kind"), CASES)
def test_a_tiny_model(check, kind, tmp_path):
    if kind.partition(":")[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"{kind} is not in this version of transformers")
    if why := known(kind, check):
        pytest.skip(why)
    if why := CHECKS[check](kind, tmp_path):
        pytest.skip(why)


MOE = [
    "qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "granitemoe", "llama4_text", "dbrx", "jetmoe",
    "longcat_flash", "hunyuan_v1_moe", "nllb-moe", "switch_transformers",
]  # fmt: skip


@pytest.mark.parametrize("kind", MOE)
def test_experts_are_in_4_bits_and_routers_are_not(kind):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(configuration(kind))
    choice = select_in_part(model, QLoRAConfig(r=2))
    packed = {f"{name}.weight" for name in choice.convert} | set(choice.stacks)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "norm" not in name}
    routers = {name for name in matrices if {"router", "gate", "classifier"} & set(name.split("."))}
    experts = {name for name in matrices if "experts" in name} - routers
    assert routers and experts
    assert not routers & packed
    total, quantized = sum(map(matrices.get, experts)), sum(map(matrices.get, experts & packed))
    assert quantized / total >= 0.95
    dense = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} - choice.convert.keys()
    assert {f"{name}.weight" for name in dense} <= routers
