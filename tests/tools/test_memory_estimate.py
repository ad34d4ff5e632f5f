import pytest
import torch
from torch import nn

from lightning_qlora import PagedAdamW8bit, convert, estimate_memory
from lightning_qlora.kernels import scratch
from lightning_qlora.training.report import count_parameters
from tests.conftest import Classifier
from tests.toys import NAMES, Lit, ids, toy
from tests.training.test_gradient_checkpointing import Plain, saved_bytes

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


def state_bytes(optimizer):
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
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
    assert (estimate.trainable_parameters, estimate.total_parameters) == (
        report.trainable_parameters, report.total_parameters,
    )  # fmt: skip
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
    lit = Lit(toy("llama", num_hidden_layers=8))
    plain = estimate_memory(lit, 4, 64, **ARGUMENTS)
    recomputed = estimate_memory(lit, 4, 64, gradient_checkpointing=True, **ARGUMENTS)
    twice = estimate_memory(lit, 8, 64, **ARGUMENTS)
    assert recomputed.parts["activations"] < 0.6 * plain.parts["activations"]
    assert twice.parts["activations"] == pytest.approx(2 * plain.parts["activations"], rel=0.05)


def test_optimizers():
    module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    found = {name: estimate_memory(module, optimizer=name, r=16).parts["optimizer state"] for name in STATES}
    convert(module, r=16)
    module(torch.randn(2, 512)).sum().backward()
    for name, make in STATES.items():
        optimizer = make([p for p in module.parameters() if p.requires_grad])
        optimizer.step()
        assert found[name] == pytest.approx(state_bytes(optimizer), rel=0.02)


STATES = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": lambda parameters: PagedAdamW8bit(parameters),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def test_any_module_with_an_example_and_without():
    estimate = estimate_memory(Plain(), example=torch.randn(256, 64), **ARGUMENTS)
    module = Plain()
    convert(module, **ARGUMENTS)
    kept = saved_bytes(lambda: module(torch.randn(256, 64)))
    assert kept == pytest.approx(estimate.parts["activations"], rel=0.2)
    without = estimate_memory(Classifier(), **ARGUMENTS)
    assert not without.counted_activations and "unknown" in str(without)
    example = {"x": torch.randn(2, 64)}
    assert estimate_memory(Classifier(), example=example, **ARGUMENTS).counted_activations


@pytest.mark.parametrize("start", ["loftq", "pissa", "calibrated", "gaussian"])
def test_the_initialization_does_not_change_the_estimate(start):
    model, example = nn.Sequential(nn.Linear(64, 64)), torch.zeros(4, 64)
    planned = estimate_memory(model, example=example, r=4, init_lora_weights=start)
    assert planned == estimate_memory(model, example=example, r=4)


def test_a_model_of_70_billion_weights_is_not_allocated():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    estimate = estimate_memory(config, 1, 512, r=64)
    bits = 8 * estimate.parts["4-bit weights"] / (4 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672))
    assert bits == pytest.approx(4.127, abs=0.002)  # paper: 4 + 8 / 64 + 32 / (64 * 256)
    assert "4-bit weights" in str(estimate) and "may move to host memory" in str(estimate)
    assert "may move" not in str(estimate_memory(config, 1, 512, paged_optimizer=False))


def test_a_folder_and_errors(tmp_path):
    pytest.importorskip("transformers")
    toy("llama").save_pretrained(tmp_path)
    assert estimate_memory(str(tmp_path), 2, 12, **ARGUMENTS) == estimate_memory(toy("llama"), 2, 12, **ARGUMENTS)
    with pytest.raises(ValueError, match="optimizer='lion': must be one of 'adamw'"):
        estimate_memory(toy("llama"), optimizer="lion")
    with pytest.raises(ValueError, match="batch_size=0: must be an integer >= 1"):
        estimate_memory(toy("llama"), batch_size=0)
    with pytest.raises(TypeError, match="must be a module, a transformers config, a folder or a hub name"):
        estimate_memory(3)


def test_a_converted_module_and_counts():
    module = toy("llama")
    plain = estimate_memory(module, 2, 12, **ARGUMENTS)
    assert plain.total_parameters == count_parameters_after(module)
    assert ids().shape == (2, 12)


def count_parameters_after(module):
    convert(module, **ARGUMENTS)
    return count_parameters(module)[1]


def fails(capfd, *arguments, **choices):
    capfd.readouterr()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        estimate_memory(*arguments, **{**ARGUMENTS, **choices})
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # torch's log of the traceback would come first
    return str(error.value)


def test_an_error_of_a_model_is_one_line_that_says_what_to_do(tmp_path, capfd):
    transformers = pytest.importorskip("transformers", minversion="5")
    too_long = fails(capfd, toy("bert").config, sequence_length=1000)
    assert too_long.startswith("BertLMHeadModel: can't be run with batch_size=1, sequence_length=1000")
    assert "It has 64 positions: choose a sequence_length of at most that." in too_long
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 4}  # fmt: skip
    # Dense experts run in one product that takes bf16 alone.
    mixture = transformers.MixtralConfig(**small, dtype="float32")
    assert estimate_memory(mixture, **ARGUMENTS).counted_activations
    mixture = fails(capfd, mixture, sequence_length=16, target_modules=["q_proj"])
    assert mixture.startswith("MixtralForCausalLM: can't be run") and "it may run in bfloat16" in mixture
    assert estimate_memory(transformers.MixtralConfig(**small, dtype="bfloat16"), **ARGUMENTS).counted_activations
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "a"}')
    wrong = fails(capfd, str(tmp_path))
    assert wrong.startswith(f"{tmp_path}: its config.json makes no model") and "hidden_size" in wrong
    assert "neither a folder with a config.json nor a model" in fails(capfd, str(tmp_path / "nothing"))


def test_a_model_that_reads_values_while_it_is_built():
    """ViT calls `linspace(...).item()` in its constructor, which fails on tensors without data."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    estimate = estimate_memory(config, **ARGUMENTS)
    assert not estimate.counted_activations and estimate.parts["4-bit weights"] > 0
    counted = estimate_memory(config, example={"pixel_values": torch.zeros(2, 3, 32, 32)}, **ARGUMENTS)
    assert counted.parts["activations"] > 0


@pytest.mark.parametrize("dora", [False, True])
def test_the_decode_buffer_is_what_a_step_allocates(dora):
    module = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512)).bfloat16()
    arguments = {**ARGUMENTS, "r": 100, "target_modules": ["0", "2"], "use_dora": dora}  # too many rows not to decode
    x = torch.randn(100, 512, dtype=torch.bfloat16)
    estimate = estimate_memory(module, example=x, **arguments)
    convert(module, **arguments)
    scratch.release()
    module(x).sum().backward()
    held = {key: buffer.nbytes for key, buffer in scratch._thread.buffers.items() if key[-1] == "weight"}
    assert estimate.parts["decode buffer"] == sum(held.values())
