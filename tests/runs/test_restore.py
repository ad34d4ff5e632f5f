"""What a run with the plugin restores runs no code of its author, whatever the version of Lightning, from any place."""

import inspect
import pickle
import re
import threading
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_qlora import QLoRAPrecision, load_from_checkpoint
from tests.conftest import Classifier, launch, loader, raises_in_one_line
from tests.files.test_lightning_checkpoint import Code, ran
from tests.toys import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HAS_ARGUMENT = "weights_only" in inspect.signature(Trainer.fit).parameters


@pytest.fixture(autouse=True)
def _nothing_ran(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    ran.clear()


@pytest.fixture
def fit(trainer):
    def run_trainer(method="fit", module=None, path=None, plugins=None, **arguments):
        plugins = QLoRAPrecision(r=4, lora_dropout=0.0) if plugins is None else plugins
        new = trainer(plugins=plugins, max_epochs=2 if path else 1, enable_checkpointing=False)
        getattr(new, method)(module or Classifier(), loader(), ckpt_path=path, **arguments)
        return new

    return run_trainer


@pytest.fixture
def checkpoint(fit, tmp_path):
    """Paths of an honest checkpoint, and of one with code among its hyperparameters."""
    fit().save_checkpoint(tmp_path / "good.ckpt")
    content = torch.load(tmp_path / "good.ckpt", weights_only=True)
    content["hyper_parameters"]["x"] = Code()
    torch.save(content, tmp_path / "bad.ckpt")
    return tmp_path


@pytest.fixture(params=["path", "address"])
def place(request, checkpoint):
    """What stands before the name of a file: a folder, or an address."""
    if request.param == "path":
        yield str(checkpoint)
        return
    pytest.importorskip("aiohttp")  # fsspec's
    handler = type("Handler", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(checkpoint))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("method", ["fit", "validate", "test"])
def test_the_trainer_restores_without_code_unless_it_is_asked(method, place, fit, monkeypatch):
    if method == "test":
        monkeypatch.setattr(Classifier, "test_step", Classifier.validation_step, raising=False)
    fit(method, path=f"{place}/good.ckpt")
    with raises_in_one_line(pickle.UnpicklingError, "holds a .*run, a hyperparameter for example"):
        fit(method, path=f"{place}/bad.ckpt")
    assert not ran
    if HAS_ARGUMENT:
        fit(method, path=f"{place}/bad.ckpt", weights_only=False)
        assert ran.pop()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    fit(method, path=f"{place}/bad.ckpt")
    assert ran


def test_fabric_restores_without_code_unless_it_is_asked(place, monkeypatch):
    def load(path, **arguments):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(r=4))
        return fabric.load(path, **arguments)

    assert "state_dict" in load(f"{place}/good.ckpt")
    with raises_in_one_line(pickle.UnpicklingError, "holds a .*run"):
        load(f"{place}/bad.ckpt")
    assert not ran
    if "weights_only" in inspect.signature(Fabric.load).parameters:
        load(f"{place}/bad.ckpt", weights_only=False)
        assert ran.pop()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load(f"{place}/bad.ckpt")
    assert ran


def test_load_from_checkpoint_reads_a_file_once_more_without_code(checkpoint, monkeypatch):
    """Lightning 2.5 reads it again with weights_only=False, and the file may be another one by then."""
    read = torch.load
    given = []
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: given.append(kwargs["weights_only"]) or read(*args, **kwargs)
    )
    load_from_checkpoint(Classifier, checkpoint / "good.ckpt")
    assert given == [True, True]


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
def test_a_function_that_hyperparameters_name_is_not_called(key, checkpoint):
    """Lightning 2.5 calls any, with the class and the hyperparameters."""
    content = torch.load(checkpoint / "good.ckpt", weights_only=True)
    for number, value in enumerate((f"{__name__}.called", ["a"], 3)):
        torch.save({**content, key: {"_instantiator": value}}, checkpoint / f"{number}.ckpt")
        with raises_in_one_line(ValueError, rf"{number}.ckpt: the hyperparameters have _instantiator="):
            load_from_checkpoint(Classifier, checkpoint / f"{number}.ckpt")
    assert not ran
    if not HAS_ARGUMENT and key == "hyper_parameters":
        load_from_checkpoint(Classifier, checkpoint / "0.ckpt", weights_only=False)
        assert ran
    pytest.importorskip("jsonargparse")
    hyperparameters = {"width": 64, "_instantiator": "lightning.pytorch.cli.instantiate_module"}  # of LightningCLI
    torch.save({**content, key: hyperparameters}, checkpoint / "cli.ckpt")
    assert load_from_checkpoint(Classifier, checkpoint / "cli.ckpt").hparams.width == 64


