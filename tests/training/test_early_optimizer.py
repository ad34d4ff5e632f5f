"""Under the Trainer, an optimizer made before conversion gets the adapters if it has no state."""

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.training.early_optimizer import replace_parameters_by_adapters
from tests.conftest import Classifier, loader


def names_of(module, optimizer):
    name_of = {id(param): name for name, param in module.named_parameters()}
    return [[name_of.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]


def test_each_adapter_replaces_its_weight_in_the_same_group():
    module = Classifier()
    first, second = module.net[0], module.net[4]
    optimizer = torch.optim.AdamW(
        [{"params": list(second.parameters()), "lr": 1.0}, {"params": [module.net[2].weight, first.weight], "lr": 2.0}]
    )
    groups = list(optimizer.param_groups)
    convert(module, r=4, use_dora=True)
    replace_parameters_by_adapters(optimizer)
    assert names_of(module, optimizer) == [
        ["net.4.lora_A", "net.4.lora_B", "net.4.lora_magnitude_vector", "net.4.bias"],
        ["net.2.weight", "net.0.lora_A", "net.0.lora_B", "net.0.lora_magnitude_vector"],
    ]
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_names_of_named_parameters_are_replaced_too():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(module.named_parameters())
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch keeps no names")
    convert(module, r=4)
    replace_parameters_by_adapters(optimizer)
    assert [optimizer.param_groups[0]["param_names"]] == names_of(module, optimizer)
    assert "0.lora_A" in optimizer.param_groups[0]["param_names"]


def test_an_optimizer_of_two_modules_with_equal_names_gets_the_adapters_of_both():
    module, other = Classifier(), Classifier()
    optimizer = torch.optim.AdamW([{"params": module.parameters()}, {"params": other.parameters()}])
    convert(module, r=4)
    convert(other, r=4)
    replace_parameters_by_adapters(optimizer)
    for group, owner in zip(optimizer.param_groups, (module, other), strict=True):
        trained = {id(p) for p in owner.parameters() if p.requires_grad}
        assert trained and trained <= {id(p) for p in group["params"]}


def test_an_optimizer_with_state_is_not_changed():
    module = Classifier()
    optimizer = torch.optim.AdamW(module.parameters())
    convert(module, r=4)
    before = list(optimizer.param_groups[0]["params"])
    optimizer.state[before[0]] = {"step": torch.tensor(1.0)}
    replace_parameters_by_adapters(optimizer)
    assert all(now is was for now, was in zip(optimizer.param_groups[0]["params"], before, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4),
    ],
)
def test_an_optimizer_made_in_init_trains_the_adapters(trainer, make):
    class Early(Classifier):
        def __init__(self):
            super().__init__()
            self.early = make(self.parameters())

        def configure_optimizers(self):
            return self.early

    module = Early()
    trainer(plugins=QLoRAPrecision(r=4, lora_dropout=0.0), max_epochs=4).fit(module, loader(32, 32))
    assert module.losses[-1] < module.losses[0]
    assert module.net[0].lora_B.abs().sum() > 0
