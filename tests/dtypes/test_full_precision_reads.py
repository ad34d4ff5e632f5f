"""Code that reads and writes what trains in full, in and outside of its forward pass, beside the module in 16 bits."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qlora import QLoRAPrecision, convert, merge
from tests.conftest import loader
from tests.machines.products import FAST, SLOW, stated
from tests.toys import LLAMA

transformers = pytest.importorskip("transformers")
SIZE = 64
CONFIG = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 1})


def loaded():
    """A model that was loaded from weights, in bf16: what stands beside it is new, and trains in full."""
    torch.manual_seed(0)
    weights = transformers.LlamaModel(CONFIG).bfloat16().state_dict()
    return transformers.LlamaModel.from_pretrained(None, config=CONFIG, state_dict=weights, dtype=torch.bfloat16)


class Mid(nn.Module):
    """A part with a method beside its forward pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE) / 4)
        self.norm = nn.LayerNorm(SIZE)

    def encode(self, x):
        return F.linear(x, self.weight)

    def project(self, x):
        return self.norm(x @ self.weight)

    def forward(self, x):
        return self.project(x)


class Reads(pl.LightningModule):
    """A module whose steps use parameters of its parts; `ways` says how."""

    def __init__(self, *ways):
        super().__init__()
        torch.manual_seed(0)
        self.ways = ways
        self.base = loaded()
        self.mid = Mid()
        self.seq = nn.Sequential(Mid())
        self.head = nn.Linear(SIZE, 8, bias=False)
        self.scale = nn.Parameter(torch.rand(SIZE))
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(SIZE))])
        self.losses = []
        self.bfloat16()

    def _inner(self, h):
        return F.linear(self.mid(h), self.mid.weight)

    def hidden(self, x):
        h = self.base(inputs_embeds=x.bfloat16()[:, None]).last_hidden_state[:, 0]
        if "scale" in self.ways:
            h = h * self.scale + self.scales[0]
        if "encode" in self.ways:
            h = self.mid.encode(h)
        if "project" in self.ways:
            h = self.seq[0].project(h)
        if "checkpoint" in self.ways:
            h = checkpoint(self._inner, h, use_reentrant=False)
        if "reentrant" in self.ways:
            h = checkpoint(self._inner, h, use_reentrant=True) + self.mid(h)
        if "no_grad" in self.ways:
            with torch.no_grad():
                teacher = self.mid(h)
            h = self.mid(h) + teacher
        return h

    def forward(self, x):
        h = self.hidden(x)
        if "matmul" in self.ways:
            return h @ self.head.weight.T
        if "linear" in self.ways:
            return F.linear(h, self.head.weight)
        assert isinstance(self.head.weight, nn.Parameter) and isinstance(self.scale, nn.Parameter)
        return self.head(h)

    def training_step(self, batch, _=0):
        x, y = batch
        loss = F.cross_entropy(self.forward(x).float(), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


WAYS = [("scale", "encode", "matmul"), ("project", "checkpoint", "linear"), ("reentrant", "no_grad")]
ARGUMENTS = {"r": 1, "lora_dropout": 0.0}


def losses_of(ways, loop, trainer):
    """The losses of three steps, the names without a gradient, and the module."""
    module = Reads(*ways)
    if loop == "trainer":
        run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), enable_checkpointing=False, max_steps=3)
        run.fit(module, loader())
    else:
        use = module
        if loop == "fabric":
            fabric = Fabric(accelerator="cpu", plugins=QLoRAPrecision(**ARGUMENTS))
            use = fabric.setup_module(module)
        else:
            convert(module, **ARGUMENTS)
        if loop == "16 bits":
            merge(module).base.requires_grad_(False)  # dense, with the decoded weights
            assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        optimizer = module.configure_optimizers()
        for batch, _ in zip(loader(), range(3), strict=False):
            optimizer.zero_grad()
            loss = use.training_step(batch)
            fabric.backward(loss) if loop == "fabric" else loss.backward()
            optimizer.step()
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    return module.losses, missing, module


