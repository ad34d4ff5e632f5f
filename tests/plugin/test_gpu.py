"""The plugin on a GPU: `pytest -m gpu tests/plugin/test_gpu.py`. Most tests also run on the CPU in `make test`."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_qlora import (
    QLoRALinear,
    QLoRAPrecision,
    convert,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.optim import optimizer_pages
from lightning_qlora.optim.host_memory import why_not_managed
from lightning_qlora.starts.starts import STARTS
from tests.conftest import Classifier, dataset, loader
from tests.plugin.test_fabric import launch, setup, train
from tests.toys import assert_equal, ids, perturb, toy

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
WIDTH = 256  # so that the optimizer state of rank 32 adapters is large enough to be paged


def plugin(**arguments):
    return QLoRAPrecision(**{"r": 32, "lora_dropout": 0.1, **arguments})


def falls(losses, factor=0.7):
    return sum(losses[-4:]) < factor * sum(losses[:4])


class Recorder(pl.Callback):
    """Records on which device the adapters train and how the optimizer state is paged."""

    def on_train_batch_end(self, trainer, module, *_):
        self.devices = {p.device.type for name, p in module.named_parameters() if "lora_" in name}
        self.paging = trainer.precision_plugin.pager.report().kind


@on_each_device
def test_an_unchanged_module_trains(trainer, device):
    module = Classifier()
    spy = Recorder()
    base = {name: quantize(module.net[int(name)].weight) for name in ("0", "4")}
    run = trainer(plugins=plugin(r=4), max_epochs=15, accelerator=device, callbacks=[spy])
    run.fit(module, loader())
    assert falls(module.losses, 0.5)
    assert spy.devices == {device} and run.precision_plugin.report.converted == ["net.0", "net.4"]
    for name, weight in base.items():
        assert torch.equal(module.net[int(name)].packed.cpu().view(-1), weight.packed.view(-1))


class Late(Classifier):
    """Builds its network in configure_model, where Lightning makes the GPU the default device."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Classifier().net


@on_each_device
@pytest.mark.parametrize("start", STARTS)
def test_a_module_made_in_configure_model_trains_and_resumes(trainer, device, start):
    def fit(module, epochs, **arguments):
        run = trainer(plugins=plugin(r=4, init_lora_weights=start), max_epochs=epochs, accelerator=device)
        run.fit(module, loader(), **arguments)
        return run

    module = Late()
    run = fit(module, 10)
    assert isinstance(module.net[0], QLoRALinear)
    assert falls(module.losses, 0.8)
    again = Late()
    torch.manual_seed(0)
    fit(again, 11, ckpt_path=run.checkpoint_callback.best_model_path)
    assert len(again.losses) == 4


