"""Stacks of experts are quantized while their model loads: the bytes, the memory, and everything that can differ."""

import re
from itertools import cycle

import pytest
import torch

from lightning_qlora import QLoRAPrecision, convert, save_adapter
from lightning_qlora.conversion.parameter_counts import parameter_bytes
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tools.activations import _LivingTensors
from tests.experts.test_experts import SMALL, architecture, dbrx, gpt_oss, jetmoe, llama4, made, outputs, qwen3_moe
from tests.toys import assert_equal, expert_stacks, needs, perturb

transformers = pytest.importorskip("transformers")


mixtral, deepseek_v3 = map(architecture, ("mixtral", "deepseek_v3"))


def loaded(folder, dtype="auto", **arguments):
    """The model of a folder as `configure_model` under the plugin loads it, before conversion."""
    with QLoRAPrecision(r=2, **arguments).init():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def folder(tmp_path):
    def save(build):
        made(build).save_pretrained(tmp_path / "base", max_shard_size="60KB")
        return tmp_path / "base"

    return save


def same_parameters(ours, theirs):
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert_equal(ours, theirs)
    assert [name for name in ours if ours[name].requires_grad != theirs[name].requires_grad] == []


OF_LAYER = [
    *("r", "scaling", "lora_dropout", "config", "full_name", "seed_name", "quant_type", "weight_dtype", "is_unfinished")
]


def same_modules(ours, theirs):
    same_parameters(ours, theirs)
    layers = adapted_layers(theirs)
    for name, layer in adapted_layers(ours).items():
        other = layers[name]
        for word in OF_LAYER:
            assert getattr(layer, word) == getattr(other, word), (name, word)
        assert layer.base_fingerprint() == other.base_fingerprint(), name
        torch.testing.assert_close(layer.initial, other.initial, rtol=0, atol=0)
    assert classes(ours) == classes(theirs)


def classes(module):
    return {name: type(part).__name__ for name, part in module.named_modules() if name}


def assert_same_conversion(ours, theirs, convert_ours=convert, **arguments):
    differ = {"seconds": 0, "notes": {}, "copied": []}  # copies are known by their float weights
    if "Linear4bit" in repr(theirs):
        differ["bytes_before"] = 0  # bitsandbytes' layers were in 4 bits; ours count as floats
    arguments = {"r": 2, **arguments}
    reports = convert_ours(ours, **arguments), convert(theirs, **arguments)
    same_modules(ours, theirs)
    report, expected = ({**vars(each), **differ} for each in reports)
    assert report == expected


BUILDS = (qwen3_moe, mixtral, gpt_oss, deepseek_v3, jetmoe, dbrx, llama4)


@pytest.mark.parametrize(("build", "dtype"), [*zip(BUILDS, cycle([torch.float32, torch.bfloat16]), strict=False)])
def test_the_bytes_are_those_of_quantizing_after_loading(build, dtype, folder):
    path = folder(build)
    expected = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = loaded(path, dtype)
    stacks = list(expert_stacks(model.named_modules()))
    assert stacks and all(stack.is_unfinished for *_, stack in stacks)
    assert_same_conversion(model, expected)
    assert torch.equal(outputs(model).logits, outputs(expected).logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"exclude_modules": ["layers.0.mlp.experts.down_proj"]},
        {"target_modules": ["q_proj", "gate_up_proj"]},
        {"rank_pattern": {"experts.gate_up_proj": 4}, "use_dora": True, "quant_type": "fp4", "double_quant": False},
        {"init_lora_weights": "calibrated"},
        {"modules_to_save": ["layers.0.mlp"]},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_every_choice(arguments, folder):
    path = folder(qwen3_moe)
    expected = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert_same_conversion(loaded(path, **arguments), expected, **arguments)


class _Allocated(_LivingTensors):
    def _add(self, storage):
        if storage.device.type != "meta":
            super()._add(storage)


def large_llama():
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SMALL, **sizes})


def large_qwen3_moe():
    return qwen3_moe(hidden_size=128, moe_intermediate_size=64, num_experts=16, num_hidden_layers=4)


@needs("transformers", "5.22", "the peak has two copies of a stack")
@pytest.mark.parametrize(("build", "largest"), [(large_qwen3_moe, 16 * 128 * 128), (large_llama, 512 * 128)])
def test_memory_is_the_4_bit_model_and_an_expert_or_a_layer(build, largest, folder):
    """Beside the tensors of one stack in the files, which are memory-mapped, but counted here."""
    path = folder(build)
    with _Allocated([], "cpu") as memory:
        model = loaded(path)
    parameters = parameter_bytes(model)
    numels = [layer.weight_bytes.numel for layer in adapted_layers(model).values()]
    assert max(numels) == largest and sum(numels) > 6 * largest
    more = 1.5 if build is large_qwen3_moe else 2.5
    assert parameters < memory.peak < parameters + more * 4 * largest < 4 * sum(numels) / 2


def test_an_adapter_to_start_from(folder, tmp_path):
    path = folder(qwen3_moe)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    convert(model, r=4, lora_dropout=0.0)
    save_adapter(perturb(model), tmp_path / "adapter")
    again = loaded(path, adapter=str(tmp_path / "adapter"))
    assert all(stack.is_unfinished for *_, stack in expert_stacks(again.named_modules()))
    convert(again, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(again).logits, outputs(model).logits)


def loaded_with_another_size(build, path, **arguments):
    config = transformers.AutoConfig.from_pretrained(path)
    setattr(config, "moe_intermediate_size" if build is qwen3_moe else "intermediate_size", 64)
    with QLoRAPrecision(r=2).init():
        return transformers.AutoModelForCausalLM.from_pretrained(path, config=config, **arguments)


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss])
def test_a_stack_of_another_shape(build, folder):
    with pytest.raises(ValueError, match=r"experts.* has shape \[.*Load it with the config"):
        loaded_with_another_size(build, folder(build))


@needs("transformers", "5.23", "with a quantizer, older versions do not compare shapes, so nothing starts anew")
@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss])
def test_a_stack_of_another_shape_starts_anew_where_that_is_asked_for(build, folder):
    model = loaded_with_another_size(build, folder(build), ignore_mismatched_sizes=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert adapted_layers(model) and not list(expert_stacks(model.named_modules()))


def test_nan_in_an_expert_is_an_error_that_names_the_stack(tmp_path):
    model = made(qwen3_moe)
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("model.layers.1.mlp.experts.down_proj: weight: holds NaN")):
        loaded(tmp_path)
