"""`average`: the mean of what the checkpoints of one run trained."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_qlora import CheckpointMismatchError, QLoRAPrecision, convert, load_adapter, load_from_checkpoint
from lightning_qlora.adapters.average import average
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import save_adapter
from lightning_qlora.tools.cli import main
from tests.conftest import Classifier, loader, make_trainer

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three checkpoints of one run."""
    pytest.importorskip("jsonargparse")
    root = tmp_path_factory.mktemp("run")
    module, plugin = Classifier(), QLoRAPrecision(**ARGUMENTS, modules_to_save=["net.4"])
    for epochs in (1, 2, 3):
        run = make_trainer(root, plugins=plugin, max_epochs=epochs, enable_checkpointing=False)
        run.fit(module, loader(), ckpt_path=str(root / f"{epochs - 1}.ckpt") if epochs > 1 else None)
        run.save_checkpoint(root / f"{epochs}.ckpt")
    return [root / f"{epochs}.ckpt" for epochs in (1, 2, 3)]


def test_the_mean_of_checkpoints_is_the_mean_of_what_trains(checkpoints, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(["average", *map(str, checkpoints), str(tmp_path / "mean")])
    assert "the mean of 3 adapters, 1 layers" in capsys.readouterr().out
    modules = [load_from_checkpoint(Classifier, path) for path in checkpoints]
    assert not torch.equal(modules[0].net[0].lora_B, modules[1].net[0].lora_B)
    mean = load_from_checkpoint(Classifier, checkpoints[0])
    load_adapter(mean, tmp_path / "mean")
    for name, parameter in mean.named_parameters():
        if parameter.requires_grad:
            expected = torch.stack([m.get_parameter(name) for m in modules]).mean(0)
            torch.testing.assert_close(parameter.detach(), expected.detach(), msg=name)
    assert {n for n, p in mean.named_parameters() if p.requires_grad} == {
        "net.0.lora_A", "net.0.lora_B", "net.4.weight", "net.4.bias",
    }  # fmt: skip


def test_folders_and_checkpoints_are_averaged_alike(checkpoints, tmp_path):
    folders = [tmp_path / path.stem for path in checkpoints[:2]]
    for path, folder in zip(checkpoints, folders, strict=False):
        main(["export", str(path), str(folder)])
    main(["average", *map(str, folders), str(tmp_path / "of_folders"), "--weights_only", "true"])
    main(["average", *map(str, checkpoints[:2]), str(tmp_path / "of_files")])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("of_folders", "of_files"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 2}, r"0: the rank is 2, and 4 in"),
        ({"lora_alpha": 7}, r"0: lora_alpha is 7.0, and 16.0 in"),
        ({"use_dora": True}, "0: use_dora"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"quant_type": "fp4"}, "the quantization and initialization is"),
        ({"target_modules": ["0"]}, r"whether 2 is trained is False, and True in"),
    ],
)
def test_adapters_that_differ_are_refused(tmp_path, changes, words):
    for name, changed in (("one", changes), ("other", {})):
        module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(module, **{**ARGUMENTS, **changed})
        save_adapter(module, tmp_path / name)
    with pytest.raises(CheckpointMismatchError, match=words):
        average([read_adapter(tmp_path / "one"), read_adapter(tmp_path / "other")])


def test_another_base_is_refused_in_one_line(checkpoints, tmp_path, capsys, trainer):
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, modules_to_save=["net.4"]))
    run.fit(Classifier(seed=9), loader())
    run.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(SystemExit):
        main(["average", str(checkpoints[0]), str(tmp_path / "other.ckpt"), str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the fingerprint of the base is" in error and "Average adapters of one run" in error
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_is_refused(checkpoints, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["average", str(checkpoints[0]), str(tmp_path / "out")])
    assert "1 adapter(s) to average: pass two or more, and then" in capsys.readouterr().err


def test_adapters_of_two_runs_are_warned_of(tmp_path):
    module = nn.Sequential(nn.Linear(64, 64))
    convert(module, **ARGUMENTS)
    save_adapter(module, tmp_path / "one")
    with torch.no_grad():
        module[0].lora_A.copy_(torch.randn(4, 64) * module[0].lora_A.std())
    save_adapter(module, tmp_path / "other")
    with pytest.warns(UserWarning, match=r"of different runs.*Average checkpoints of one run"):
        average([read_adapter(tmp_path / "one"), read_adapter(tmp_path / "other")])
