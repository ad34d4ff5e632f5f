"""Run by test_ddp: trains under strategy="ddp" in two processes, several times, and writes each rank's results."""

import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

from lightning_qlora import QLoRAPrecision, calibrate, convert, save_adapter, to_parameters
from tests.conftest import Classifier, dataset, loader, make_trainer, run_rank, tensors
from tests.toys import Loaded

RANK = int(os.environ.get("LOCAL_RANK", 0))


def trainer(root, plugin, **arguments):
    return make_trainer(root, **{"plugins": plugin, "strategy": "ddp", "devices": 2, **arguments})


def fit(root, epochs, ckpt=None):
    pl.seed_everything(1, verbose=False)
    module = Classifier(dropout=0.1, seed=2)
    plugin = QLoRAPrecision(r=4, lora_dropout=0.2)
    run = trainer(root, plugin, max_epochs=epochs, logger=CSVLogger(root, name="log", version=0))
    if ckpt:
        torch.manual_seed(1000 + RANK)
    run.fit(module, loader(64, 4, shuffle=True), loader(16), ckpt_path=ckpt)
    save_adapter(module, root / "adapter")
    run.test(module, loader(16), verbose=False)
    return {
        "state": module.state_dict(),
        "losses": module.losses,
        "optimizer": run.optimizers[0].state_dict()["state"],
        "best": run.checkpoint_callback.best_model_path,
    }


def fit_with_another_start_on_each_rank(root):
    try:
        trainer(root, QLoRAPrecision(r=4, target_modules=["0", "4"])).fit(Classifier(seed=RANK), loader(64, 4))
    except ValueError as error:
        return {"refused": str(error)}


def wrap_another_start_on_each_rank():
    module = Classifier(seed=RANK)
    convert(module, r=4)
    nn.parallel.DistributedDataParallel(module, process_group=torch.distributed.new_group())
    return tensors(module)


def fit_loaded(root):
    """Every rank loads a transformers folder, in 4 bits."""
    module = Loaded(root / "base")
    trainer(root, QLoRAPrecision(r=4, modules_to_save=["norm"]), max_steps=2).fit(module)
    return {name: value.detach().clone() for name, value in tensors(module).items()}


class Scaled(Classifier):
    """The gradients of one rank are too large for fp16, and those of the other too small."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e9 if self.global_rank else 1e-9)


def fit_in_fp16(root):
    module = Scaled()
    plugin = QLoRAPrecision(r=4, compute_dtype="fp16")
    trainer(root, plugin, max_epochs=4, gradient_clip_val=1.0).fit(module, loader(64))
    return tensors(module)


class Experts(Classifier):
    """Every rank calls another expert in its first step."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(self.experts[(self.global_rank + batch_idx) % 2](batch[0])), batch[1])


class Called(Classifier):
    def on_train_start(self):
        self.net(torch.randn(8, 64) + self.global_rank)


def fit_calibrated(root, kind=Classifier, **arguments):
    """The state, and the report of the calibration."""
    pl.seed_everything(1, verbose=False)
    module = kind(dropout=0.1, seed=2)
    plugin = QLoRAPrecision(r=4, init_lora_weights="calibrated")
    options = {"max_steps": 3, "enable_checkpointing": False, "use_distributed_sampler": False, **arguments}
    samples = Subset(dataset(64), range(RANK, 64, 2))  # the samples are dealt out in turn
    trainer(root, plugin, **options).fit(module, DataLoader(samples, batch_size=4))
    return module.state_dict(), plugin.report.calibration


def calibrate_another_start_on_each_rank(root):
    """Without a common seed: the base is that of rank 0, and the share of a layer's output that it changes still."""
    weight = Classifier(seed=0).net[0].weight.detach()
    module = Classifier(seed=0)
    plugin = QLoRAPrecision(r=16, lora_dropout=0.0, init_lora_weights="calibrated")
    trainer(root, plugin, max_steps=1, enable_checkpointing=False).fit(module, loader(64, 4))
    layer = module.net[0]
    rms = plugin.report.calibration.input_rms["net.0"]
    error = weight - layer.decode() - layer.scaling * (layer.initial[1] @ layer.initial[0])
    share = ((error * rms).norm() / (weight * rms).norm()).item()
    reported = plugin.report.calibration.errors["net.0"]
    return {"initial": layer.initial, "share": share, "reported": reported, "own loop": calibrate_in_own_loop()}


def calibrate_in_own_loop():
    """A loop without the Trainer: nothing is collective but what is named so."""
    torch.manual_seed(4)
    x = torch.randn(8, 64)

    def converted(shards=False):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        report = convert(net, r=4, lora_dropout=0.0, init_lora_weights="calibrated")
        if shards:
            to_parameters(net)
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        net(x[RANK::2]).square().sum().backward()
        return net, report, torch.optim.SGD(net.parameters(), lr=1e-3)

    net, _, optimizer = converted()
    optimizer.step()
    message = ""
    try:
        net(x)
    except RuntimeError as error:
        message = str(error)
    net, report, optimizer = converted()
    calibrate(net, replicas=torch.distributed.group.WORLD)
    optimizer.step()
    adapters = {name: value.detach() for name, value in net.named_parameters() if "lora_" in name}
    net, _, _ = converted(shards=True)
    sharded = ""
    try:
        calibrate(net)
    except ValueError as error:
        sharded = str(error)
    result = {
        "message": message,
        "sharded": sharded,
        "adapters": adapters,
        "rms": report.calibration.input_rms["0"],
        "inputs": x,
    }
    if RANK == 0:  # a stage of a pipeline: the other rank has other layers
        net, report, optimizer = converted()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            calibrate(net)
        optimizer.step()
        result |= {"alone": report.calibration.input_rms["0"], "warnings": [str(each.message) for each in caught]}
    return result


def main(root):
    folder = Path(root)
    results = {"loaded": fit_loaded(folder)} if (folder / "base").exists() else {}
    results["straight"] = fit(folder / "straight", 2)
    results["first"] = fit(folder / "first", 1)
    results["resumed"] = fit(folder / "resumed", 2, results["first"]["best"])
    results["started"] = fit_with_another_start_on_each_rank(folder / "started")
    results["started"]["own loop"] = wrap_another_start_on_each_rank()
    results["fp16"] = fit_in_fp16(folder / "fp16")
    results["calibrated"] = fit_calibrated(folder)
    results["accumulated"] = fit_calibrated(folder, accumulate_grad_batches=2)
    results["called"] = fit_calibrated(folder, Called)
    results["experts"] = fit_calibrated(folder, Experts, strategy="ddp_find_unused_parameters_true")
    results["unseeded"] = calibrate_another_start_on_each_rank(folder)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    run_rank(main)
