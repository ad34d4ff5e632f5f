"""QLoRAPrecision in Fabric: the same object in a custom training loop; the twin's kinds in Fabric have more."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from lightning_qlora import CheckpointMismatchError, QLoRAPrecision
from tests.conftest import Classifier, loader


def launch(accelerator="cpu", **arguments):
    plugin = QLoRAPrecision(**{"r": 4, "lora_dropout": 0.0, **arguments})
    fabric = Fabric(accelerator=accelerator, devices=1, plugins=plugin)
    fabric.launch()
    return fabric, plugin


def setup(fabric, module):
    model = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, optimizer


def train(fabric, model, optimizer, batches):
    losses = []
    model.train()
    for batch in batches:
        x, y = fabric.to_device(batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_checkpoint_is_small_and_is_refused_by_another_base_and_a_second_setup_changes_nothing(tmp_path):
    fabric, _ = launch()
    module = Classifier()
    model, _ = setup(fabric, module)
    fabric.save(tmp_path / "c.ckpt", {"model": model})
    names = torch.load(tmp_path / "c.ckpt", weights_only=True)["model"]
    assert not {"net.0.packed", "net.0.weight", "net.2.weight"} & set(names)
    other, _ = setup(launch()[0], Classifier(seed=9))
    with pytest.raises(CheckpointMismatchError, match=r"net\.0"):
        fabric.load(tmp_path / "c.ckpt", {"model": other})
    packed = module.net[0].packed
    setup(launch()[0], module)
    assert module.net[0].packed is packed


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("inputs", [list, iter, None])
def test_a_backward_pass_to_all_parameters_of_an_optimizer_is_that_to_its_adapters(inputs, early):
    fabric, _ = launch()
    module = Classifier()
    parameters = [*module.parameters()]
    model, optimizer = setup(fabric, module)
    if not early:  # as sheeprl does
        parameters = optimizer.param_groups[0]["params"]
    x, y = next(iter(loader()))
    first = module.net[4].lora_B if inputs is None else None
    fabric.backward(F.cross_entropy(model(x), y), inputs=inputs(parameters) if inputs else first)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    fabric.backward(F.cross_entropy(model(x), y))
    assert gradients.keys() == ({"net.4.lora_B"} if inputs is None else {n for n in gradients if "lora_" in n})
    assert len(gradients) == (1 if inputs is None else 4)
    assert all(torch.equal(module.get_parameter(name).grad, value) for name, value in gradients.items())


@pytest.mark.parametrize("separately", [False, True])
def test_an_optimizer_made_before_setup_trains_as_one_made_after_it(separately):
    def losses(early):
        fabric, _ = launch()
        modules = [Classifier(), Classifier(seed=1)]
        optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) if early else None for module in modules]
        if early and not separately:
            return train(fabric, *fabric.setup(modules[0], optimizers[0]), list(loader(64)))
        models = [fabric.setup_module(module) for module in modules]
        optimizers = [
            optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
            for optimizer, model in zip(optimizers, models, strict=True)
        ]
        found = train(fabric, models[0], fabric.setup_optimizers(*optimizers)[0], list(loader(64)))
        assert modules[0].net[0].lora_B.any() and not modules[1].net[0].lora_B.any()
        return found

    assert losses(early=True) == losses(early=False)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("types", "compute_dtype", "computed"),
    [
        ([(FP32, FP32)], "bf16", [BF16]),
        ([(FP32, FP32)], "fp16", [FP32]),
        ([(BF16, FP32)], "bf16", [BF16]),  # the second layer is a new part, which the user holds in fp32
        ([(FP32, FP32), (BF16, BF16)], "bf16", [BF16, BF16]),  # as of a GAN
        ([(BF16, BF16), (FP32, FP32)], "bf16", [BF16, BF16]),
        ([(BF16, BF16), (FP32, FP32), (FP32, FP32)], "fp32", [BF16, FP32, FP32]),
    ],
    ids=str,
)
def test_autocast_covers_layers_that_are_not_converted(types, compute_dtype, computed):
    fabric, _ = launch(compute_dtype=compute_dtype, target_modules=["0"], modules_to_save=["1"])
    nets = [nn.Sequential(nn.Linear(64, 64, dtype=one), nn.Linear(64, 8, dtype=other)) for one, other in types]
    models = [fabric.setup_module(net) for net in nets]
    seen = []
    for net, model in zip(nets, models, strict=True):
        net[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        fabric.backward(model(torch.randn(2, 64, dtype=net[0].weight.dtype)).sum())
    assert seen == computed and not torch.is_autocast_enabled("cpu")
    assert type(nets[0]) is nn.Sequential or len(nets) > 1


def test_a_16_bit_module_whose_adapters_alone_train_computes_without_autocast():
    fabric, _ = launch(compute_dtype="bf16")
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU()).bfloat16()
    seen = []
    net[1].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    fabric.setup_module(net)(torch.randn(2, 64, dtype=BF16))
    assert seen == [False]


def test_one_of_several_modules_may_have_no_layer_that_4_bits_fit():
    """An actor and its critic in one Fabric: no rank makes an adapter smaller than the 1 x 256 weights of a head."""
    fabric, plugin = launch(r=8)
    actor = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    critics = nn.Linear(256, 1), nn.Sequential(nn.Linear(64, 2))
    models = [fabric.setup_module(critics[0]), fabric.setup_module(actor), fabric.setup_module(critics[1])]
    assert any("no layer is in 4 bits" in text for text in plugin.report.notes)
    optimizers = [fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), 1e-2)) for model in models]
    before = [critic.state_dict()[key].clone() for critic, key in zip(critics, ("weight", "0.weight"), strict=True)]
    fabric.backward(models[0](torch.randn(4, 256)).sum() + models[2](models[1](torch.randn(4, 64))).sum())
    for optimizer in optimizers:
        optimizer.step()
    for critic, key, value in zip(critics, ("weight", "0.weight"), before, strict=True):
        assert (critic.state_dict()[key] != value).all() and critic.state_dict()[key].dtype is torch.float32
    assert actor[2].lora_B.any()
