import copy

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.activations import recomputed
from lightning_qlora.activations.gradient_checkpointing import (
    transformers_checkpointing_layers,
)
from tests.toys import NAMES, Lit, ids, perturb, toy

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.calls = 0

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        return x + scale * self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def gradients(module, loss):
    torch.manual_seed(1)
    loss().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def saved_bytes(run):
    """Bytes that autograd keeps between forward and backward, each storage counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def pair(module):
    """The same module converted without and with gradient checkpointing."""
    other = copy.deepcopy(module)
    convert(module, **ARGUMENTS)
    convert(other, **ARGUMENTS, gradient_checkpointing=True)
    return perturb(module), perturb(other)


def same(a, b):
    assert a
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_any_module_recomputes_its_blocks_with_equal_gradients(training):
    torch.manual_seed(0)
    plain, checkpointed = pair(Plain().train(training))
    x = torch.randn(256, 64)
    same(gradients(plain, lambda: plain(x).sum()), gradients(checkpointed, lambda: checkpointed(x).sum()))
    assert [block.calls for block in plain.blocks] == [1] * 6
    assert [block.calls for block in checkpointed.blocks] == [2] * 6
    with torch.no_grad():
        checkpointed(x)
    assert [block.calls for block in checkpointed.blocks] == [3] * 6
    kept = [saved_bytes(lambda m=m: m(x.clone().requires_grad_())) for m in (plain, checkpointed)]
    assert kept[1] < kept[0] / 2


def test_a_block_keeps_the_forward_method_that_was_put_in_its_place_and_is_wrapped_once_also_in_a_copy():
    module = Plain()
    calls = []
    block = module.blocks[0]
    original = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    convert(module, **ARGUMENTS, gradient_checkpointing=True)
    module.more = nn.Linear(64, 64)
    convert(module, **ARGUMENTS, gradient_checkpointing=True)
    other = copy.deepcopy(module)
    module(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert len(calls) == block.calls == module.blocks[1].calls == 2 and other.blocks[1].calls == 0
    other(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert other.blocks[1].calls == module.blocks[1].calls == 2


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        nn.Sequential(Block(), nn.Linear(64, 64)),
    ],
    ids=("layers", "one block"),
)
def test_a_module_without_blocks_warns(module):
    with pytest.warns(UserWarning, match="Sequential has no repeated blocks"):
        convert(copy.deepcopy(module), **ARGUMENTS, gradient_checkpointing=True)


@pytest.fixture
def count_recomputed(monkeypatch):
    calls = []
    original = recomputed.checkpoint
    monkeypatch.setattr(recomputed, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("name", [*NAMES, "opt"])
def test_transformers_under_the_trainer(name, trainer, count_recomputed):
    """In eval mode, which Lightning does not change: layers are recomputed, and their own dropout stays off."""
    import transformers

    from tests.architectures.models import build

    seen = {}
    for checkpointing in (False, True):
        lit = Recording(build("opt", transformers.AutoModelForCausalLM) if name == "opt" else toy(name))
        plugin = QLoRAPrecision(**ARGUMENTS, gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        trainer(plugins=plugin, max_steps=2, num_sanity_val_steps=0).fit(lit)
        assert not any(layer.training for layer in transformers_checkpointing_layers(lit))
        seen[checkpointing] = lit.grads
        assert bool(count_recomputed) == checkpointing
    same(seen[False], seen[True])


def test_layers_that_transformers_recomputes_already_are_recomputed_once(count_recomputed):
    model = toy("llama").train()
    model.gradient_checkpointing_enable()
    convert(model, **ARGUMENTS, gradient_checkpointing=True)
    model(input_ids=ids(), labels=ids()).loss.backward()
    layers = list(transformers_checkpointing_layers(model))
    assert len(count_recomputed) == len(layers) > 1 and not any(layer.gradient_checkpointing for layer in layers)


class WithKeywords(nn.Module):
    """Has keywords that `torch.utils.checkpoint` takes for its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.calls = []

    def forward(self, x, *, debug=0.0, early_stop=0.0, context_fn=0.0, preserve_rng_state=0.0, determinism_check=0.0):
        self.calls.append(1)
        return self.linear(x) + debug + early_stop + context_fn + preserve_rng_state + determinism_check


@pytest.mark.parametrize("setting", [True, "auto"])
def test_keywords_of_a_block_reach_it(setting):
    module = nn.Sequential(WithKeywords(), WithKeywords())
    convert(module, **ARGUMENTS, gradient_checkpointing=setting)
    x = torch.randn(2, 64)
    names = ("debug", "early_stop", "context_fn", "preserve_rng_state", "determinism_check")
    keywords = {name: float(2**number) for number, name in enumerate(names)}
    y = module[0].eval()(x, **keywords)
    y.sum().backward()
    torch.testing.assert_close(y - module[0](x), torch.full_like(y, 31.0))
    assert len(module[0].calls) == 3


class Recording(Lit):
    def on_after_backward(self):
        self.grads = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def test_transformers_keep_fewer_activations_and_can_generate_between_steps(trainer):
    kept = {}
    tokens = {}

    class Generating(Lit):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                tokens[len(kept)] = self.model.generate(ids(1, 5), max_new_tokens=6, do_sample=False, pad_token_id=0)
            losses = []
            x = ids(8, 32)
            kept[len(kept)] = saved_bytes(lambda: losses.append(self.model(input_ids=x, labels=x).loss))
            return losses[0]

    for checkpointing in (False, True):
        lit = Generating(toy("llama", num_hidden_layers=6))
        plugin = QLoRAPrecision(**{**ARGUMENTS, "lora_dropout": 0.0}, gradient_checkpointing=checkpointing)
        trainer(plugins=plugin, max_steps=1).fit(lit)
    assert torch.equal(tokens[0], tokens[1])
    assert kept[1] < kept[0] / 2


class Stages(nn.Module):
    """Nested lists of blocks and of None, as in PVT and Informer; only blocks are called."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([Block(), None]) for _ in range(3))

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = x if block is None else block(x)
        return x


def test_blocks_in_nested_lists_are_recomputed():
    plain, checkpointed = pair(Stages())
    x = torch.randn(8, 64)
    same(gradients(plain, lambda: plain(x).sum()), gradients(checkpointed, lambda: checkpointed(x).sum()))
    assert [stage[0].calls for stage in checkpointed.stages] == [2] * 3


class Unwrapped(Plain):
    """Uses the parts of its blocks, and calls no block."""

    def forward(self, x):
        for block in self.blocks:
            x = x + block.down(torch.relu(block.up(x)))
        return x


@pytest.mark.parametrize("kind", ["t5gemma", "imagegpt"])
def test_models_that_cache_unless_told_not_to_train_with_equal_gradients(kind):
    from tests.architectures.checks import lit_of

    lit = lit_of(kind)
    lit.model.config.use_cache = True
    plain, checkpointed = pair(lit)
    plain.inputs = {**plain.inputs, "use_cache": False}
    same(gradients(plain, plain.training_step), gradients(checkpointed, checkpointed.training_step))
    del plain.inputs["use_cache"]
    with torch.no_grad():  # the cache is off only where autograd records
        outputs = [lit.model(**lit.inputs).keys() for lit in (plain, checkpointed)]
    assert outputs[0] == outputs[1]
