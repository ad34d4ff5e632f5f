"""QLoRAPrecision in Fabric: the same object in a custom training loop."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric

from lightning_qlora import CheckpointMismatchError, QLoRALinear, QLoRAPrecision
from tests.conftest import Classifier, loader


def launch(**arguments):
    plugin = QLoRAPrecision(**{"r": 4, "lora_dropout": 0.1, **arguments})
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    fabric.launch()
    return fabric, plugin


def setup(fabric, module):
    model = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, optimizer


def train(fabric, model, optimizer, batches):
    losses = []
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_save_and_load_resume_bit_equal(tmp_path):
    batches = list(loader(64))
    torch.manual_seed(1)
    fabric, plugin = launch(lora_dropout=0.3)
    model, optimizer = setup(fabric, Classifier(dropout=0.1))
    train(fabric, model, optimizer, batches[:3])
    state = {"model": model, "optimizer": optimizer, "qlora": plugin, "step": 3}
    fabric.save(tmp_path / "c.ckpt", state)
    expected = train(fabric, model, optimizer, batches[3:])

    torch.manual_seed(50)
    fabric, plugin = launch(lora_dropout=0.3)
    again, optimizer = setup(fabric, Classifier(dropout=0.1))
    state = {"model": again, "optimizer": optimizer, "qlora": plugin, "step": 0}
    fabric.load(tmp_path / "c.ckpt", state)
    assert state["step"] == 3
    assert train(fabric, again, optimizer, batches[3:]) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_is_small_and_is_refused_by_another_base(tmp_path):
    fabric, _ = launch()
    model, _ = setup(fabric, Classifier())
    fabric.save(tmp_path / "c.ckpt", {"model": model})
    names = torch.load(tmp_path / "c.ckpt", weights_only=True)["model"]
    assert not {"net.0.packed", "net.0.weight", "net.2.weight"} & set(names)
    other, _ = setup(launch()[0], Classifier(seed=9))
    with pytest.raises(CheckpointMismatchError, match=r"net\.0"):
        fabric.load(tmp_path / "c.ckpt", {"model": other})


@pytest.mark.parametrize("separately", [False, True])
def test_an_optimizer_made_before_setup_trains_as_one_made_after_it(separately):
    def losses(early):
        fabric, _ = launch(lora_dropout=0.0)
        module = Classifier()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2) if early else None
        if early and not separately:
            return train(fabric, *fabric.setup(module, optimizer), list(loader(64)))
        model = fabric.setup_module(module)
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
        return train(fabric, model, fabric.setup_optimizers(optimizer), list(loader(64)))

    assert losses(early=True) == losses(early=False)


def test_an_optimizer_that_has_stepped_before_setup_is_refused_there():
    fabric, _ = launch()
    module = Classifier()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"before the module was converted and has state.*net\.0.*fabric.setup"):
        fabric.setup(module, optimizer)


def test_two_modules_and_optimizers_that_were_made_first():
    fabric, _ = launch(lora_dropout=0.0)
    modules = [Classifier(seed=0), Classifier(seed=1)]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    models = [fabric.setup_module(module) for module in modules]
    optimizers = fabric.setup_optimizers(*optimizers)
    train(fabric, models[0], optimizers[0], list(loader()))
    assert modules[0].net[0].lora_B.any() and not modules[1].net[0].lora_B.any()


def test_a_second_setup_of_the_same_module_changes_nothing():
    module = Classifier()
    setup(launch()[0], module)
    packed = module.net[0].packed
    setup(launch()[0], module)
    assert module.net[0].packed is packed
    assert isinstance(module.net[0], QLoRALinear)


def test_autocast_covers_layers_that_are_not_converted():
    fabric, _ = launch(compute_dtype="bf16")
    model, _ = setup(fabric, Classifier())
    seen = []
    model.module.net[1].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    model(torch.randn(2, 64))
    assert seen == [torch.bfloat16]
