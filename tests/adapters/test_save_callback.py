"""SaveAdapter: which folders it writes and keeps, and what `newest` names. Ranks: test_ddp, test_dtensor."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_qlora import QLoRAPrecision, SaveAdapter, save_adapter
from tests.conftest import Classifier, loader, make_trainer

WEIGHTS = "adapter_model.safetensors"


def fit(root, *callbacks, ckpt_path=None, **arguments):
    """Epochs of 4 steps."""
    arguments = {"plugins": QLoRAPrecision(r=4), "enable_checkpointing": bool(callbacks[1:]), **arguments}
    trainer = make_trainer(root, callbacks=list(callbacks), **arguments)
    trainer.fit(Classifier(), loader(), ckpt_path=ckpt_path)
    return trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_newest_folders_stay_and_are_those_of_save_adapter(tmp_path):
    folder = tmp_path / "adapters"
    trainer = fit(tmp_path, SaveAdapter(folder, every_n_train_steps=3), max_epochs=2)
    assert names(folder) == ["newest", "step-6", "step-8"]
    assert (folder / "newest").read_text() == "step-8\n"
    assert names(folder / "step-8") == ["adapter_config.json", WEIGHTS]
    save_adapter(trainer.lightning_module, tmp_path / "now")
    assert (folder / "step-8" / WEIGHTS).read_bytes() == (tmp_path / "now" / WEIGHTS).read_bytes()
    assert (folder / "step-6" / WEIGHTS).read_bytes() != (tmp_path / "now" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("weights_only", "n", "steps"), [(False, None, [2, 4]), (True, None, [4]), (True, 2, [2, 4]), (False, 3, [2, 3, 4])]
)
@pytest.mark.parametrize("first", [True, False])
def test_each_checkpoint_has_its_folder(tmp_path, weights_only, n, steps, first):
    callbacks = [SaveAdapter(tmp_path / "a", n, keep=9), ModelCheckpoint(
        tmp_path, every_n_train_steps=2, save_weights_only=weights_only, save_last=True
    )]  # fmt: skip
    fit(tmp_path, *callbacks[:: 1 if first else -1])
    assert names(tmp_path / "a") == ["newest", *(f"step-{step}" for step in steps)]


def test_a_resumed_run_and_a_new_one_go_on_in_the_folder(tmp_path):
    folder, callback = tmp_path / "a", SaveAdapter(tmp_path / "a", every_n_train_steps=4)
    fit(tmp_path, callback, max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    fit(tmp_path, SaveAdapter(folder, every_n_train_steps=2), ckpt_path=tmp_path / "two.ckpt", max_epochs=3)
    assert names(folder) == ["newest", "step-10", "step-12"]
    fit(tmp_path, callback)  # the same object; its first step is smaller than those of the folders
    assert names(folder) == ["newest", "step-12", "step-4"]
    assert (folder / "newest").read_text() == "step-4\n"


def test_the_start_of_training_refuses_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="Classifier has no adapter"):
        fit(tmp_path, SaveAdapter(tmp_path / "a"), plugins=[])
    for wrong in ({"keep": 0}, {"every_n_train_steps": 0}, {"base": "16-bit"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SaveAdapter(tmp_path, **wrong)


def test_nothing_is_written_before_a_step_and_in_a_trial_run(tmp_path):
    folder = tmp_path / "a"
    fit(tmp_path, SaveAdapter(folder), fast_dev_run=True)
    trainer = make_trainer(tmp_path, callbacks=SaveAdapter(folder), plugins=QLoRAPrecision(r=4), max_steps=0)
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    assert names(folder) == []
    fit(tmp_path, SaveAdapter(folder), plugins=QLoRAPrecision(r=4, init_lora_weights="calibrated"))
    assert names(folder) == ["newest", "step-4"]


def test_newest_stays_when_a_folder_cannot_be_written(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "step-8").write_text("a file where the second folder goes")
    with pytest.raises(OSError, match="step-8"):
        fit(tmp_path, SaveAdapter(folder), max_epochs=2)
    assert names(folder) == ["newest", "step-4", "step-8"]
    assert (folder / "newest").read_text() == "step-4\n"
