"""Experts in 4 bits against the same model with dense experts W + s B A: outputs and gradients, in every layout."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lightning_qlora import QLoRAConfig, convert, disable_adapter, merge
from lightning_qlora.experts import experts
from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.kernels import reference
from lightning_qlora.layers.readable_weight import ReadableWeight
from lightning_qlora.selection.apply import convert_layer
from lightning_qlora.selection.selection import select_layers
from tests.toys import assert_equal, expert_stacks, perturb
from tests.twin import dense_twin

transformers = pytest.importorskip("transformers")
from tests.architectures.models import configuration  # noqa: E402

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIG = QLoRAConfig(r=2, lora_alpha=4, lora_dropout=0.0)


def qwen3_moe(**changes):
    more = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96}
    return transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**{**SMALL, **more, "head_dim": 16, **changes})


def architecture(kind):
    """What builds the tiny model of tests/architectures."""

    def build():
        config = configuration(kind)
        return transformers.AutoModelForCausalLM._model_mapping[type(config)], config

    build.__name__ = kind
    return build


OTHERS = {kind: architecture(kind) for kind in ("gpt_oss", "nemotron_h", "jetmoe", "dbrx", "llama4_text")}
gpt_oss, nemotron_h, jetmoe, dbrx, llama4 = OTHERS.values()
MODELS = {"qwen3_moe": qwen3_moe, **OTHERS}


def made(build):
    kind, config = build()
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def convert_stacks(model):
    """Every stack of experts, and no other layer: name of the stack -> dense parameter that it was."""
    dense = {}
    for name, row in select_layers(model, CONFIG).convert.items():
        if row.stack is not None:
            dense[name] = row.owner._parameters[row.key]
            convert_layer(row)
    for stack in stacks_of(model):
        stack.lora_B.data.normal_(std=0.05)
    return dense


def in_4_bits(build):
    model = made(build)
    convert_stacks(model)
    return model


def stacks_of(model):
    return [stack for *_, stack in expert_stacks(model.named_modules())]


def outputs(model):
    ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("build", MODELS.values())
def test_outputs_and_gradients_are_those_of_dense_experts(build):
    """Without adapters those of the decoded weights; and a stack that is merged is the parameter that it was."""
    model = made(build)
    reference = copy.deepcopy(model)
    dense = convert_stacks(model)
    assert dense and dense.keys().isdisjoint(dict(model.named_parameters()))
    loss = outputs(model).loss
    loss.backward()
    stacks = [*expert_stacks(model.named_modules())]
    assert len([*model.modules()]) == len([*reference.modules()]) + len(dense)  # one for all experts of a parameter
    holders = {name: reference.get_submodule(name.rpartition(".")[0]) for name, *_ in stacks}
    for name, owner, key, stack in stacks:
        assert stack.effective_weight().shape == getattr(owner, key).shape == dense[name].shape
        holders[name]._parameters[key] = nn.Parameter(stack.decode())
    with disable_adapter(model):
        assert_close(outputs(model).loss, outputs(reference).loss, rtol=1e-5, atol=1e-5)
    for name, _, key, stack in stacks:
        holders[name]._parameters[key] = nn.Parameter(stack.effective_weight().detach())
    expected = outputs(reference).loss
    expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    reached = 0
    for name, _, key, stack in stacks:
        grads = holders[name]._parameters[key].grad
        grads = stack._as_stored(grads.view(len(stack), -1, grads.shape[-1]))
        for number, grad in enumerate(grads):
            reached += bool(grad.any())
            of_a = stack.scaling * stack.lora_B[number].T @ grad
            of_b = stack.scaling * grad @ stack.lora_A[number].T
            for ours, other in ((stack.lora_A, of_a), (stack.lora_B, of_b)):
                scale = max(other.abs().max().item(), 1e-6)
                assert_close(ours.grad[number], other, rtol=1e-3, atol=1e-4 * scale)
    assert reached > len(dense)
    merge(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in reference.modules()]
    ours, dense = (dict(each.named_parameters()) for each in (model, reference))
    assert [*ours] == [*dense] and not any(p.requires_grad for p in ours.values())
    assert_close(ours, dense, rtol=1e-6, atol=1e-7)
    assert_close(outputs(model).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss])
def test_a_stack_beside_one_that_stays_dense(build):
    model = made(build)
    plain = copy.deepcopy(model)
    convert(model, r=2, lora_dropout=0.0, target_modules=["gate_up_proj"])
    twin = dense_twin(perturb(model), plain)
    assert_close(outputs(model).loss, outputs(twin).loss, rtol=1e-5, atol=1e-5)


def test_only_the_experts_that_tokens_reached_are_decoded_and_never_the_stack(monkeypatch):
    model = in_4_bits(lambda: qwen3_moe(num_experts=16))
    monkeypatch.setattr(QLoRAExperts, "effective_weight", lambda self: pytest.fail("the stack was decoded"))
    called = []
    compute = QLoRAExperts.compute

    def count(stack, x, matrix, bias):
        called.append((stack, matrix.number))
        return compute(stack, x, matrix, bias)

    monkeypatch.setattr(QLoRAExperts, "compute", count)
    ids = torch.tensor([[5]])
    model(input_ids=ids)
    assert len(called) == len(set(called)) == 2 * 2 * 2  # layers, experts of the one token, stacks


def uses(tensor, parameter):
    """How many functions of the graph of a tensor have a gradient for a parameter, each of its whole size."""
    nodes = [tensor.grad_fn]
    seen = {tensor.grad_fn}
    count = 0
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if getattr(node, "variable", None) is parameter:
                count += 1
            elif node is not None and node not in seen:
                seen.add(node)
                nodes.append(node)
    return count


@pytest.mark.parametrize("build", [jetmoe, dbrx])
def test_a_model_that_reads_one_expert_after_the_other_makes_one_gradient_of_all(build):
    model = in_4_bits(build)
    loss = outputs(model).loss
    parameters = [p for stack in stacks_of(model) for p in stack.adapter_parameters()]
    assert {uses(loss, p) for p in parameters} == {1}


def test_experts_that_are_read_by_number_train_as_dense_ones():
    """Steps, two backward passes before a step, a pass without gradients, a copy, and new values in between."""
    model = made(jetmoe)
    dense = convert_stacks(model)
    (name, owner, key, stack), *_ = expert_stacks(model.named_modules())
    base = stack.decode()
    a, b = (p.detach().clone().requires_grad_() for p in (stack.lora_A, stack.lora_B))
    optimizers = [torch.optim.AdamW(p, lr=0.1) for p in ([stack.lora_A, stack.lora_B], [a, b])]
    draw = torch.Generator().manual_seed(0)
    for step in range(6):
        for _ in range(1 + step % 2):
            x = torch.randn(3, base.shape[-1], generator=draw)
            ours = sum((x @ getattr(owner, key)[i].T).square().mean() for i in range(len(stack)))
            expected = (x @ (base + stack.scaling * b @ a).mT).square().mean((1, 2)).sum()
            ours.backward()
            expected.backward()
            assert_close(ours, expected)
        with torch.no_grad():
            assert not getattr(owner, key)[1].sum().requires_grad
        for ours, expected in ((stack.lora_A, a), (stack.lora_B, b)):
            assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            again = copy.deepcopy(pickle.loads(pickle.dumps(model)))
            assert_close(again.get_submodule(name.rpartition(".")[0]).weight[1] + 0, stack.weight[1] + 0)
            stack.lora_B.data = b.data = b.detach() * 2
    assert name in dense


def test_an_index_means_what_it_means_for_a_tensor():
    model = in_4_bits(qwen3_moe)
    stack = model.model.layers[0].mlp.experts.down_proj
    dense = stack + 0
    tensors = [torch.tensor(True), torch.tensor(1, dtype=torch.uint8), torch.tensor(3), torch.tensor([3, 1])]
    for index in (True, False, None, slice(1, 3), [0, 2], -1, 0, (1, 2), (1, slice(None), 3), ..., *tensors):
        assert_close(stack[index] + 0, dense[index])
    for refused in (6, -7, 1.0, torch.tensor(1.0)):
        with pytest.raises(IndexError):
            stack[refused]
    for read in (list, torch.unbind, lambda stack: stack.unbind(0)):
        weights = read(stack)
        assert all(isinstance(weight, ReadableWeight) for weight in weights)  # so no dense stack was made
        assert_close(torch.stack([weight + 0 for weight in weights]), dense)
    assert_close(stack.unbind(1), dense.unbind(1))


def test_views_of_a_flat_stack_and_batched_products():
    model = in_4_bits(dbrx)
    flat = model.transformer.blocks[0].ffn.experts.mlp.w1
    dense = flat + 0
    assert_close(flat[3] + 0, dense[3])
    assert_close([*flat], [*dense])
    for shape in ((4, 32, 64), (-1, 32, 64), (8, -1), (2, 2, 32, 64)):
        for view in (flat.view(*shape), flat.reshape(shape)):
            assert view.detach().shape == view.shape and not view.detach().requires_grad
            assert_close(view[1] + 0, dense.view(shape)[1])
    x = torch.randn(5, 64)
    assert_close(F.linear(x, flat.detach().view(4, 32, 64)[2]), x @ dense[64:96].T)
    for build in (gpt_oss, qwen3_moe):
        stack = in_4_bits(build).model.layers[0].mlp.experts.down_proj
        x = torch.randn(stack.shape[0], 3, stack.shape[1])
        for product in (torch.bmm(x, stack), x.bmm(stack)):
            assert_close(product, torch.bmm(x, stack + 0))


def test_experts_of_older_versions_of_transformers():
    """Before 5.20 they have no flag for a norm."""
    model = in_4_bits(qwen3_moe)
    expected = outputs(model).logits
    for part in model.modules():
        vars(part).pop("has_post_expert_norm", None)
    assert not any(hasattr(part, "has_post_expert_norm") for part in model.modules())
    assert_equal(outputs(model).logits, expected)


def test_a_norm_of_the_outputs_of_experts_as_muse_spark_has_it():
    model = made(qwen3_moe)
    owners = [part for part in model.modules() if hasattr(part, "has_post_expert_norm")]
    if not owners:
        pytest.skip("needs transformers 5.20")
    for owner in owners:
        owner.has_post_expert_norm = True
        owner.post_expert_norm = nn.RMSNorm(64).requires_grad_(False)
        nn.init.normal_(owner.post_expert_norm.weight)
    dense = copy.deepcopy(model)
    dense.set_experts_implementation("batched_mm")
    assert convert_stacks(model)
    for name, _, key, stack in expert_stacks(model.named_modules()):
        dense.get_submodule(name.rpartition(".")[0])._parameters[key] = nn.Parameter(stack.effective_weight())
    assert_close(outputs(model).logits, outputs(dense).logits, rtol=1e-4, atol=1e-5)


def test_the_stack_can_be_read_but_not_written():
    model = in_4_bits(qwen3_moe)
    owner = model.model.layers[0].mlp.experts
    assert owner.gate_up_proj.dtype is torch.float32 and len(owner.gate_up_proj) == 6
    total = owner.gate_up_proj.sum()
    total.backward()
    assert owner.gate_up_proj_experts.lora_B.grad.flatten(1).any(dim=1).all()
    line = "experts=6, in_features=64, out_features=64, nf4, block_size=64, r=2, scaling=2"
    assert str(owner.gate_up_proj_experts) == f"QLoRAExperts({line})"
    for write in (lambda w: w.mul_(2), lambda w: w.__setitem__(0, 0.0), lambda w: w.data.normal_()):
        with pytest.raises(RuntimeError, match="read-only"):
            write(owner.gate_up_proj)


def test_the_inputs_of_each_expert_count_for_a_calibration_in_one_launch_too(monkeypatch):
    sums = []
    for together in (False, True):
        if together:
            monkeypatch.setattr(experts, "INTERPRETED", True)
            monkeypatch.setattr(experts, "can_group", lambda *_: True)
            monkeypatch.setattr(experts, "grouped_linear", lambda *arguments: reference.grouped_linear(*arguments)[0])
        model = made(qwen3_moe)
        convert(model, r=2, lora_dropout=0.0, init_lora_weights="calibrated")
        outputs(model.train())
        sums.append([stack.input_observer.sums for stack in stacks_of(model)])
    assert all(each[:, -1].sum() == 32 for each in sums[0])  # 16 tokens have two experts each
    assert_close(*sums, rtol=1e-4, atol=1e-6)


def test_a_number_beyond_the_experts_means_none():
    model = made(gpt_oss)
    convert_stacks(model)
    experts = model.model.layers[0].mlp.experts
    count = len(experts.down_proj)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    ours = experts(x, torch.tensor([[0, count], [count, 1], [2, count + 3]]), weights)
    chosen = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(ours, experts(x, torch.tensor([[0, 0], [1, 1], [2, 2]]), weights * chosen))


def test_no_token_at_all():
    model = in_4_bits(qwen3_moe)
    owner = model.model.layers[0].mlp.experts
    y = owner(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 64)
    masked = owner(torch.randn(3, 64), torch.full((3, 2), 6), torch.ones(3, 2))  # 6 experts: number 6 is none
    assert torch.equal(masked, torch.zeros(3, 64))
