"""Blocks that keep their activations while they fit: as with True and False, bit for bit, and never above the limit.

The device is a stand-in, so that the same blocks fit on every machine; the last test runs on this one.
"""

import copy
import gc
import pickle

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_qlora import QLoRAPrecision, convert, estimate_memory
from lightning_qlora.activations import activation_budget
from lightning_qlora.activations.activation_budget import MARGIN
from lightning_qlora.activations.device_memory import Memory, memory_of
from lightning_qlora.activations.gradient_checkpointing import budget_of
from lightning_qlora.tools.memory_estimate import LIBRARIES
from tests.conftest import launch, run_python
from tests.scripts import blocks_that_fit
from tests.toys import ARGUMENTS, LLAMA, Lit, assert_equal, ids, toy

pytest.importorskip("transformers")

BASE, REST = 10_000_000, 1_000_000  # bytes of the stand-in
DROPOUT = ARGUMENTS | {"lora_dropout": 0.1}


@pytest.fixture
def device(monkeypatch):
    """A device that has `device.available` bytes; of the first step it measures REST."""

    class Device:
        available = 10**12

    monkeypatch.setattr(activation_budget, "memory_of", lambda *_, **__: Memory(BASE, BASE + REST, Device.available))
    return Device


def converted(name="llama", setting="auto", **changes):
    module = toy(name, **changes).train()
    module.config.use_cache = False  # as where blocks are recomputed
    return module, convert(module, **DROPOUT, gradient_checkpointing=setting)


def step(module, tokens=12, seed=0):
    torch.manual_seed(seed)
    module.zero_grad()
    tokens = ids(columns=tokens)
    labels = torch.tensor([0, 1]) if "Classification" in type(module).__name__ else tokens
    loss = module(input_ids=tokens, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def limit_for(budget, blocks):
    """Bytes of a device on which so many blocks of the last step keep their activations."""
    size = budget.kept_bytes / budget.kept_blocks
    return int((BASE + REST + (blocks + 0.5) * size) / (1 - MARGIN))


@pytest.mark.parametrize(
    "name", ["llama", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2"))]
)
def test_gradients_are_those_of_true_and_false_whatever_fits(name, device):
    runs = {setting: converted(name, setting)[0] for setting in (False, True, "auto", "12MB", 2**40)}
    for tokens in (8, 16, 4, 8):
        results = [step(module, tokens) for module in runs.values()]
        for result in results[1:]:
            if name == "t5":  # its blocks share a bias of positions, whose gradients are added in another order
                torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-6)
            else:
                assert_equal(result, results[0])
    assert budget_of(runs["auto"].modules()).kept_blocks == budget_of(runs["auto"].modules()).blocks > 0
    assert budget_of(runs[True].modules()) is budget_of(runs[False].modules()) is None


def test_as_many_blocks_keep_their_activations_as_fit(device):
    module, report = converted(num_hidden_layers=6)
    budget = report.activations
    assert "all blocks are recomputed" in report.summary()
    step(module)
    assert (budget.blocks, budget.kept_blocks, budget.rest) == (6, 0, REST)
    step(module)
    assert (budget.blocks, budget.kept_blocks, budget.rest) == (6, 6, REST)
    for blocks in (2, 5, 0, 6):
        device.available = limit_for(budget, blocks)
        step(module)
        assert budget.kept_blocks == blocks and f"of 6 blocks {blocks} keep their activations" in report.summary()
        if not blocks:
            device.available = 10**12
            step(module)


def test_the_limit_of_the_user_counts_where_the_device_has_more(device):
    measured, _ = converted(num_hidden_layers=4)
    for _ in range(2):
        step(measured)
    module, _ = converted(setting=limit_for(budget_of(measured.modules()), 3), num_hidden_layers=4)
    for _ in range(3):
        step(module)
    assert budget_of(module.modules()).kept_blocks == 3


def test_trainer_and_fabric_say_once_what_happened(trainer, device, monkeypatch):
    told = []
    monkeypatch.setattr(activation_budget, "rank_zero_info", told.append)
    plugins = [QLoRAPrecision(**ARGUMENTS, gradient_checkpointing="auto") for _ in range(2)]
    trainer(plugins=plugins[0], max_steps=3, num_sanity_val_steps=0).fit(Lit(toy("llama")))
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins[1])
    module = fabric.setup_module(toy("llama").train())
    for _ in range(3):
        fabric.backward(module(input_ids=ids(), labels=ids()).loss)
    assert len(told) == 2
    for text, plugin in zip(told, plugins, strict=True):
        assert text.endswith("for activations of blocks.")
        assert "of 2 blocks 2 keep their activations (" in plugin.report.summary()


