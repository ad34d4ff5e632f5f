"""A module in fp16 on a GPU with bf16: held in bf16, computes in it, and has fp16 in files and merged weights.

No card: `Run.decide` says what a card would say, and the CPU computes in bf16.
"""

import copy

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAConfig, convert, estimate_memory, load_adapter, merge, save_adapter
from lightning_qlora.conversion.convert import Run, convert_module
from lightning_qlora.dtypes.full_precision import hold
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.records import record_rounded
from lightning_qlora.tensors.device_types import Held
from lightning_qlora.tensors.held_types import in_types_before
from tests.toys import ARGUMENTS, assert_equal, ids, perturb, toy
from tests.twin import dense_twin

pytest.importorskip("transformers")
BF16, FP16 = torch.bfloat16, torch.float16


def decide(_, dtype):
    return Held(BF16, "a card has bf16") if dtype is FP16 else None


def on_a_card(module, **arguments):
    return convert_module(module, QLoRAConfig(**ARGUMENTS | arguments), Run(decide=decide))


def step(module):
    loss = module(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def dense_types(module):
    """Those of parameters that do not train; A and B are fp32."""
    return {p.dtype for p in module.parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_step_is_that_of_the_same_bytes_in_bf16_and_follows_the_dense_twin(name):
    module, cast, plain = (toy(name).to(FP16) for _ in range(3))
    report = on_a_card(module)
    convert(cast, **ARGUMENTS, compute_dtype="bf16")
    cast.to(BF16)  # bytes of the fp16 weights, and what is dense rounded to bf16
    trained = dict(perturb(module).named_parameters())
    for key, parameter in cast.named_parameters():
        if parameter.requires_grad:
            parameter.data = trained[key].detach().clone()
    assert dense_types(module) == {BF16} == {layer.weight.dtype for layer in adapted_layers(module).values()}
    assert "kept in bf16, which rounds" in report.summary() and report.held == [(BF16, "a card has bf16")]
    loss, gradients = step(module)
    assert_equal((loss, gradients), step(cast))
    twin_loss = dense_twin(module, plain)(input_ids=ids(), labels=ids()).loss
    torch.testing.assert_close(loss.float(), twin_loss, rtol=1e-2, atol=1e-2)


def test_files_and_merged_weights_are_in_fp16():
    module = toy("llama").to(FP16)
    before = {name: p.dtype for name, p in module.named_parameters()}
    on_a_card(module, modules_to_save=["norm"])
    file = in_types_before(module, module.state_dict())
    dense = {name: value for name, value in file.items() if name in before}
    assert {*dense} == {"model.norm.weight"}, "frozen values stand in the file by their fingerprints"
    assert file["model.norm.weight"].dtype is torch.float32, "what trains in full"
    head = module.lm_head.weight.detach().clone()
    assert head.dtype is BF16
    merge(module)
    assert {name: p.dtype for name, p in module.named_parameters()} == before
    assert_equal(module.lm_head.weight.detach(), head.to(FP16))


@pytest.mark.parametrize("on_cards", [(True, False), (False, True), (True, True)])
def test_a_checkpoint_is_that_of_a_machine_without_a_card(on_cards, tmp_path):
    first, second = (toy("llama").to(FP16) for _ in range(2))
    for module, is_card in zip((first, second), on_cards, strict=True):
        if is_card:
            on_a_card(module, modules_to_save=["norm"])
        else:
            convert(module, **ARGUMENTS, modules_to_save=["norm"])
    perturb(first)
    state = in_types_before(first, first.state_dict())
    assert "lm_head.weight" not in state and "model.embed_tokens.weight" not in state
    second.load_state_dict(state)
    assert_equal(*({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (second, first)))
    save_adapter(first, tmp_path / "folder")
    perturb(second, seed=1)
    load_adapter(second, tmp_path / "folder")
    assert_equal(*({n: p for n, p in m.named_parameters() if "lora" in n} for m in (second, first)))


def test_a_value_that_code_writes_is_in_the_file():
    module = toy("llama").to(FP16)
    on_a_card(module)
    assert "lm_head.weight" not in module.state_dict()
    module.lm_head.weight.data.mul_(1.5)
    assert_equal(module.state_dict()["lm_head.weight"], module.lm_head.weight.data)


def test_a_new_head_in_fp16_trains_in_fp32_and_computes_in_bf16():
    module = toy("llama").to(FP16)
    on_a_card(module, modules_to_save=["lm_head"])
    head = module.lm_head.weight
    assert head.dtype is torch.float32 and head.requires_grad
    types = []
    module.lm_head.register_forward_hook(lambda *arguments: types.append(arguments[-1].dtype))
    value = head.detach().clone()
    loss, _ = step(module)
    assert types == [BF16] and loss.isfinite()
    torch.optim.AdamW([head], lr=1e-5).step()
    assert (head != value).float().mean() > 0.99, "a step of 1e-5 arrives"


def test_inputs_in_fp16_are_cast():
    plain = nn.Sequential(nn.Conv1d(4, 8, 1), nn.Flatten(), nn.Linear(64, 64)).to(FP16)
    module = copy.deepcopy(plain)
    on_a_card(module)
    x = torch.randn(2, 4, 8)
    output = module(x.half())
    assert output.dtype is BF16
    torch.testing.assert_close(output.float(), dense_twin(module, plain)(x.half().float()), rtol=2e-2, atol=2e-2)


def test_a_module_that_moves_gets_the_type_of_its_device():
    """bf16 on the card, fp32 on a CPU that is slow in 16 bits, fp16 on one that is not."""
    module = toy("llama").to(FP16)
    on_a_card(module)
    value = module.lm_head.weight.detach().clone()
    parts = [*module.modules()]
    for held, dtype in ((Held(torch.float32, "slow"), torch.float32), (None, FP16), (Held(BF16, "card"), BF16)):
        hold(parts, "auto", torch.device("cpu"), lambda _, dtype, held=held: held if dtype is FP16 else None)
        record_rounded(module.named_modules())
        assert dense_types(module) == {dtype} == {layer.weight_dtype for layer in adapted_layers(module).values()}
        assert_equal(module.lm_head.weight.detach().to(BF16), value)
        assert module(input_ids=ids()).logits.dtype is dtype
    assert "lm_head.weight" not in module.state_dict()


def test_the_planner_counts_it_as_bf16():
    estimates = [
        estimate_memory(toy("llama").to(dtype), batch_size=1, sequence_length=64, r=4, device="gpu")
        for dtype in (FP16, BF16)
    ]
    assert estimates[0].parts == estimates[1].parts
