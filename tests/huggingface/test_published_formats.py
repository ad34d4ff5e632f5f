"""Folders in FP8, MXFP4 and compressed-tensors are quantized while they load, merged, inspected and planned.

The folders, and the dense weights that they stand for, are made by `published_formats`, without transformers.
"""

import json
import re
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora import (
    QLoRAPrecision,
    convert,
    disable_adapter,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.merge_folder import merge_folder
from tests.adapters.folders import adapter_of
from tests.conftest import run_python
from tests.experts.test_experts import SMALL, gpt_oss, jetmoe, made, outputs, qwen3_moe
from tests.huggingface.published_formats import CONFIGS, encode, encode_gguf
from tests.huggingface.test_experts_on_load import (
    _Allocated,
    assert_same_conversion,
    deepseek_v3,
    loaded,
    same_parameters,
)
from tests.huggingface.test_quantize_on_load import InConfigureModel
from tests.toys import assert_equal, expert_stacks, ids, needs, perturb, save_in_4_bits

transformers = pytest.importorskip("transformers", minversion="5.22")
of_5_23 = needs("transformers", "5.23", "does not dequantize compressed-tensors while it loads")
WRONG_IN_TRANSFORMERS = {"ct-uint4", "ct-nvfp4", "ct-int8"}  # its experts, which lose zero points or scales


def llama(**changes):
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**SMALL, "intermediate_size": 96, **changes})


def written(model, format, folder):
    if format != "mxfp4":
        pytest.importorskip("accelerate" if format == "fp8" else "compressed_tensors")
    return encode(model, format, folder)


