"""Attention of a module that is held in fp32 for a card without bf16. The CPU stands in for such a card."""

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.dtypes import attention, compute_in, full_precision, patches
from lightning_qlora.tensors import device_types
from tests.toys import ids, perturb, toy

modeling = pytest.importorskip("transformers.modeling_utils")
LENGTH = 24


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """A T4's answer, and models whose attention asks for it; the function of transformers comes back."""
    monkeypatch.setattr(compute_in, "lacks_bf16", lambda device: True)
    before = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]
    patches.replace_attention(attention.attend)
    yield
    modeling.AttentionInterface.register("sdpa", before)


@pytest.fixture
def types(monkeypatch):
    """The types that fused attention gets."""
    seen = []
    fused = nn.functional.scaled_dot_product_attention

    def record(q, *args, **kwargs):
        seen.append(q.dtype)
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    return seen


def held(name="llama", dtype=torch.bfloat16, target_modules="all-linear", **changes):
    module = toy(name, **changes).to(dtype)
    convert(module, r=4, lora_dropout=0.0, compute_dtype="fp16", target_modules=target_modules)
    return perturb(module)


def inputs():
    return ids()[:, :1].repeat(1, LENGTH) + torch.arange(LENGTH) % 7


def step(module, **arguments):
    module.zero_grad()
    tokens = inputs()
    loss = module(input_ids=tokens, labels=tokens, **arguments).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_near(ours, theirs, limit=3e-3):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= limit * other.norm() + 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_is_that_of_fp32(types, monkeypatch, name, padded):
    module = held(name)
    mask = torch.ones(len(inputs()), LENGTH, dtype=torch.long)
    if padded:
        mask[0, :9] = 0
    arguments = {"attention_mask": mask} if padded else {}
    ours = step(module, **arguments)
    assert {*types} <= {torch.float16} and (types or name == "t5")
    types.clear()
    monkeypatch.setattr(compute_in, "lacks_bf16", lambda device: False)
    # Scores of T5 are not divided by the root of the width, and have a bias, so that they are larger; what a rounding
    # does to the sign of an input of ReLU is larger still (fp16 layers beside fp32 ones: up to 4e-2).
    assert_near(ours, step(module, **arguments), 6e-2 if name == "t5" else 3e-3)
    assert {*types} <= {torch.float32}


def test_recomputed_blocks_and_dropout(types):
    module = held(attention_dropout=0.2).train()
    results = []
    for recompute in (False, True):
        if recompute:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        results.append(step(module))
    assert {*types} == {torch.float16}
    assert_near(*results)


def test_an_attention_whose_layers_stay_dense(types):
    step(held(target_modules=["down_proj"]))
    assert {*types} == {torch.float16}


def test_what_stays_in_fp32(types):
    """One query; a module that the user holds in fp32; one that is not converted; another type of device."""
    module = held()
    with torch.no_grad():
        module(input_ids=inputs()[:, :1])
        held(dtype=torch.float32)(input_ids=inputs())
        toy("llama")(input_ids=inputs())
    assert {*types} == {torch.float32}


def result(attention, module, mask=None, queries=LENGTH, keys=LENGTH, **options):
    """Of an attention of a model: its output, and the gradients of q, k and v."""
    draw = torch.Generator().manual_seed(5)
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    q, k, v = (torch.randn(shape, generator=draw).requires_grad_() for shape in shapes)
    y, _ = attention(module, q, k, v, mask, **options)
    y.square().sum().backward()
    return [y.detach(), q.grad, k.grad, v.grad]


def causal(masked, rows=0):
    """A mask, whose first rows have no key."""
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[:rows] = False
    return torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~visible, masked)


LOWEST = torch.finfo(torch.float32).min
PLACES = torch.arange(LENGTH).float()
ADDED = {
    "rows without a key": {"mask": causal(-torch.inf, rows=5)},
    "lowest numbers": {"mask": causal(LOWEST)},
    "above the numbers of fp16": {"mask": causal(-torch.inf) + 7e4},
    "large and fine": {"mask": causal(LOWEST) + 1500 + 0.3 * PLACES},
    "a bias": {"position_bias": 900 + 0.3 * PLACES.expand(1, 4, LENGTH, LENGTH), "is_causal": False},
    "a bias and a mask": {"position_bias": torch.eye(LENGTH).expand(1, 4, -1, -1), "mask": causal(LOWEST)},
}


@pytest.mark.parametrize("case", ADDED)
def test_what_is_added_to_scores(types, case):
    module = held().model.layers[0].self_attn
    ours = result(modeling.ALL_ATTENTION_FUNCTIONS["sdpa"], module, **ADDED[case])
    assert {*types} == {torch.float16}
    # fp32 itself rounds scores near 7e4 to 1 / 128.
    assert_near(ours, result(modeling.sdpa_attention_forward, module, **ADDED[case]), 1e-2)


@pytest.mark.parametrize("options", [{"scaling": 0.0}, {"scaling": -0.5}, {"dropout": 1.0}, {"keys": 0}])
def test_what_fp16_has_no_powers_for_stays_in_fp32(types, options):
    module = held().model.layers[0].self_attn
    ours = result(modeling.ALL_ATTENTION_FUNCTIONS["sdpa"], module, is_causal=False, **options)
    assert {*types} == {torch.float32}
    assert_near(ours, result(modeling.sdpa_attention_forward, module, is_causal=False, **options))


def test_arguments_by_position():
    q = torch.ones(1, 4, LENGTH, 8)
    y, _ = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Module(), q, q, q, None, 0.0, 0.3)
    assert torch.equal(y, modeling.sdpa_attention_forward(nn.Module(), q, q, q, None, 0.0, 0.3)[0])


def test_an_attention_that_the_user_registered_stays():
    def own(module, *args, **kwargs):
        return modeling.sdpa_attention_forward(module.of_user, *args, **kwargs)

    modeling.AttentionInterface.register("sdpa", own)
    patches.replace_attention(attention.attend)
    assert modeling.ALL_ATTENTION_FUNCTIONS["sdpa"] is own


def test_a_card_without_bf16_gets_it_when_a_module_is_held_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(full_precision.patches, "replace_attention", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for has_bf16 in (True, False):
        monkeypatch.setattr(device_types, "_cuda_has_bf16", lambda _, has_bf16=has_bf16: has_bf16)
        full_precision.hold([*toy("llama").bfloat16().modules()], "auto", torch.device("cuda"))
        assert asked == [] if has_bf16 else [attention.attend]