@pytest.mark.parametrize(("ways", "fast"), [*((ways, True) for ways in WAYS), (WAYS[0], False)])
def test_reads_outside_of_a_forward_pass_compute_as_the_module_in_16_bits(ways, fast, trainer):
    """Where 16 bits are slow all of the module is held in fp32, as tests/dtypes/test_fp32_module.py says."""
    with stated(FAST if fast else SLOW):
        losses, missing, module = losses_of(ways, "plain", trainer)
        assert {p.dtype for p in module.parameters() if p.requires_grad or not fast} == {torch.float32}
        plain, missing_there, _ = losses_of(ways, "16 bits", trainer)
        torch.testing.assert_close(losses, plain, rtol=0, atol=0.02)
        assert {name for name in missing if "lora_" not in name} == set(missing_there)
        for loop in ("trainer", "fabric"):
            assert losses_of(ways, loop, trainer)[0] == losses


def test_a_module_around_a_part_that_was_converted_before_computes_the_same(trainer):
    expected, _, _ = losses_of(["linear"], "trainer", trainer)
    module = Reads("linear")
    convert(module, **ARGUMENTS)

    class Outer(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = module
            self.losses = []

        def forward(self, x):
            return F.linear(self.net.hidden(x), self.net.head.weight)

        training_step = Reads.training_step
        configure_optimizers = Reads.configure_optimizers

    outer = Outer()
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), enable_checkpointing=False, max_steps=3).fit(outer, loader())
    assert outer.losses == expected
    merge(outer)
    assert {p.dtype for p in outer.parameters()} == {torch.bfloat16} and type(outer) is Outer


class Writes(nn.Module):
    """CLIP's clamp of its scale, and SwAV's normalized prototypes, written by the module that holds the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = loaded()
        self.logit_scale = nn.Parameter(torch.tensor(9.0))
        self.prototypes = nn.Linear(SIZE, 8, bias=False)
        self.bfloat16()

    def forward(self, x):
        self.logit_scale.data.clamp_(max=4.6)
        self.before = self.prototypes(x)
        with torch.no_grad():
            weight = self.prototypes.weight
            weight.copy_(F.normalize(weight, dim=1))
        h = self.base(inputs_embeds=x[:, None]).last_hidden_state[:, 0]
        return self.prototypes(h) * self.logit_scale.exp()


def test_writes_in_a_forward_pass_arrive():
    plain = Writes()
    ours = Writes()
    convert(ours, **ARGUMENTS)
    x = torch.randn(4, SIZE).bfloat16()
    y = ours(x)
    expected = plain(x)
    assert y.dtype is ours.before.dtype is torch.bfloat16
    torch.testing.assert_close(ours.before, plain.before)
    assert ours.logit_scale.item() == pytest.approx(4.6)
    assert torch.allclose(ours.prototypes.weight.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.allclose(ours.prototypes.weight, plain.prototypes.weight.float(), atol=1e-2)
    assert ((y - expected).norm() / expected.norm()) < 0.15  # the 4-bit layers
    y.sum().backward()
    assert ours.logit_scale.grad is not None and ours.prototypes.weight.grad is not None


def test_a_part_can_be_changed_by_torch_after_conversion_and_an_error_leaves_autocast_as_it_was():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)).bfloat16()
    convert(model, **ARGUMENTS, target_modules=["0"], modules_to_save=["1"])
    x = torch.randn(4, SIZE).bfloat16()
    expected = model(x)
    with pytest.raises(RuntimeError):
        model[1](x[:, :3])
    assert not torch.is_autocast_enabled("cpu")
    nn.utils.parametrizations.weight_norm(model[1])
    y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)
    y.sum().backward()
    assert all(p.grad is not None for p in model[1].parameters())
