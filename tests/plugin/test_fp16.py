"""Training with products in fp16: no loss scale, whatever the size of activations and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lightning_qlora import PagedAdamW, QLoRALinear, QLoRAPrecision, convert, disable_adapter, merge
from lightning_qlora.dtypes import full_precision
from lightning_qlora.tensors import device_types
from tests.conftest import Classifier, loader
from tests.toys import toy

SMALL = 2e-7  # factor of a loss, so that most gradients of its A are below the smallest number in fp16
LARGE = 1e12


class Scaled(Classifier):
    """Its loss times a factor; records the gradients of A that its optimizer gets."""

    def __init__(self, factor=1.0, **arguments):
        super().__init__(**arguments)
        self.factor = factor
        self.gradients = []

    def training_step(self, batch, batch_idx):
        return self.factor * super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        layers = [layer for layer in self.modules() if isinstance(layer, QLoRALinear)]
        self.gradients.append(torch.cat([layer.lora_A.grad.flatten() for layer in layers]))


class Manual(Scaled):
    """Two optimizers, which clip, in manual optimization; both step after both backward passes."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2, retain_graph=True)
        self.manual_backward(loss / 2)
        for optimizer in optimizers:
            self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net[index].parameters(), lr=1e-2) for index in (0, 4)]


class Paged(Scaled):
    def configure_optimizers(self):
        return PagedAdamW(self.parameters(), lr=1e-2)


def fit(trainer, module, dtype="fp16", ckpt=None, dropout=0.0, **arguments):
    torch.manual_seed(1)
    plugin = QLoRAPrecision(r=4, lora_dropout=dropout, compute_dtype=dtype)
    run = trainer(plugins=plugin, **{"max_epochs": 3, **arguments})
    run.fit(module, loader(), ckpt_path=ckpt)
    return module, run


@pytest.mark.parametrize("factor", [SMALL, LARGE])
def test_gradients_of_every_size_arrive(trainer, factor):
    modules = [Scaled(factor), Scaled(factor)]
    for module, dtype in zip(modules, ("fp32", "fp16"), strict=True):
        fit(trainer, module, dtype)
    exact, ours = (torch.stack(module.gradients[1:]) for module in modules)
    assert exact.abs().median() < 6e-8 or exact.abs().max() > 65504, "fp16 has these"
    assert (ours == 0).float().mean() <= (exact == 0).float().mean() + 0.01
    assert (ours * exact).sum() / exact.square().sum() == pytest.approx(1, abs=0.05)


