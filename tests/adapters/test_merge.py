"""Merging in memory: the dense layers compute what base and adapter did; 16-bit weights are rounded stochastically."""

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRALinear, convert, merge
from lightning_qlora.kernels.rounding import round_stochastically
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.toys import ARGUMENTS, Lit, converted, delta, logits, perturb, toy

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_merged_module_has_its_dense_layers_and_the_same_output(name):
    lit = converted(name)
    before = logits(lit.model)
    classes = {n: type(m) for n, m in toy(name).named_modules()}
    assert merge(lit) is lit
    assert not any(isinstance(layer, QLoRALinear) for layer in lit.modules())
    assert {n: type(m) for n, m in lit.model.named_modules()} == classes
    torch.testing.assert_close(logits(lit.model), before, atol=1e-5, rtol=0)
    assert lit.model.state_dict().keys() == toy(name).state_dict().keys()
    lit.load_state_dict(Lit(toy(name)).state_dict())
    torch.testing.assert_close(logits(lit.model), logits(toy(name)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # Conv1D has its weight as [in, out]
def test_a_part_of_a_module_can_be_merged(name):
    lit = converted(name)
    merge(lit.model)
    assert lit.state_dict().keys() == Lit(toy(name)).state_dict().keys()
    merge(lit)
    assert lit.state_dict().keys() == Lit(toy(name)).state_dict().keys()


def test_with_dtype_all_parameters_have_it():
    lit = converted("llama")
    before = logits(lit.model)
    merge(lit, dtype="bf16")
    assert {p.dtype for p in lit.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(lit.model).float(), before, atol=0.05, rtol=0.05)


def test_attributes_and_hooks_stay_and_the_module_can_be_converted_again():
    lit = converted("llama")
    layer = lit.model.model.layers[0].self_attn.q_proj
    layer.mine = 3
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    merge(lit)
    logits(lit.model)
    assert layer.mine == 3 and calls == [1] and type(layer) is nn.Linear
    convert(lit, **ARGUMENTS)
    assert isinstance(layer, QLoRALinear)
    assert not any(key.endswith("embed_tokens.weight") for key in lit.state_dict())


def test_errors():
    with pytest.raises(ValueError, match="has no adapter"):
        merge(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dtype='4bit': must be one of 'auto'"):
        merge(converted("llama"), dtype="4bit")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_16_bits_can_hold_are_not_rounded(dtype):
    weight = torch.cat([torch.randn(4096), torch.zeros(3), torch.tensor([1.0, -2.0, 0.5, 1e-3])]).to(dtype)
    assert torch.equal(round_stochastically(weight.float(), dtype), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-2, 2e-7])
def test_rounding_keeps_the_mean_and_errs_by_less_than_a_step(dtype, size):
    """A change of a tenth of a step, which rounding to the nearest would lose altogether."""
    base = (torch.randn(1 << 16).abs() + 0.5).mul(size).to(dtype).float()
    step = torch.nextafter(base.to(dtype), torch.full_like(base, 9).to(dtype)).float() - base
    moved = base + 0.1 * step
    assert torch.equal(moved.to(dtype).float(), base)
    rounded = round_stochastically(moved, dtype).float()
    assert ((rounded - moved).abs() <= step * 1.001).all()
    kept = ((rounded - base).sum() / (moved - base).sum()).item()
    assert kept == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merge_gives_the_weights_that_other_code_read(dtype):
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(dtype)
    convert(net, r=4)
    perturb(net)
    read = [layer.weight.detach() + 0 for layer in net]  # in fp32 where the module is held in it
    for layer, weight in zip(merge(net), read, strict=True):
        assert torch.equal(layer.weight, round_stochastically(weight, dtype))


def test_a_merge_under_autocast_has_the_sum_in_fp32():
    lit = converted("llama")
    expected = {name: layer.decode() + delta(layer) for name, layer in adapted_layers(lit).items()}
    with torch.autocast("cpu", torch.bfloat16):
        merge(lit)
    for name, weight in expected.items():
        torch.testing.assert_close(lit.get_submodule(name).weight, weight, atol=1e-6, rtol=1e-6)
