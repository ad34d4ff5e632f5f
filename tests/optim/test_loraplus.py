import pytest
import torch

from lightning_qlora import QLoRAPrecision, loraplus_groups
from tests.conftest import Classifier, loader


class Plus(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(loraplus_groups(self, lr=1e-3, loraplus_lr_ratio=4))


def test_one_line_in_configure_optimizers(trainer):
    module = Plus()
    run = trainer(plugins=QLoRAPrecision(r=4, use_dora=True), max_steps=1, enable_checkpointing=False)
    run.fit(module, loader())
    slow, fast = run.optimizers[0].param_groups
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    expected = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    assert [expected[id(p)] for p in fast["params"]] == ["net.0.lora_B", "net.4.lora_B"]
    assert [expected[id(p)] for p in slow["params"]] == [name for name in expected.values() if "lora_B" not in name]

    default = loraplus_groups(module, lr=2e-4)
    assert [(group["lr"], group["params"]) for group in default] == [(2e-4, slow["params"]), (32e-4, fast["params"])]


def test_a_module_without_adapters_and_rates_that_are_not_above_zero_are_refused():
    with pytest.raises(ValueError, match="has no adapter"):
        loraplus_groups(Classifier(), lr=1e-3)
    with pytest.raises(ValueError, match=r"lr=0: must be above 0\."):
        loraplus_groups(Classifier(), lr=0)
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio=nan: must be above 0\."):
        loraplus_groups(Classifier(), lr=1e-3, loraplus_lr_ratio=float("nan"))