NORM = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
VALUE = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize(
    ("kind", "arguments"), [(Scaled, {}), (Scaled, NORM), (Scaled, VALUE), (Paged, NORM), (Manual, {})]
)
def test_losses_are_those_of_fp32(trainer, kind, arguments):
    losses = [fit(trainer, kind(0.01), dtype, **arguments)[0].losses for dtype in ("fp16", "fp32")]
    assert losses[1][-1] < 0.98 * losses[1][0]
    assert_close(*map(torch.tensor, losses), rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("types", [("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp16")])
def test_a_run_goes_on_in_the_same_or_another_type(trainer, types):
    """A checkpoint does not say in which type the products were, and has no scale."""
    module, _ = fit(trainer, Scaled(30.0, dropout=0.1), types[1], dropout=0.3)
    _, first = fit(trainer, Scaled(30.0, dropout=0.1), types[0], dropout=0.3, max_epochs=1)
    best = first.checkpoint_callback.best_model_path
    assert torch.load(best)["QLoRAPrecision"].keys() == {"random_state", "_qlora_conversion"}
    resumed, _ = fit(trainer, Scaled(30.0, dropout=0.1), types[1], dropout=0.3, ckpt=best)
    tolerance = 0 if types[0] == types[1] else 5e-2
    assert_close(*map(torch.tensor, (resumed.losses, module.losses[4:])), rtol=tolerance, atol=0)


class Loud(nn.Module):
    """A residual stream whose MLP has activations of 1e6 and a norm behind it, as Gemma's."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.up.weight.data.mul_(1e6)

    def forward(self, x):
        return x + F.layer_norm(self.down(F.gelu(self.up(F.layer_norm(x, (64,))))), (64,))


@pytest.mark.parametrize("use_dora", [False, True])
def test_activations_that_fp16_does_not_have(use_dora):
    """Plain fp16 is not finite; with a power of two losses and gradients are those of fp32."""
    torch.manual_seed(0)
    base = nn.Sequential(*(Loud() for _ in range(3)))
    x = torch.randn(32, 64)
    target = torch.randn(32, 64)
    losses = {}
    for dtype in ("fp32", "fp16", "bf16"):
        module = copy.deepcopy(base)
        torch.manual_seed(1)
        convert(module, r=4, lora_dropout=0.0, compute_dtype=dtype, use_dora=use_dora)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        losses[dtype] = []
        for _ in range(6):
            loss = F.mse_loss(module(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
    assert losses["fp32"][-1] < losses["fp32"][0]
    assert_close(torch.tensor(losses["fp16"]), torch.tensor(losses["fp32"]), rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.float16):
        assert not module(x.half()).isfinite().all()


def test_a_small_gradient_of_doras_magnitudes_under_autocast_in_fp16():
    layer = nn.Sequential(nn.Linear(64, 64))
    convert(layer, r=4, lora_dropout=0.0, use_dora=True)
    x = torch.randn(256, 64)
    grads = []
    for in_fp16 in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=in_fp16):
            y = layer(x)
        y.backward(torch.full_like(y, 2.0**-24))  # the smallest number of fp16
        grads.append(layer[0].lora_magnitude_vector.grad)
    assert_close(*grads, rtol=0.02, atol=0.02 * grads[1].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_held_in_fp32_and_its_files_are_not(dtype):
    model = toy("llama").to(dtype)
    names = {name: value.dtype for name, value in model.named_parameters()}
    report = convert(model, r=4, lora_dropout=0.0, compute_dtype="fp16")
    assert "compute_dtype='fp16'" in report.summary() and "kept in fp32" in report.summary()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.arange(12)[None]
    logits = model(input_ids=ids).logits
    assert logits.dtype is torch.float32
    exact = toy("llama").to(dtype)
    convert(exact, r=4, lora_dropout=0.0, compute_dtype="fp32")
    exact.float()
    with disable_adapter(exact), disable_adapter(model):
        assert_close(model(input_ids=ids).logits, exact(input_ids=ids).logits, rtol=1e-2, atol=1e-3)
    logits.float().square().mean().backward()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters() if p.grad is not None)
    merge(model)
    assert {name: value.dtype for name, value in model.named_parameters()} == names


def test_a_card_without_bf16_holds_a_module_in_fp32_and_multiplies_in_fp16(monkeypatch):
    """The rule with a T4's answers; the card itself is asked by `has_bf16`."""
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(device_types, "_cuda_has_bf16", lambda _: False)
    for dtype in (torch.bfloat16, torch.float16):
        held = device_types.held_type(card, dtype)
        assert held.dtype is torch.float32 and "Tesla T4 has no bf16" in held.reason
    assert device_types.held_type(card, torch.float32) is None
    model = toy("llama").bfloat16()
    report = convert(model, r=4)
    full_precision.hold([*model.modules()], "auto", card)
    layer = next(part for part in model.modules() if isinstance(part, QLoRALinear))
    assert layer.weight_dtype is torch.float32 and layer.dtype_before is torch.bfloat16
    assert layer.compute_dtype(card) is torch.float16
    monkeypatch.setattr(device_types, "_cuda_has_bf16", lambda _: True)
    assert device_types.held_type(card, torch.bfloat16) is None
    assert device_types.held_type(card, torch.float16).dtype is torch.bfloat16
    assert report.converted
