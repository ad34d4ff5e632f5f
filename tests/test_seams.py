import ast
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

import lightning_qlora
from lightning_qlora import QLoRAPrecision, seams


def test_strategies_restore_after_conversion_with_the_plugin_and_as_before_without(trainer):
    assert trainer(plugins=QLoRAPrecision(r=4)).strategy.restore_checkpoint_after_setup is True
    assert trainer().strategy.restore_checkpoint_after_setup is False
    assert (
        pl.Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False).strategy.restore_checkpoint_after_setup
        is False
    )


def test_the_seam_is_one_layer_however_often_it_is_made():
    before = Strategy.restore_checkpoint_after_setup
    seams.restore_checkpoint_after_conversion()
    seams.restore_checkpoint_after_conversion()
    assert Strategy.restore_checkpoint_after_setup is before
    for strategy in (SingleDeviceStrategy, DDPStrategy):
        assert strategy.restore_checkpoint_after_setup is before


def test_every_seam_names_its_upstream_file_and_what_would_remove_it():
    functions = [n for n in ast.parse(Path(seams.__file__).read_text()).body if isinstance(n, ast.FunctionDef)]
    assert functions
    for function in functions:
        text = ast.get_docstring(function)
        assert "Upstream:" in text, function.name
        assert ".py" in text, function.name
        assert "Removed by:" in text, function.name


@pytest.mark.parametrize("target", ["torch", "lightning", "transformers"])
def test_nobody_elses_attributes_are_set_outside_seams(target):
    for path in Path(lightning_qlora.__file__).parent.rglob("*.py"):
        if path.name == "seams.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for name in targets:
                if isinstance(name, ast.Attribute):
                    root = name
                    while isinstance(root, ast.Attribute):
                        root = root.value
                    assert not (isinstance(root, ast.Name) and root.id == target), f"{path}:{node.lineno}"
