"""What a run with the plugin restores runs no code of its author, whatever the version of Lightning, from any place."""

import pickle
import re

import pytest
import torch

from lightning_qlora import QLoRAPrecision
from tests.conftest import Classifier, launch, loader
from tests.files.test_lightning_checkpoint import Code, ran
from tests.toys import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_the_trainer_restores_without_code_unless_it_is_asked(method, checkpoint, fit):
    fit(method, path=checkpoint / "good.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        fit(method, path=checkpoint / "bad.ckpt")
    assert not ran
    fit(method, path=checkpoint / "bad.ckpt", weights_only=False)
    assert ran


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
