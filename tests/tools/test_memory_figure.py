"""`plan --plot`: the bars by part, the picture, and what is said without matplotlib."""

import sys

import pytest

from lightning_qlora import estimate_memory
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_figure import compare
from tests.toys import toy

pytest.importorskip("transformers")


def test_full_fine_tuning_is_counted_by_hand():
    model = toy("llama").bfloat16()
    count = sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_memory(model, 2, 12, r=4)
    bars = compare(model, estimate, 2, 12, "adamw", QLoRAConfig(r=4))
    full, lora, qlora, paged = bars.values()
    assert (full["weights"], full["optimizer state"]) == (2 * count, 8 * count)
    assert full["gradients"] <= 2 * count
    assert lora["weights"] == 2 * count and lora["adapters"] == qlora["adapters"] == estimate.parts["trained weights"]
    assert sum(qlora.values()) == estimate.total and sum(paged.values()) == estimate.device
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_picture(tmp_path, capsys, monkeypatch):
    toy("llama").save_pretrained(tmp_path / "base")
    capsys.readouterr()
    command = [
        "plan",
        str(tmp_path / "base"),
        "--r",
        "4",
        "--sequence-length",
        "16",
        "--plot",
        str(tmp_path / "memory.svg"),
    ]
    pytest.importorskip("matplotlib")
    main(command)
    out, err = capsys.readouterr()
    assert "QLoRA" in out and err == ""
    assert (tmp_path / "memory.svg").read_text().count("optimizer state") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(command)
    assert "needs matplotlib: " in capsys.readouterr().err
