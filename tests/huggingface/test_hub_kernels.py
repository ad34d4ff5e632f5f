"""Kernels of the hub (transformers from 5.25): forwards that `kernels` replaces, before and after conversion.

No card and no hub: norms, activations and feed-forward parts get local kernels for the CPU.
"""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_qlora import QLoRAPrecision, convert, merge
from tests.toys import ids, perturb, toy

kernels = pytest.importorskip("kernels", minversion="0.19")
pytest.importorskip("transformers", minversion="5.25")

CALLS = []


class KernelNorm(nn.Module):
    """As Liger's kernel: the input and the weight may have different types, and the output has that of the input."""

    def forward(self, hidden_states):
        CALLS.append("RMSNorm")
        values = hidden_states.float()
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * values).to(hidden_states.dtype)


class KernelSiLU(nn.Module):
    def forward(self, input):
        CALLS.append("SiLU")
        return nn.functional.silu(input)


class KernelMLP(nn.Module):
    def forward(self, x):
        CALLS.append("MLP")
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Repository:
    def __init__(self, kind):
        self.kind = kind

    def load(self):
        return self.kind


@pytest.fixture
def mapping():
    """The kernels of this file, for whatever `kernelize` is called within the test, as by `train()` and `eval()`."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    found = {"RMSNorm": KernelNorm, "SiLU": KernelSiLU, "MLP": KernelMLP}
    kernels.replace_kernel_forward_from_hub(LlamaMLP, "MLP")
    with kernels.use_kernel_mapping({name: {"cpu": Repository(kind)} for name, kind in found.items()}):
        yield
    del LlamaMLP.kernel_layer_name
    CALLS.clear()


def steps(module, count=3):
    """The losses of some steps, with `eval()` and `train()` between them, and all that trains."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(count):
        module.train()
        loss = module(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.eval()
        with torch.no_grad():
            losses += [loss.detach().float(), module(input_ids=ids(), labels=ids()).loss.float()]
    return losses, [p.detach().float() for p in trained]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("arguments", [{}, {"modules_to_save": ["norm"]}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_trains_as_without_kernels(mapping, before, arguments, dtype):
    module = toy("llama").to(dtype)
    plain = copy.deepcopy(module)
    arguments = {"r": 4, "lora_dropout": 0.0, "compute_dtype": "bf16", "deferred_logits": True, **arguments}
    if before:
        module.set_use_kernels(True)
    convert(module, **arguments)
    convert(plain, **arguments)
    perturb(module)
    perturb(plain)
    if not before:
        module.set_use_kernels(True)
    expected, trained = steps(plain)
    assert not CALLS
    losses, ours = steps(module)
    assert {"RMSNorm", "MLP"} <= {*CALLS}
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(ours, trained, strict=True):
        assert (one - other).norm() <= 10 * tolerance * other.norm()
    logits = module(input_ids=ids()).logits.float()
    merge(module)
    torch.testing.assert_close(module(input_ids=ids()).logits.float(), logits, rtol=0.1, atol=0.1)


def test_a_method_that_other_code_removed_is_an_error():
    """The audit of the first step asks; `kernels` removes the forward of a module that it has a kernel for."""
    module = toy("llama").bfloat16()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(r=4, modules_to_save=["norm"]))
    module = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1))
    del vars(module.module.model)["forward"]
    fabric.backward(module(input_ids=ids(), labels=ids()).loss)
    with pytest.raises(RuntimeError, match=r"model: other code removed the forward.*use_kernels=False"):
        optimizer.step()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_experts_in_4_bits_compute_by_this_package_whatever_implementation_is_chosen(before, monkeypatch):
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def local(self, *args):
        CALLS.append("experts")
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "local", local)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=128, num_local_experts=4)
    results = []
    for chosen in (False, True):
        torch.manual_seed(0)
        module = MixtralForCausalLM(config).eval()
        if chosen and before:
            module.set_experts_implementation("local")
            module(input_ids=ids())
            assert CALLS.count("experts") == 2
        convert(module, r=4, lora_dropout=0.0)
        perturb(module)
        if chosen and not before:
            module.set_experts_implementation("local")
        CALLS.clear()
        results.append(steps(module, 1))
        assert not CALLS
    torch.testing.assert_close(*results, rtol=0, atol=0)
