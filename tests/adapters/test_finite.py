"""Adapters that hold NaN or Inf are saved in no form, and files that were saved before stay."""

import pytest
import torch

from lightning_qlora import QLoRAPrecision, merge, save_adapter
from tests.conftest import Classifier, loader


@pytest.mark.parametrize("save", ["checkpoint", "save_adapter", "merge"])
def test_what_was_saved_before_stays_and_the_layer_and_step_are_named(trainer, tmp_path, save):
    module = Classifier()
    fit = trainer(plugins=QLoRAPrecision(r=4), max_steps=2, enable_checkpointing=False)
    fit.fit(module, loader())
    steps = {
        "checkpoint": lambda: fit.save_checkpoint(tmp_path / "x.ckpt"),
        "save_adapter": lambda: save_adapter(module, tmp_path / "folder"),
        "merge": lambda: merge(module),
    }
    if save != "merge":
        steps[save]()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    with torch.no_grad():
        module.net[0].lora_B[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"net\.0: its adapter holds NaN or Inf after step 2, as those of 1 of 2"):
        steps[save]()
    assert [path.read_bytes() for path in files] == before
    assert torch.isnan(module.net[0].lora_B).any()
