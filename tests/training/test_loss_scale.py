"""fp16: the loss is scaled in the Trainer and in Fabric, as torch.amp.GradScaler does it in a plain loop."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric

from lightning_qlora import PagedAdamW8bit, QLoRALinear, QLoRAPrecision, convert
from tests.conftest import Classifier, loader

SMALL = 2e-7  # factor of a loss, so that most gradients of its A are below the smallest number in fp16


def plugin(dtype="fp16", dropout=0.0):
    return QLoRAPrecision(r=4, lora_dropout=dropout, compute_dtype=dtype)


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
        return PagedAdamW8bit(self.parameters(), lr=1e-2)


def fit(trainer, module, dtype="fp16", ckpt=None, dropout=0.0, **arguments):
    torch.manual_seed(1)
    run = trainer(plugins=plugin(dtype, dropout), **{"max_epochs": 3, **arguments})
    run.fit(module, loader(), ckpt_path=ckpt)
    return module, run


def test_small_gradients_arrive(trainer):
    plain = Scaled(SMALL)
    with pytest.warns(UserWarning, match="GradScaler"):
        convert(plain, r=4, lora_dropout=0.0, compute_dtype="fp16")
    modules = [Scaled(SMALL), Scaled(SMALL), plain]
    for module, dtype in zip(modules, ("fp32", "fp16"), strict=False):
        fit(trainer, module, dtype)
    with torch.no_grad():
        plain.load_state_dict(modules[1].state_dict())
    x, y = next(iter(loader()))
    with torch.autocast("cpu", torch.float16):
        (SMALL * F.cross_entropy(plain(x), y)).backward()
    plain.on_before_optimizer_step(None)
    assert (plain.gradients[-1] == 0).float().mean() > 0.5, "without a scale most gradients are zero"
    exact, scaled = (torch.stack(module.gradients[1:]) for module in modules[:2])
    assert (scaled == 0).float().mean() <= (exact == 0).float().mean() + 0.01
    share = (scaled * exact).sum() / exact.square().sum()
    assert abs(share - 1) < 0.05


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_share_of_accumulated_and_clipped_gradients_is_one(trainer, dtype):
    """<got, want> / |want|^2, beside fp32; none of it is rounded away."""
    modules = [Scaled(0.01), Scaled(0.01)]
    for module, each in zip(modules, (dtype, "fp32"), strict=True):
        fit(trainer, module, each, max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1e-4)
    got, want = (module.net[0].lora_B.grad for module in modules)
    assert abs((got * want).sum() / want.square().sum() - 1) < 0.02


NORM = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
VALUE = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize(
    ("kind", "arguments"), [(Scaled, {}), (Scaled, NORM), (Scaled, VALUE), (Paged, NORM), (Manual, {})]
)
def test_losses_are_those_of_fp32(trainer, kind, arguments):
    """A factor of 0.01, with which no step overflows."""
    losses = [fit(trainer, kind(0.01), dtype, **arguments)[0].losses for dtype in ("fp16", "fp32")]
    assert losses[1][-1] < 0.98 * losses[1][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=5e-3, atol=2e-3)


def plain_loop(module, batches, scaler):
    """The loop of torch's documentation, with clipping."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y_hat = module(x)
        loss = module.factor * F.cross_entropy(y_hat, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Layers compute in fp16")
@pytest.mark.parametrize("factor", [0.01, 30.0])
@pytest.mark.parametrize("with_closure", [False, True])
def test_fabric_equals_a_loop_with_gradscaler_also_where_steps_are_skipped(factor, with_closure):
    """A factor of 30 overflows at first, which clip_gradients takes for an error unless it is told not to."""
    batches = list(loader()) * 2
    plugged = Scaled(factor)
    plain = Scaled(factor)
    convert(plain, r=4, lora_dropout=0.0, compute_dtype="fp16")
    scaler = torch.amp.GradScaler("cpu")
    expected = plain_loop(plain.train(), batches, scaler)
    precision = plugin()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    model, optimizer = fabric.setup(plugged, torch.optim.AdamW(plugged.parameters(), lr=1e-2))
    losses = []

    def backward(x, y):
        optimizer.zero_grad()
        loss = factor * F.cross_entropy(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        losses.append(loss.item())

    for x, y in batches:
        if with_closure:
            optimizer.step(lambda x=x, y=y: backward(x, y))
        else:
            backward(x, y)
            optimizer.step()
    assert losses == expected
    assert precision.state_dict()["loss_scale"] == scaler.state_dict()
    assert (scaler.get_scale() < 32768) == (factor > 1)  # a loss in fp16, whose own gradient is the scale
    for one, other in zip(plugged.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_is_bit_equal_with_the_scale_of_the_first(trainer, tmp_path):
    straight, whole = fit(trainer, Scaled(30.0, dropout=0.1), dropout=0.3)
    _, first = fit(trainer, Scaled(30.0, dropout=0.1), dropout=0.3, max_epochs=1)
    assert torch.load(first.checkpoint_callback.best_model_path)["QLoRAPrecision"]["loss_scale"]["scale"] < 65536
    resumed, second = fit(
        trainer, Scaled(30.0, dropout=0.1), dropout=0.3, ckpt=first.checkpoint_callback.best_model_path
    )
    assert resumed.losses == straight.losses[4:]
    states = [run.precision_plugin.state_dict()["loss_scale"] for run in (whole, second)]
    assert states[0] == states[1]
    pickle.dumps(second.precision_plugin)


def test_a_loss_that_is_not_scaled_and_gradients_that_are_never_finite_are_warnings(trainer):
    class Unscaled(Manual):
        def manual_backward(self, loss, **arguments):
            loss.backward(**arguments)

    with pytest.warns(UserWarning, match="no loss was scaled"):
        module, _ = fit(trainer, Unscaled())
    assert module.losses[-1] < module.losses[0]
    with pytest.warns(UserWarning, match="not finite although the loss scale is below 1"):
        module, _ = fit(trainer, Scaled(float("nan")), max_epochs=6)
    assert not module.net[0].lora_B.any()


def test_what_can_not_be_scaled_is_refused(trainer):
    class Lbfgs(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad])

    with pytest.raises(TypeError, match="LBFGS"):
        fit(trainer, Lbfgs())

    class Half(Scaled):
        def on_fit_start(self):
            self.net[0].lora_A.data = self.net[0].lora_A.data.half()

    with pytest.raises(ValueError, match=r"shape \[4, 64\] trains in fp16"):
        fit(trainer, Half())