class Tokens(pl.LightningModule):
    """A transformers model that is loaded in configure_model."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.model = None
        self.losses = []

    def configure_model(self):
        if self.model is None:
            self.model = self.make()

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return DataLoader(ids(8), batch_size=2)


@pytest.mark.parametrize("device", DEVICES[1:])  # on a CPU tests/huggingface/test_models.py
def test_a_transformers_model_is_quantized_while_it_loads(trainer, device, tmp_path):
    model = toy("llama")
    model.save_pretrained(tmp_path / "base")
    lit = Tokens(lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trainer(plugins=plugin(r=16), max_epochs=12, accelerator=device).fit(lit)
    assert falls(lit.losses, 0.93), lit.losses[-4:]
    convert(model, r=16)
    expected = adapted_layers(model)
    layers = adapted_layers(lit.model)
    assert expected.keys() == layers.keys() and expected
    for name, layer in expected.items():
        assert torch.equal(layer.packed.view(-1), layers[name].packed.cpu().view(-1)), name


@pytest.fixture(
    params=[
        ("cpu", "plain"),
        *(pytest.param(("cuda", kind), marks=ON_GPU, id=f"cuda, {kind}") for kind in ("plain", "managed", "pinned")),
    ],
    ids=str,
)
def placed(request, monkeypatch):
    """A device, and how optimizer state is paged there."""
    device, kind = request.param
    if kind == "managed" and (reason := why_not_managed(torch.device(device, 0))):
        pytest.skip(reason)
    if kind == "pinned":
        monkeypatch.setattr(optimizer_pages, "why_not_managed", lambda device: "the test asks for pinned memory")
    return device, kind


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(trainer, placed, tmp_path):
    device, kind = placed

    def fit(name, epochs, seed, ckpt_path=None):
        pl.seed_everything(seed, verbose=False)
        module = Classifier(WIDTH, dropout=0.1)
        spy = Recorder()
        paged = kind != "plain"
        module.configure_optimizers = lambda: torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], lr=1e-3
        )
        run = trainer(
            plugins=plugin(lora_dropout=0.3, paged_optimizer=paged),
            max_epochs=epochs,
            accelerator=device,
            callbacks=[spy, ModelCheckpoint(tmp_path / name, save_last=True)],
        )
        run.fit(module, DataLoader(dataset(width=WIDTH), batch_size=8, shuffle=True), ckpt_path=ckpt_path)
        assert spy.paging == kind
        return module

    straight = fit("straight", 3, seed=1)
    fit("first", 1, seed=1)
    resumed = fit("resumed", 3, seed=99, ckpt_path=tmp_path / "first" / "last.ckpt")
    assert resumed.losses == straight.losses[4:]
    assert_equal([*resumed.parameters()], [*straight.parameters()])


@on_each_device
def test_fabric_trains_and_resumes_bit_equal(device, tmp_path):
    batches = [*loader(96)]

    def start(seed):
        torch.manual_seed(seed)
        fabric, precision = launch(device, lora_dropout=0.3)
        with fabric.init_module():
            module = Classifier(dropout=0.1)
        model, optimizer = setup(fabric, module)
        return fabric, model, optimizer, {"model": model, "optimizer": optimizer, "qlora": precision}

    fabric, model, optimizer, state = start(1)
    assert falls(train(fabric, model, optimizer, batches[:6] * 4), 0.9)
    fabric.save(tmp_path / "c.ckpt", state)
    expected = train(fabric, model, optimizer, batches[6:])
    fabric, again, optimizer, state = start(50)
    fabric.load(tmp_path / "c.ckpt", state)
    assert train(fabric, again, optimizer, batches[6:]) == expected
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and one.device.type == device


@on_each_device
@pytest.mark.parametrize("kind", ["bf16 module", "fp16 module", "computed in bf16", "autocast bf16", "autocast fp16"])
def test_16_bit_types_train(trainer, device, kind):
    dtype = torch.float16 if "fp16" in kind else torch.bfloat16
    module = Classifier()
    seen = []
    module.net[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    if "module" in kind:
        module.to(dtype)
        module.forward = lambda x: module.net(x.to(dtype)).float()
    elif "autocast" in kind:

        def forward(x):
            with torch.autocast(device, dtype):
                return module.net(x).float()

        module.forward = forward
    compute = "bf16" if kind == "computed in bf16" else "auto"
    run = trainer(plugins=plugin(r=4, compute_dtype=compute), max_epochs=12, accelerator=device)
    run.fit(module, loader())
    assert set(seen) == {dtype}
    assert falls(module.losses, 0.8)


@pytest.mark.parametrize("device", DEVICES[1:])  # on a CPU test_gradient_checkpointing.py
def test_recomputed_activations_give_equal_gradients(device):
    gradients = []
    tokens = ids(2, 24).to(device)
    for checkpointing in (False, True):
        model = toy("llama").to(device).train()
        convert(model, r=4, lora_dropout=0.1, gradient_checkpointing=checkpointing)
        perturb(model.cpu()).to(device)
        torch.manual_seed(1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cpu", {"backend": "aot_eager"}),
        *(pytest.param("cuda", {"mode": mode}, marks=ON_GPU) for mode in ("default", "reduce-overhead")),
    ],
    ids=str,
)
def test_compiled_layers_equal_eager_ones_and_draw_new_dropout_masks(device, options):
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(device)
    convert(eager, r=8, lora_dropout=0.5)
    perturb(eager.cpu()).to(device)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, **options)
    eager.eval(), twin.eval()
    x = torch.randn(16, 64, device=device)
    outputs = {}
    for name, net, parameters in (("eager", eager, eager.parameters()), ("compiled", compiled, twin.parameters())):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=2.0)
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            y = net(x)
            y.square().mean().backward()
            optimizer.step()
            outputs.setdefault(name, []).append(y.detach().clone())
    torch.testing.assert_close(*outputs.values(), atol=0.02, rtol=0.02)
    changed = (outputs["compiled"][0] - outputs["compiled"][-1]).abs().max()
    assert changed > 0.2, "a captured graph must see the parameters that the steps change"
    twin.train()
    drawn = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.square().mean().backward()
        drawn.append(y.detach().clone())
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])


@on_each_device
def test_an_adapter_is_saved_loaded_on_the_cpu_and_merged(device, tmp_path):
    module = Classifier()
    fresh = copy.deepcopy(module)
    convert(module.to(device), r=4, lora_dropout=0.0)
    perturb(module.cpu()).to(device)
    x = torch.randn(16, 64)
    expected = module.eval()(x.to(device)).detach().cpu()
    save_adapter(module, tmp_path / "adapter")
    convert(fresh, r=4, lora_dropout=0.0)
    load_adapter(fresh, tmp_path / "adapter")
    tolerance = 1e-5 if device == "cpu" else 0.1 * expected.abs().max().item()  # fp32 weights compute in bf16 on a GPU
    torch.testing.assert_close(fresh.eval()(x), expected, atol=tolerance, rtol=0)
    merge(module)
    assert type(module.net[0]) is nn.Linear
    torch.testing.assert_close(module(x.to(device)).cpu(), expected, atol=tolerance, rtol=0)
