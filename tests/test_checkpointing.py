import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.checkpointing import transformers_layers
from tests.toys import NAMES, Lit, ids, perturb, toy

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up, self.down, self.calls = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), 0

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
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5)


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


def test_a_converted_module_can_be_copied():
    module = Plain()
    convert(module, **ARGUMENTS, gradient_checkpointing=True)
    other = copy.deepcopy(module)
    other(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert other.blocks[0].calls == 2 and module.blocks[0].calls == 0


def test_a_module_without_blocks_says_so():
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="Sequential has no repeated blocks"):
        convert(module, **ARGUMENTS, gradient_checkpointing=True)


@pytest.fixture
def count_recomputed(monkeypatch):
    from lightning_qlora import checkpointing

    calls, original = [], checkpointing.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("name", [*NAMES, "opt"])
def test_transformers_under_the_trainer(name, trainer, count_recomputed):
    """In eval mode, as Lightning leaves them: recomputed, yet what the layers themselves drop out stays off."""
    pytest.importorskip("transformers")
    seen = {}
    for checkpointing in (False, True):
        lit = Recording(opt() if name == "opt" else toy(name))
        plugin = QLoRAPrecision(**ARGUMENTS, gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        trainer(plugins=plugin, max_steps=2, num_sanity_val_steps=0).fit(lit)
        assert not any(layer.training for layer in transformers_layers(lit))
        seen[checkpointing] = lit.grads
        assert bool(count_recomputed) == checkpointing
    same(seen[False], seen[True])


def opt():
    import transformers

    torch.manual_seed(0)
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, dropout=0.5,
            max_position_embeddings=64, word_embed_proj_dim=64,
        )
    ).eval()  # fmt: skip


class Recording(Lit):
    def on_after_backward(self):
        self.grads = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def test_transformers_keep_less_and_generate_in_between(trainer):
    pytest.importorskip("transformers")
    kept, tokens = {}, {}

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


def test_a_lightning_module_of_blocks_trains(trainer):
    class Blocks(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Plain(2)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(4, 64))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    lit = Blocks()
    trainer(plugins=QLoRAPrecision(**ARGUMENTS, gradient_checkpointing=True), max_steps=2).fit(lit)
    assert lit.net.blocks[0].calls == 4
