"""Tensor parallelism on two processes: the numbers of one device, checkpoints, folders; and what is refused."""

import subprocess
import sys

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.tensors.dtensor import gather
from tests.conftest import ROOT, launch
from tests.experts.test_experts import qwen3_moe
from tests.toys import toy

transformers = pytest.importorskip("transformers")
from tests.scripts.tensor_parallel_training import fit  # noqa: E402


def test_two_ranks_train_as_one_device_does(tmp_path, monkeypatch):
    """The assertions are in the script, where both are in one process; a file moves from one device and to it."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # as in the script: the initial adapters depend on it
    toy("llama", attention_bias=True, num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    kind, config = qwen3_moe(num_hidden_layers=1, moe_intermediate_size=64, num_experts=4, vocab_size=128)
    kind(config).save_pretrained(tmp_path / "moe")
    fit(tmp_path, 1, devices=1)[0].save_checkpoint(tmp_path / "one.ckpt")
    ranks = launch("tests.scripts.tensor_parallel_training", tmp_path)[1]
    _, moved = fit(tmp_path, 2, str(tmp_path / "halfTrue.ckpt"), devices=1)
    torch.testing.assert_close(moved.losses, ranks[0]["losses"][3:], rtol=1e-5, atol=1e-6)
    for rank in ranks:
        assert "experts in 4 bits can't be split over ranks" in rank["experts"]


@pytest.mark.slow
def test_four_ranks_with_fsdp_as_well_have_the_bytes_and_losses_of_one_device(tmp_path):
    toy("llama", attention_bias=True, hidden_size=128).save_pretrained(tmp_path / "llama")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "tests.scripts.tensor_parallel_training", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_the_plugin_clips_layers_of_a_plan_and_others_together(max_norm, one_rank):
    """As torch does without a plan; torch raises an error of its own for DTensors beside other tensors."""
    grads = []
    for plan in ({}, {"0": ColwiseParallel(output_layouts=Replicate())}):
        strategy = FabricStrategy(
            lambda net, mesh, plan=plan: parallelize_module(net, mesh["tensor_parallel"], plan), 1, 1
        )
        plugin = QLoRAPrecision(r=4)
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=plugin)
        fabric.launch()
        torch.manual_seed(0)
        net = fabric.setup_module(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(net.parameters()))
        fabric.backward(net(torch.ones(2, 64)).square().sum())
        trained = [p for p in net.parameters() if p.requires_grad]
        before = [gather(p.grad).clone() for p in trained]
        plugin.clip_gradients(optimizer, max_norm)
        grads.append([gather(p.grad) for p in trained])
    norm = nn.utils.get_total_norm(before)
    scale = min(1, max_norm / norm)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[1], [grad * scale for grad in before], rtol=1e-4, atol=0)
    assert norm > 0.1


class Mesh:
    """A mesh of three ranks, without processes."""

    def size(self):
        return 3


@pytest.mark.parametrize(
    ("sizes", "by_inputs", "arguments", "message"),
    [
        ((128, 96), True, {}, r"^0: can't be split over 3 ranks by inputs in blocks of 64: it has 128 inputs, .* 192"),
        ((96, 128), False, {}, r"^0: can't be split over 3 ranks by outputs in blocks of 64: it has 96 inputs, .* 64"),
        ((128, 128), False, {}, r"^0: can't be split over 3 ranks by outputs .* it has 128 outputs"),
        ((192, 96), True, {"use_dora": True}, r"^0: DoRA can't be split by inputs"),
        ((192, 96), False, {"init_lora_weights": "calibrated"}, r"^0: .*calibrated.* is computed in the first step"),
    ],
)
def test_a_layer_that_cannot_be_split_is_named_with_what_to_do(sizes, by_inputs, arguments, message):
    from lightning_qlora.layers.tensor_parallel import split

    net = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 8))
    convert(net, r=4, target_modules=["0"], **arguments)
    with pytest.raises(ValueError, match=message):
        split(net[0], Mesh(), by_inputs)