def test_a_longer_batch_recomputes_more(device):
    module, _ = converted(num_hidden_layers=4)
    budget = budget_of(module.modules())
    for _ in range(2):
        step(module, tokens=8)
    device.available = limit_for(budget, 4)
    kept = []
    for tokens in (8, 16, 8):
        step(module, tokens)
        kept.append(budget.kept_blocks)
    assert kept[0] == kept[2] == 4 > kept[1]


def test_several_forward_passes_before_a_backward_pass_share_the_budget(device):
    module, _ = converted(num_hidden_layers=4)
    budget = budget_of(module.modules())
    for _ in range(2):
        step(module)
    device.available = limit_for(budget, 6)
    losses = [module(input_ids=ids(), labels=ids()).loss for _ in range(2)]
    assert len(budget._calls) == 8 and budget.kept_blocks == 6  # four of the first, two of the second
    sum(losses).backward()
    assert not budget._calls
    step(module)
    assert budget.kept_blocks == 4


def test_a_measured_call_is_freed_without_a_backward_pass(device):
    """Longer inputs are measured, and sigmoid's output is saved by the graph that made it."""
    module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(2)))
    budget = convert(module, **ARGUMENTS, gradient_checkpointing="auto").activations
    module(torch.randn(2, 64)).sum().backward()
    for rows in (2, 3):
        module(torch.randn(rows, 64))
        gc.collect()
        assert budget.kept_blocks == 2 and not budget._calls


def test_nothing_stays_counted_after_an_error_or_without_a_backward_pass(device):
    module, _ = converted(num_hidden_layers=4)
    budget = budget_of(module.modules())
    for _ in range(2):
        step(module)
    output = module(input_ids=ids(), labels=ids())
    assert len(budget._calls) == 4
    del output
    gc.collect()
    assert not budget._calls
    handle = module.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(input_ids=ids(), labels=ids())
    handle.remove()
    gc.collect()
    assert not budget._calls
    with torch.no_grad():
        module(input_ids=ids(), labels=ids())
    module.eval()
    expected = step(module)
    assert budget.kept_blocks == 4 and not budget._calls
    assert_equal(step(module), expected)


def stack(setting):
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)))
    return module, convert(module, **DROPOUT, gradient_checkpointing=setting)


def in_blocks(module, x):
    for block in module:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def on_cpu(module, x):
    with torch.autograd.graph.save_on_cpu():
        return module(x)


def half_of_it(module, x):
    return module[2:](checkpoint(module[:2], x, use_reentrant=False))


FOREIGN_HOOKS = {
    "blocks": in_blocks,
    "model": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "reentrant": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "sequential": lambda module, x: checkpoint_sequential(module, 2, x, use_reentrant=False),
    "save_on_cpu": on_cpu,
    "half": half_of_it,
}


@pytest.mark.parametrize("call", FOREIGN_HOOKS.values(), ids=FOREIGN_HOOKS)
def test_blocks_inside_hooks_of_other_code_are_recomputed(call, device):
    """Both runs of a block inside a checkpoint do the same, also where the first runs before a step was measured."""
    results = {}
    for setting in (False, True, "auto", 2**40):
        module, report = stack(setting)
        x = torch.ones(3, 64, requires_grad=True)
        results[setting] = []
        for seed in range(3):
            torch.manual_seed(seed)
            module.zero_grad()
            y = call(module, x)
            y.square().sum().backward()
            results[setting] += [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
    for setting in (True, "auto", 2**40):
        torch.testing.assert_close(results[setting], results[False])
    outside = 2 if call in (half_of_it, FOREIGN_HOOKS["sequential"]) else 0  # the last part of a sequential
    budget = report.activations
    assert budget.kept_blocks == budget.blocks == outside
    assert ("of 2 blocks 2 keep" in report.summary()) is bool(outside)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_a_budget_of_its_own(copied, device):
    module, _ = converted()
    for _ in range(2):
        step(module)
    again = copied(module)
    assert budget_of(again.modules()) is not budget_of(module.modules()) and budget_of(again.modules()).capacity is None
    assert_equal(step(again), step(module))


@pytest.mark.slow
def test_a_compiled_module_recomputes_all_blocks(device):
    module, _ = converted()
    expected = step(module)
    compiled = torch.compile(module, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(compiled), expected)


class Blocks(nn.Module):
    """Blocks of two classes, whose inputs have other sizes, as a vision model has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(3))
        self.narrow = nn.ModuleList(nn.TransformerEncoderLayer(64, 2, 64, 0.0, batch_first=True) for _ in range(3))
        self.between = nn.Linear(128, 64)

    def forward(self, x):
        for block in self.wide:
            x = x + block(x)
        x = self.between(x)
        for block in self.narrow:
            x = block(x)
        return x


def test_blocks_of_two_classes_are_measured_apart(device):
    results = []
    for setting in (True, "auto"):
        module = Blocks()
        convert(module, **ARGUMENTS, gradient_checkpointing=setting)
        for _ in range(3):
            module.zero_grad()
            x = torch.ones(2, 5, 128)
            module(x).square().sum().backward()
        results.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert_equal(*results)
    sizes = budget_of(module.modules())._sizes
    assert len({size for _, size in sizes.values()}) == 2 and budget_of(module.modules()).kept_blocks == 6


def several_sizes(name):
    import transformers

    torch.manual_seed(0)
    if name == "swin":
        sizes = {"image_size": 32, "embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        module = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=3))
        return module, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    config = transformers.Qwen2MoeConfig(**LLAMA | {"num_hidden_layers": 4}, **sizes, mlp_only_layers=[0, 3])
    return transformers.Qwen2MoeForCausalLM(config), {"input_ids": ids(), "labels": ids()}


@pytest.mark.parametrize("name", ["swin", "experts"])
def test_blocks_of_one_class_and_several_sizes(name, device):
    """Layers of Swin's stages, which transformers can recompute, too; and layers with and without experts."""
    gradients = []
    for setting in (True, False, "auto"):
        module, inputs = several_sizes(name)
        budget = convert(module.train(), **ARGUMENTS, gradient_checkpointing=setting).activations
        for available in (10**12, 10**12, None):
            if available is None and budget is not None:
                assert budget.kept_blocks == budget.blocks == 4
                sizes = [budget._sizes[block][1] for block in budget._sizes if not isinstance(block, type)]
                assert budget.kept_bytes == sum(sizes) and len(set(sizes)) > 1
                available = int((BASE + REST + sizes[0] + sizes[1]) / (1 - MARGIN)) + 1
            device.available = available
            module.zero_grad()
            module(**inputs).loss.backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    assert_equal(gradients[1:], gradients[:1] * 2)
    assert 2 <= budget.kept_blocks < 4 and budget.kept_bytes <= budget.capacity


def test_what_a_block_keeps_is_what_autograd_saves_without_its_weights(device):
    """A linear layer keeps x and x A^T; GELU its input."""
    module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2)))
    convert(module, r=4, lora_dropout=0.0, gradient_checkpointing="auto")
    x = torch.randn(10, 64, requires_grad=True)
    for _ in range(2):
        module(x).sum().backward()
    budget = budget_of(module.modules())
    assert budget.kept_blocks == 2 and budget.kept_bytes == 2 * 4 * (10 * 4 + 10 * 64)


