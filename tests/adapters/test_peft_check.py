"""Folders that PEFT would load in part: they are written in another form, or a warning names what is lost."""

import importlib.util
import json
import warnings

import pytest
import torch
from torch import nn

from lightning_qlora import convert, save_adapter
from lightning_qlora.adapters.peft_check import _without_weights, layers_that_are_only_read
from tests.adapters.test_peft_experts import converted, decoded_base, deepseek_v3, logits, olmoe
from tests.conftest import Classifier
from tests.layers import test_experts as toys
from tests.toys import perturb

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers", minversion="5")


def qwen3_with_a_dense_mlp():
    return toys.qwen3_moe(mlp_only_layers=[0])


def shared_experts(kind, **more):
    def build():
        sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
        config = {**toys.SMALL, **sizes, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, **more}
        return getattr(transformers, f"{kind}ForCausalLM"), getattr(transformers, f"{kind}Config")(**config)

    return build


FAMILIES = {
    "qwen3_moe": qwen3_with_a_dense_mlp,
    "deepseek_v3": deepseek_v3,
    "glm4_moe": shared_experts("Glm4Moe", n_group=1, topk_group=1),
    "dots1": shared_experts("Dots1", n_group=1, topk_group=1),
    "ernie4_5_moe": shared_experts("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
}


def with_dense_experts(build, **arguments):
    """Adapters in the linear layers alone."""
    model = toys.made(build).eval()
    convert(model, r=2, lora_alpha=4, lora_dropout=0.1, exclude_modules=["experts"], **arguments)
    return perturb(model)


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
def test_peft_reads_adapters_of_dense_mlps_and_shared_experts(build, tmp_path):
    model = with_dense_experts(build)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0 and "o_proj" in config["target_modules"]
    assert all(name.endswith("_proj.weight") for name in config["target_parameters"])
    theirs = peft.PeftModel.from_pretrained(decoded_base(build, model), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


def test_a_folder_that_peft_loads_is_written_as_always(tmp_path):
    model = with_dense_experts(olmoe)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_parameters" not in config and config["lora_dropout"] == 0.1


def test_what_peft_has_no_form_for_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"PEFT would not load .* of the .*layers.0.mlp.down_proj.*Merge the adapter"):
        save_adapter(with_dense_experts(qwen3_with_a_dense_mlp, use_dora=True), tmp_path)


def test_layers_that_the_model_reads_and_does_not_call_are_named(tmp_path):
    """PEFT adapts the calls of a layer, and `nn.MultiheadAttention` reads the weight of its out_proj."""
    model = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
    convert(model, r=2)
    save_adapter(model, tmp_path / "before")  # nothing is known of the layers yet
    model(torch.randn(2, 3, 64)).sum().backward()
    assert layers_that_are_only_read(model) == ["self_attn.out_proj"]
    with pytest.warns(UserWarning, match=r"the adapters of 1 layers .*\(self_attn.out_proj\), but not use them"):
        save_adapter(model, tmp_path / "after")
    called = nn.Sequential(nn.Linear(64, 64))
    convert(called, r=2)
    called(torch.randn(2, 64)).sum().backward()
    called[0].weight.norm()  # to log it, say
    assert layers_that_are_only_read(called) == []


def test_what_peft_refuses_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("Target module not supported")

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    with pytest.warns(UserWarning, match=r"because of this error: ValueError: Target module not supported"):
        save_adapter(with_dense_experts(olmoe), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_without_peft_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = with_dense_experts(qwen3_with_a_dense_mlp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    assert "target_parameters" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("build", [toys.gpt_oss, deepseek_v3])
def test_the_copy_without_weights_is_the_model_before_conversion(build):
    model, dense = converted(build), toys.made(build)
    before = {name: id(value) for name, value in model.named_parameters()}
    made = _without_weights(model)
    shapes = [(name, p.shape, p.dtype, p.is_meta) for name, p in made.named_parameters()]
    assert shapes == [(name, p.shape, p.dtype, True) for name, p in dense.named_parameters()]
    assert [type(part) for part in made.modules()] == [type(part) for part in dense.modules()]
    peft.get_peft_model(made, peft.LoraConfig(target_modules=["o_proj"]))
    assert before == {name: id(value) for name, value in model.named_parameters()}


def test_modules_of_other_kinds(tmp_path):
    model = nn.Sequential(Classifier(), nn.ModuleList(), nn.BatchNorm1d(4))
    hook = model.register_forward_hook(lambda *_: None)
    convert(model, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    assert list(model._forward_hooks) == [hook.id]
