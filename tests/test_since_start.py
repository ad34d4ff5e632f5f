import copy

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.since_start import belongs_to, since_start


def trained(start, weight_layer, **arguments):
    """A layer whose adapter took one step from its start."""
    net = nn.Sequential(copy.deepcopy(weight_layer))
    convert(net, r=8, lora_alpha=4, lora_dropout=0.0, init_lora_weights=start, **arguments)
    net(torch.randn(32, 64))
    layer, before = net[0], copy.deepcopy(net[0])
    with torch.no_grad():
        for parameter in layer.adapter_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return layer, before


@pytest.mark.parametrize("start", ["default", "gaussian", "loftq", "pissa", "pissa_niter_4", "calibrated"])
def test_the_difference_is_what_training_added(start):
    dense = nn.Linear(64, 96)
    layer, before = trained(start, dense)
    a, b = since_start(layer, dense.weight)
    assert a.shape == ((8 if start in ("default", "gaussian") else 16), 64)
    torch.testing.assert_close(layer.scaling * b @ a, layer.delta() - before.delta(), rtol=1e-3, atol=1e-4)


def test_on_the_dense_weight_it_comes_close_to_the_trained_layer():
    dense = nn.Linear(64, 96)
    layer, _ = trained("calibrated", dense)
    a, b = since_start(layer, dense.weight)
    effective = layer.decode() + layer.delta()
    with_difference = (dense.weight + layer.scaling * b @ a - effective).norm()
    as_it_is = (dense.weight + layer.delta() - effective).norm()  # the start counted twice
    assert with_difference < 0.95 * as_it_is


def test_what_has_no_such_difference_is_refused():
    dense = nn.Linear(64, 96)
    layer, _ = trained("pissa", dense, use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        since_start(layer, dense.weight)
    waiting = nn.Sequential(copy.deepcopy(dense))
    convert(waiting, r=8, init_lora_weights="calibrated")
    with pytest.raises(ValueError, match="has not started yet"):
        since_start(waiting[0], dense.weight)


def test_the_base_an_adapter_belongs_to_is_said():
    assert belongs_to(QLoRAConfig()) is None
    assert "model in 4 bits (nf4, block_size=64" in belongs_to(QLoRAConfig(init_lora_weights="calibrated"))
    assert "of this run alone" in belongs_to(QLoRAConfig(init_lora_weights="pissa_niter_4"))
    iterated = QLoRAConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 5})
    assert "of this run alone" in belongs_to(iterated)