def test_this_machine_says_what_it_has():
    memory = memory_of(torch.device("cpu"))
    if memory is None:
        pytest.skip("no /proc")
    assert 0 < memory.used <= memory.peak and memory.used < memory.available
    assert memory_of(torch.device("meta")) is None


@pytest.mark.slow
def test_the_memory_of_a_process_stays_below_its_limit():
    done = run_python("-m", "tests.scripts.activation_limit")
    assert "below the limit" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_plan_says_how_many_blocks_keep_their_activations(name):
    """Of a process of its own, whose libraries take what `plan` expects."""
    module = blocks_that_fit.model(name)
    arguments = blocks_that_fit.ARGUMENTS | {"device": "cpu", "example": blocks_that_fit.inputs(name)}
    least, most = (estimate_memory(module, **arguments, gradient_checkpointing=how) for how in (True, 2**45))
    assert most.blocks == most.kept_blocks >= 10
    planned = []
    for share in (0.3, 0.7):
        limit = int((least.total + LIBRARIES + share * most.kept_bytes) / (1 - MARGIN))
        estimate = estimate_memory(module, **arguments, gradient_checkpointing=limit)
        assert least.total < estimate.total < most.total and f"{estimate.kept_blocks} keep theirs" in str(estimate)
        kept, blocks = run_python("-m", "tests.scripts.blocks_that_fit", name, limit).stdout.split("kept ")[1].split()
        assert int(blocks) == estimate.blocks and abs(int(kept) - estimate.kept_blocks) <= 2
        planned.append(estimate.kept_blocks)
    assert 0 < planned[0] < planned[1] < most.blocks


def test_ranks_decide_alone_unless_they_share_the_blocks(tmp_path):
    """Under DDP rank 0 keeps all, and rank 1 one block; FSDP2 and tensor parallelism recompute all."""
    ranks = launch("tests.scripts.blocks_on_ranks", tmp_path)[1]
    for rank in ranks:
        for strategy in ("ddp", "fsdp2", "tensor_parallel"):
            expected, none = rank[strategy, True]
            gradients, text = rank[strategy, "auto"]
            assert none == "None" and len(gradients) == 28
            assert_equal(gradients, expected)
            assert ("keep their activations" not in text) == (strategy != "ddp")
        assert "gradient checkpointing: all blocks are recomputed" in rank["fabric"]
    texts = [rank["ddp", "auto"][1] for rank in ranks]
    assert "of 2 blocks 2 keep" in texts[0] and "of 2 blocks 0 keep" in texts[1]
    assert_equal(ranks[0]["ddp", "auto"][0], ranks[1]["ddp", "auto"][0])
