"""A network as an argument that `save_hyperparameters` keeps, as in lightning-hydra-template."""

import shutil
import tempfile

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qlora import QLoRAPrecision, load_from_checkpoint
from lightning_qlora.checkpoints.run_state import leave_out_networks, set_torch_rng_state_of_rank, torch_rng_states
from tests.conftest import Classifier, loader
from tests.mounts import mounted

pytestmark = pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance")


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.BatchNorm1d(256), nn.Linear(256, 64), nn.Linear(64, 8))


class Template(pl.LightningModule):
    def __init__(self, net, lr=1e-2, parts=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Data(pl.LightningDataModule):
    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader()


@pytest.fixture(params=["adapter", "full"])
def saved(request, trainer, tmp_path):
    net = make_net()
    module = Template(net, parts={"first": [net[0]]})
    used = trainer(plugins=QLoRAPrecision(r=4, checkpoint=request.param))
    used.fit(module, Data(net))
    used.save_checkpoint(tmp_path / "c.ckpt")
    used.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert module.hparams.net is net  # the user's code may read it
    return module.eval(), tmp_path / "c.ckpt", request.param


def test_the_network_must_be_passed(saved, tmp_path):
    module, path, _ = saved
    x = torch.randn(4, 64)
    for file in (path, tmp_path / "weights.ckpt"):
        loaded = load_from_checkpoint(Template, file, net=make_net()).eval()
        assert torch.equal(loaded(x), module(x)) and loaded.hparams.lr == 1e-2
    for given in ({}, {"weights_only": False}):
        with pytest.raises(ValueError, match=r"c\.ckpt: the hyperparameter 'net' was a Sequential.*Pass net=\.\.\."):
            load_from_checkpoint(Template, path, **given)


def test_the_base_is_not_in_the_file_a_second_time_and_lightnings_own_loading_says_how(saved, trainer, tmp_path):
    content = torch.load(saved[1], weights_only=True)
    hyperparameters = content["hyper_parameters"]
    first = hyperparameters["parts"]["first"][0]
    for network in (hyperparameters["net"], content["datamodule_hyper_parameters"]["net"], first):
        assert type(network).__name__ == "LeftOut"
    assert hyperparameters["lr"] == 1e-2
    other = {"hyper_parameters": {"other": nn.Linear(2, 2)}}
    leave_out_networks(other, saved[0])
    assert type(other["hyper_parameters"]["other"]) is nn.Linear  # it is no part of the module
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_qlora_conversion"):
        Template.load_from_checkpoint(saved[1])
    with pytest.raises(AttributeError, match=r"'in_features' of a Sequential: .*load_from_checkpoint"):
        _ = hyperparameters["net"].in_features
    plain = trainer()
    plain.fit(Template(make_net()), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    hyperparameters = torch.load(tmp_path / "plain.ckpt", weights_only=False)["hyper_parameters"]
    assert type(hyperparameters["net"]) is nn.Sequential


def test_the_trainer_resumes(saved, trainer):
    _, path, kind = saved
    resumed = trainer(plugins=QLoRAPrecision(r=4, checkpoint=kind), max_epochs=2)
    resumed.fit(Template(make_net()), loader(), ckpt_path=path)
    assert resumed.current_epoch == 2


def test_the_generator_of_a_gpu_is_saved_and_restored(monkeypatch):
    """By torch.cuda in place of one; test_precision.py has that of the CPU."""
    restored = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    set_torch_rng_state_of_rank(torch_rng_states(gathered=False))
    assert [each.item() for each in restored] == [7]


def test_a_full_disk_leaves_the_previous_checkpoint_whole(trainer, tmp_path, monkeypatch):
    """Where TMPDIR is on the disk of the checkpoints, as docs/checkpoints.md says: Lightning renames a file then."""
    used = trainer(plugins=QLoRAPrecision(r=4))
    used.fit(Classifier(), loader())
    with mounted(tmp_path / "disk", "size=4m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        used.save_checkpoint(disk / "last.ckpt")
        before = (disk / "last.ckpt").read_bytes()
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        with pytest.raises(OSError, match="No space left"):
            used.save_checkpoint(disk / "last.ckpt")
        assert (disk / "last.ckpt").read_bytes() == before
        (disk / "other").unlink()
        used.save_checkpoint(disk / "last.ckpt")
        assert torch.load(disk / "last.ckpt", weights_only=True).keys() >= {"state_dict", "optimizer_states"}