@pytest.fixture
def folders(tmp_path):
    """A function that writes a model in a format, and as the dense model that it stands for."""

    def write(format, build):
        dense = written(made(build), format, tmp_path / "published")
        (tmp_path / "dense").mkdir()
        config = json.loads((tmp_path / "published" / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
        save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / "published", tmp_path / "dense"

    return write


def dequantized(path, format):
    """The model that transformers dequantizes in full."""
    kinds = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
    config = getattr(transformers, kinds.get(format, "CompressedTensorsConfig"))(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


CASES = [
    ("mxfp4", gpt_oss),
    ("fp8", llama),
    ("fp8", qwen3_moe),
    ("fp8", deepseek_v3),
    *((format, llama) for format in CONFIGS if format.startswith("ct-")),
    *((format, qwen3_moe) for format in CONFIGS if format.startswith("ct-") and format not in WRONG_IN_TRANSFORMERS),
]


@of_5_23
@pytest.mark.parametrize(("format", "build"), CASES)
def test_the_bytes_are_those_of_the_dense_model(format, build, folders):
    published, dense = folders(format, build)
    expected = transformers.AutoModelForCausalLM.from_pretrained(dense)
    same_parameters(dequantized(published, format), expected)
    model = loaded(published)
    assert all(layer.is_unfinished for layer in adapted_layers(model).values())
    assert all(stack.is_unfinished for *_, stack in expert_stacks(model.named_modules()))
    assert_same_conversion(model, expected)
    assert torch.equal(outputs(model).logits, outputs(expected).logits)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")


def test_the_quantizer_of_the_format_decides_types_and_ends_the_load(folders, monkeypatch):
    published, _ = folders("mxfp4", gpt_oss)
    kind = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["mxfp4"]
    ended = []
    monkeypatch.setattr(kind, "_process_model_after_weight_loading", lambda self, model, **_: ended.append(model))
    monkeypatch.setattr(kind, "update_dtype", lambda self, dtype: torch.float16)
    monkeypatch.setattr(kind, "get_new_dtype", lambda self, converter, param, dtype: torch.float16, raising=False)
    model = loaded(published)
    assert ended == [model]
    assert {model.dtype, model.model.norm.weight.dtype, model.lm_head.weight.dtype} == {torch.float16}
    assert {layer.weight_dtype for layer in adapted_layers(model).values()} == {torch.float16}


@of_5_23
@pytest.mark.parametrize(
    ("format", "build"), [CASES[0], ("fp8", deepseek_v3), ("ct-fp8", llama), ("ct-int4", qwen3_moe)]
)
def test_a_merge_is_that_into_the_dense_folder(format, build, folders, tmp_path):
    published, dense = folders(format, build)
    model = loaded(published)
    convert(model, r=2)
    save_adapter(perturb(model), tmp_path / "adapter")
    again = loaded(dense)
    convert(again, r=2)
    load_adapter(again, tmp_path / "adapter")  # compares the fingerprints of the base
    same_parameters(again, model)
    adapter = read_adapter(tmp_path / "adapter")
    for arguments in ({}, {"base": "float"}):
        ours = tmp_path / f"ours {arguments}"
        theirs = tmp_path / f"theirs {arguments}"
        merge_folder(published, adapter, ours, **arguments)
        merge_folder(dense, adapter, theirs, **arguments)
        assert_equal(*(load_file(merged / "model.safetensors") for merged in (ours, theirs)))
        assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()


@pytest.mark.parametrize(("format", "build"), [("mxfp4", gpt_oss), ("fp8", llama)])
def test_a_run_is_that_on_the_dense_folder_and_resumes(format, build, folders, tmp_path, trainer):
    published, dense = folders(format, build)
    losses = {}

    class Run(InConfigureModel):
        def training_step(self, batch, batch_idx):
            words = ids() % 96
            loss = self.model(input_ids=words, labels=words).loss
            losses.setdefault(self.folder.name, []).append(loss.item())
            return loss

    for folder in (published, dense):
        lit = Run(folder, build()[0])
        run = trainer(plugins=QLoRAPrecision(r=2, lora_dropout=0.0), max_steps=2)
        run.fit(lit)
        run.save_checkpoint(tmp_path / f"{folder.name}.ckpt")
    assert losses["published"] == losses["dense"] and len(losses["dense"]) == 2
    resumed = {}
    for name, folder in (("dense", dense), ("published", published)):  # each from the checkpoint of the other
        resumed[name] = Run(folder, build()[0])
        checkpoint = tmp_path / f"{'published' if name == 'dense' else 'dense'}.ckpt"
        trainer(plugins=QLoRAPrecision(r=2, lora_dropout=0.0), max_steps=3).fit(resumed[name], ckpt_path=checkpoint)
    same_parameters(resumed["published"], resumed["dense"])


@of_5_23
def test_load_from_checkpoint_needs_the_plugin_for_a_published_folder(folders, tmp_path, trainer):
    published, dense = folders("ct-int4", lambda: llama(vocab_size=1000))
    lit = InConfigureModel(published)
    run = trainer(plugins=QLoRAPrecision(r=2), max_steps=1)
    run.fit(lit)
    run.save_checkpoint(tmp_path / "run.ckpt")

    def load(folder):
        return load_from_checkpoint(InConfigureModel, tmp_path / "run.ckpt", folder=folder)

    with pytest.raises(ValueError, match=r"weight_packed.*call load_from_checkpoint within plugin\.init"):
        load(published)
    same_parameters(load(dense), lit)
    with QLoRAPrecision(r=2).init():
        same_parameters(load(published), lit)


def test_peft_reads_the_adapter_on_the_published_base(folders, tmp_path):
    peft = pytest.importorskip("peft")
    published, _ = folders("mxfp4", gpt_oss)
    model = loaded(published)
    convert(model, r=2, lora_dropout=0.0)
    save_adapter(perturb(model, scale=0.1), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(dequantized(published, "mxfp4"), tmp_path / "adapter")
    weights = {name: layer.decode() for name, layer in adapted_layers(model).items() if "experts" not in name}
    weights |= {name: stack.decode() for name, _, _, stack in expert_stacks(model.named_modules())}
    parameters = {name.replace(".base_layer", ""): value for name, value in theirs.base_model.model.named_parameters()}
    for name, value in weights.items():
        parameters[name if name in parameters else f"{name}.weight"].data.copy_(value)
    here = outputs(model.eval()).logits
    there = outputs(theirs.eval()).logits
    with disable_adapter(model):
        effect = (here - outputs(model).logits).norm()
    assert (here - there).norm() < 0.08 * effect  # both compute in bf16, and PEFT rounds twice in a layer


@of_5_23
@pytest.mark.parametrize("format", ["fp8", "ct-int4"])
def test_memory_is_the_4_bit_model_and_less_than_a_stack_of_experts(format, folders):
    """The dense model, of 4 layers with two stacks each, is never in memory."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_hidden_layers": 4}
    published, _ = folders(format, lambda: qwen3_moe(**sizes))
    with _Allocated([], "cpu") as memory:
        model = loaded(published)
    size = sum(parameter.nbytes for parameter in model.parameters())
    size += sum(weight.nbytes for layer in adapted_layers(model).values() for weight in layer.packed_weights)
    assert size < memory.peak < size + 2 * 16 * 128 * 128


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss, jetmoe])
def test_dense_experts_of_a_4_bit_folder_are_quantized_while_they_load(build, tmp_path):
    made(build).save_pretrained(tmp_path / "base")
    save_in_4_bits(build()[0], tmp_path / "base", tmp_path / "folder")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    model = loaded(tmp_path / "folder")
    assert list(expert_stacks(model.named_modules())) and all(
        stack.is_unfinished for *_, stack in expert_stacks(model.named_modules())
    )
    assert_same_conversion(model, expected)


def test_a_4_bit_folder_whose_experts_can_only_be_loaded_dense(tmp_path, monkeypatch):
    """As with transformers before 5.22, which can put no operation of ours behind its own."""
    monkeypatch.setattr("lightning_qlora.huggingface.quantizer.COMPOSES", False)
    made(qwen3_moe).save_pretrained(tmp_path / "base")
    save_in_4_bits(qwen3_moe()[0], tmp_path / "base", tmp_path / "folder")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    model = loaded(tmp_path / "folder")
    assert adapted_layers(model) and not list(expert_stacks(model.named_modules()))
    assert convert(model, r=2).converted == convert(expected, r=2).converted
    same_parameters(model, expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_gguf_file(kind, tmp_path):
    pytest.importorskip("gguf")
    model_class, _ = llama()
    dense = encode_gguf(made(llama), kind, tmp_path / "model.gguf")
    with QLoRAPrecision(r=2).init():
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16)
    for name, value in dense.items():
        assert torch.equal(ours.get_parameter(name), value.bfloat16()), name
    convert(ours, r=2)
    adapter = adapter_of(perturb(ours))  # knows the bytes of the training, which was in bf16
    merge_folder(tmp_path / "model.gguf", adapter, tmp_path / "file")
    merge_folder(tmp_path, adapter, tmp_path / "folder", dtype="fp32")
    assert model_class.from_pretrained(tmp_path / "folder").dtype is torch.float32
    same_parameters(model_class.from_pretrained(tmp_path / "file"), merge(ours))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "file").vocab_size == ours.config.vocab_size


def test_plan(folders, tmp_path, capsys):
    published, dense = folders("mxfp4", gpt_oss)
    plans = []
    for folder in (published, dense):
        (folder / "model.safetensors").rename(tmp_path / f"{folder.name}.safetensors")  # plan needs the config alone
        main(["plan", str(folder), "--sequence_length", "16", "--r", "2"])
        plans.append(capsys.readouterr().out)
        (tmp_path / f"{folder.name}.safetensors").rename(folder / "model.safetensors")
    assert plans[0] == plans[1] and "4 experts of 64x64" in plans[0]


def store_quantization(folder, **stored):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))


def test_what_cannot_be_dequantized_is_said(folders, tmp_path, monkeypatch):
    published, _ = folders("mxfp4", gpt_oss)
    convert(model := made(gpt_oss), r=2)
    adapter = adapter_of(model)
    store_quantization(published, quant_method="gptq", bits=4)
    with pytest.raises(ImportError, match=r"is in 'gptq', so .* use a folder of the model in 16 bits"):
        loaded(published)
    with pytest.raises(ValueError, match=r"published: is in 'gptq'. .* in 16 bits"):
        merge_folder(published, adapter, tmp_path / "out")
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    store_quantization(published, **CONFIGS["ct-fp8"])
    with pytest.raises(ImportError, match="pip install compressed-tensors"):
        loaded(published)


def test_a_format_that_transformers_loads_and_does_not_dequantize_is_a_warning(folders):
    published, _ = folders("mxfp4", gpt_oss)
    store_quantization(published, quant_method="bitsandbytes", load_in_8bit=True)
    with (
        pytest.warns(UserWarning, match=r"is in 'bitsandbytes', so its layers would not be converted"),
        suppress(Exception),
    ):
        loaded(published)


def test_a_quantization_config_of_the_call_is_transformers_own(folders):
    published, _ = folders("mxfp4", gpt_oss)
    with QLoRAPrecision(r=2).init():
        model = dequantized(published, "mxfp4")
    assert not adapted_layers(model)


EXPERTS = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 96}


def large_qwen3_moe():
    return qwen3_moe(**EXPERTS, moe_intermediate_size=256, num_experts=32)


def large_gpt_oss():
    kind, config = gpt_oss()
    more = {"intermediate_size": 256, "num_local_experts": 32, "head_dim": 64, "num_attention_heads": 8}
    return kind, type(config)(**{**config.to_dict(), **EXPERTS, **more, "layer_types": None})


def large_llama():
    return llama(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)


@pytest.mark.slow
@of_5_23
@pytest.mark.parametrize(
    ("format", "build"),
    [
        (None, large_qwen3_moe),
        ("bitsandbytes", large_qwen3_moe),
        ("fp8", large_qwen3_moe),
        ("ct-int4", large_qwen3_moe),
        ("ct-nvfp4", large_qwen3_moe),
        ("mxfp4", large_gpt_oss),
        (None, large_llama),
        ("fp8", large_llama),
        ("ct-fp8", large_llama),
        ("ct-int4", large_llama),
    ],
)
def test_200_mb_in_16_bits_never_stand_in_memory(format, build, tmp_path):
    """Peak of anonymous memory above the start, adapters of rank 8 included: at most half of the 16-bit size."""
    kind, config = build()
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    model = kind(config).to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if format == "bitsandbytes":
        model.save_pretrained(tmp_path / "base")
        save_in_4_bits(kind, tmp_path / "base", tmp_path / "folder")
    elif format is None:
        model.save_pretrained(tmp_path / "folder", max_shard_size="60MB")
    else:
        written(model, format, tmp_path / "folder")
    del model
    run = run_python("-m", "tests.scripts.memory_of_loading", tmp_path / "folder", "8")
    peak, end = re.search(r"peak ([\d.]+) MB, end ([\d.]+) MB", run.stdout).groups()
    files = sum(file.stat().st_size for file in (tmp_path / "folder").glob("model*"))
    print(
        f"{format} {build.__name__}: files {files / 2**20:.0f} MB, peak {peak} MB of {size / 2**20:.0f} MB, end {end}"
    )
    assert float(peak) * 2**20 <= 0.5 * size