def called(kind, hyperparameters):
    ran.append(1)
    return kind()


def test_a_run_without_the_plugin_restores_as_before(fit, checkpoint, tmp_path):
    fit(plugins=[]).save_checkpoint(tmp_path / "plain.ckpt")
    content = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    content["hyper_parameters"]["x"] = Code()
    torch.save(content, tmp_path / "plain.ckpt")
    refused = pytest.raises(pickle.UnpicklingError) if HAS_ARGUMENT else nullcontext()
    with refused:
        fit(plugins=[], path=str(tmp_path / "plain.ckpt"))
    assert bool(ran) != HAS_ARGUMENT


# ---------------------------------------------------------------- shards


class Sharded(Classifier):
    def configure_model(self):
        if self._device_mesh is not None and not isinstance(self.net, FSDPModule):
            self.trainer.precision_plugin.convert_module(self.net)
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.fixture
def shards(trainer, one_rank, tmp_path):
    """A folder of shards, and what resumes it."""

    def resume(path=None, **arguments):
        new = trainer(
            strategy=ModelParallelStrategy(1, 1),
            plugins=QLoRAPrecision(r=4, lora_dropout=0.0),
            max_epochs=2 if path else 1,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        module = Sharded()
        new.fit(module, loader(), ckpt_path=path, **arguments)
        return new, module

    new, _ = resume()
    new.save_checkpoint(tmp_path / "shards.ckpt")
    return tmp_path / "shards.ckpt", partial(resume, str(tmp_path / "shards.ckpt"))


def change_value(folder, number, value):
    """Put another object in place of a value of a checkpoint that is no tensor, such as a learning rate."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    kinds = index.state_dict_metadata
    names = [key for key in index.storage_data if type(kinds[key.fqn]).__name__ == "BytesStorageMetadata"]
    torch.save(value, folder / "other.distcp")
    size = (folder / "other.distcp").stat().st_size
    index.storage_data[names[number]] = _StorageInfo("other.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return names[number].fqn


def test_code_in_place_of_a_value_of_shards_does_not_run(shards, monkeypatch):
    folder, resume = shards
    honest = (folder / ".metadata").read_bytes()
    for number in range(3):
        (folder / ".metadata").write_bytes(honest)
        change_value(folder, number, Code())
        for arguments in ({}, {"weights_only": True})[: 1 + HAS_ARGUMENT]:
            with raises_in_one_line(ValueError, "shards.ckpt: holds a .*run"):
                resume(**arguments)
    index = pickle.loads(honest)
    index.planner_data["x"] = Code()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with raises_in_one_line(ValueError, "shards.ckpt: holds a .*run"):
        resume()
    assert not ran
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (folder / ".metadata").write_bytes(honest)
    change_value(folder, 0, Code())
    with pytest.raises(BaseException):  # None is no learning rate  # noqa: B017, PT011
        resume()
    assert ran


def test_other_values_in_the_file_beside_the_shards_are_refused(shards, tmp_path):
    folder, resume = shards
    (folder / "meta.pt").rename(tmp_path / "elsewhere.pt")
    (folder / "meta.pt").symlink_to(tmp_path / "elsewhere.pt")
    with raises_in_one_line(ValueError, "meta.pt: is a symbolic link to .*elsewhere.pt, outside of the folder"):
        resume()
    (folder / "meta.pt").unlink()
    torch.save({**torch.load(tmp_path / "elsewhere.pt", weights_only=True), "x": Code()}, folder / "meta.pt")
    for arguments in ({}, {"weights_only": True})[: 1 + HAS_ARGUMENT]:
        with raises_in_one_line(pickle.UnpicklingError, "shards.ckpt: holds a .*run"):
            resume(**arguments)
    assert not ran


def test_honest_shards_resume_with_all_their_values(shards):
    folder, resume = shards
    name = change_value(folder, 0, 0.125)
    new, module = resume()
    groups = new.optimizers[0].param_groups
    assert 0.125 in [value for group in groups for value in group.values() if isinstance(value, float)], name
    assert len(module.losses) == 4 and new.current_epoch == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_all_ranks_refuse_what_one_of_them_reads_and_resume_from_an_honest_checkpoint(strategy, tmp_path):
    _, ranks = launch("tests.scripts.strange_files_on_ranks", tmp_path, strategy)
    for rank in ranks:
        assert rank["errors"].keys() == ranks[0]["errors"].keys()
        for change, text in rank["errors"].items():
            expected = r"\.ckpt: " if change != "another_type_in_the_shard_of_one_rank" else "is torch.float64 of shape"
            assert re.search(expected, text) and "\n" not in text, (change, text)
        assert_equal(rank["resumed"], rank["straight"])
    assert_equal(ranks[0]["resumed"], ranks[1]["resumed"])
