"""Folders that PEFT would load in part: they are written in another form, or a warning names what is lost."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_qlora import convert, save_adapter
from lightning_qlora.adapters.peft_folder import write_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from tests.adapters.folders import adapter_of, assert_same_folders, read_config
from tests.adapters.test_peft_experts import decoded_base, logits
from tests.experts import test_experts as toys
from tests.toys import perturb

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")


def qwen3_with_a_dense_mlp():
    return toys.qwen3_moe(mlp_only_layers=[0])


OTHERS = ("deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe")
FAMILIES = {"qwen3_moe": qwen3_with_a_dense_mlp, **{kind: toys.architecture(kind) for kind in OTHERS}}


def with_dense_experts(build, **arguments):
    """Adapters in the linear layers alone."""
    model = toys.made(build).eval()
    convert(model, r=2, lora_alpha=4, lora_dropout=0.1, exclude_modules=["experts"], **arguments)
    return perturb(model)


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
def test_peft_reads_adapters_of_dense_mlps_and_shared_experts(build, tmp_path):
    model = with_dense_experts(build)
    save_adapter(model, tmp_path)
    config = read_config(tmp_path)
    assert config["lora_dropout"] == 0 and "o_proj" in config["target_modules"]
    assert all(name.endswith("_proj.weight") for name in config["target_parameters"])
    theirs = peft.PeftModel.from_pretrained(decoded_base(build, model), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    write_adapter(replace(read_adapter_from_checkpoint(tmp_path / "x.ckpt"), bases={}), tmp_path / "exported")
    assert_same_folders(tmp_path / "exported", tmp_path)


def test_a_folder_that_peft_loads_is_written_as_always(tmp_path):
    model = with_dense_experts(toys.qwen3_moe)  # without dense MLPs and shared experts
    save_adapter(model, tmp_path)
    config = read_config(tmp_path)
    assert "target_parameters" not in config and config["lora_dropout"] == 0.1


def test_all_names_that_peft_takes_for_those_of_experts():
    names = sorted(["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"])
    base = nn.ModuleDict({name: nn.Linear(64, 64) for name in (*names, "other")})
    base["experts"] = nn.ParameterDict({"gate_up_proj": nn.Parameter(torch.zeros(1))})
    convert(base, r=2)
    config = adapter_of(base).config
    assert (config["target_parameters"], config["target_modules"]) == ([f"{name}.weight" for name in names], ["other"])


def test_what_peft_has_no_form_for_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"PEFT can't load the adapters of 3 layers \(model.layers.0.mlp"):
        save_adapter(with_dense_experts(qwen3_with_a_dense_mlp, use_dora=True), tmp_path)


def test_layers_that_the_model_reads_and_does_not_call_are_named(tmp_path):
    """PEFT adapts the calls of a layer, and `nn.MultiheadAttention` reads the weight of its out_proj."""
    model = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
    convert(model, r=2)
    model(torch.randn(2, 3, 64)).sum().backward()
    named = r"1 layers of this TransformerEncoderLayer \(self_attn.out_proj\): where"
    with pytest.warns(UserWarning, match=named):
        save_adapter(model, tmp_path)
