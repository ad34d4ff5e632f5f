"""A folder by the names of the model: fused and stacked tensors, and an adapter for the float base."""

from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora import convert, save_adapter
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.adapters.peft_layers import from_peft
from lightning_qlora.files.safetensors_folder import TensorEntry, WeightFolder
from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.parts import Parts
from tests.toys import assert_equal, delta, perturb

pytest.importorskip("transformers")

from transformers.core_model_loading import WeightRenaming

from tests.architectures.checks import ARGUMENTS, load, loaded_and_converted, saved
from tests.huggingface.test_experts_on_load import mixtral


def test_a_fused_weight_is_read_as_the_parameters_of_the_model(tmp_path):
    model, _ = saved("nomic_bert", tmp_path)
    folder = ModelFolder.open(tmp_path)
    stored = WeightFolder(tmp_path)
    expected = dict(load(model, tmp_path).named_parameters())
    assert folder.entries == {name: TensorEntry("F32", tuple(value.shape)) for name, value in expected.items()}
    assert folder.file_of == dict.fromkeys(expected, tmp_path / "model.safetensors")
    fused = "encoder.layers.0.attn.Wqkv.weight"
    names = [f"layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    assert torch.equal(torch.cat(list(folder.tensors(names).values())), stored.tensors([fused])[fused])
    assert folder.where(names[1]) == f"{tmp_path / 'model.safetensors'}: {fused!r}"
    assert_equal(folder.tensors([*expected]), expected)

    # Without a model names are keys, also if transformers can't build it; so are those that the model has.
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    for plain in (ModelFolder(tmp_path, None), ModelFolder.open(tmp_path)):
        assert (plain.entries, plain.file_of, plain.groups) == (stored.entries, stored.file_of, {})
    (tmp_path / "other.json").rename(tmp_path / "config.json")
    save_file({name: value.detach() for name, value in expected.items()}, tmp_path / "model.safetensors")
    assert ModelFolder.open(tmp_path).key_of == {name: name for name in expected}


def test_of_stacked_experts_one_is_read_at_a_time(tmp_path):
    """There are more than ten, so that the order of their names is not that of their numbers."""
    kind, config = mixtral()
    config.num_local_experts = 11
    kind(config).save_pretrained(tmp_path)
    folder = ModelFolder.open(tmp_path)
    model = kind.from_pretrained(tmp_path)
    for expert in (1, 2, 10):
        name = f"model.layers.1.mlp.experts.gate_up_proj.{expert}"
        assert folder.entries[name] == TensorEntry("F32", (64, 64))
        keys = ", ".join(f"'model.layers.1.block_sparse_moe.experts.{expert}.w{i}.weight'" for i in (1, 3))
        assert folder.where(name) == f"{tmp_path / 'model.safetensors'}: {keys}"
        weight = folder.tensors([name])[name]
        assert torch.equal(weight, model.model.layers[1].mlp.experts.gate_up_proj[expert])


def test_two_tensors_of_one_parameter_are_refused(tmp_path):
    saved("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embeddings.LayerNorm.gamma"] = tensors["embeddings.LayerNorm.weight"].clone()  # an older name
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'embeddings.LayerNorm.\w+' and another tensor are the same parameter"):
        ModelFolder.open(tmp_path)


def test_only_some_parameters_of_a_conversion_are_quantized(tmp_path):
    model, base = saved("nomic_bert", tmp_path / "base")
    again = loaded_and_converted(model, base, target_modules=["k_proj", "v_proj"])
    assert again.layers[0].self_attn.v_proj.packed.dtype is torch.uint8
    assert type(again.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.filterwarnings("ignore:PEFT would")
@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3", "mixtral", "gpt_oss"])
def test_an_adapter_for_the_float_base_is_what_training_added(kind, tmp_path):
    model, base = saved(kind, tmp_path / "base")
    module = load(model, base)
    convert(module, **ARGUMENTS, init_lora_weights="calibrated")
    perturb(module)
    for layer in adapted_layers(module).values():
        layer.set_initial((layer.lora_A, layer.lora_B))  # as calibration does
    before = {name: delta(layer).detach() for name, layer in adapted_layers(module).items()}
    perturb(module)
    save_adapter(module, tmp_path / "adapter", base="float")
    found = adapted_layers(module)
    adapter = read_adapter(tmp_path / "adapter")
    layers = from_peft(adapter, Parts.of(module).base)
    assert found.keys() == layers.keys()
    for name, state in layers.items():
        ours = adapter.alpha(name) / state["lora_A"].shape[-2] * state["lora_B"] @ state["lora_A"]
        ours = found[name]._as_stored(ours)
        torch.testing.assert_close(ours, (delta(found[name]) - before[name]).detach(), atol=1e-5, rtol=1e-4)


def test_names_that_the_model_does_not_use_are_keys(tmp_path, monkeypatch):
    saved("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "of_another": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = {**{name: name for name in tensors}, "of_another": "of_another"}
    assert ModelFolder.open(tmp_path).key_of == expected
    rename = WeightRenaming("LayerNorm", "of_no_model")
    mapping = import_module("transformers.conversion_mapping")
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: [rename])
    assert ModelFolder.open(tmp_path).key_of == expected
