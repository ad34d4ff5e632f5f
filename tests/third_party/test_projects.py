"""Modules of other packages: they train, resume, load and merge as the plain module, and are saved by their package."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAPrecision, convert, load_from_checkpoint, merge
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.third_party.projects import PROJECTS

pytestmark = pytest.mark.third_party
RECORD = Path(__file__).parents[1] / "record.md"


@pytest.fixture(params=PROJECTS)
def name(request):
    pytest.importorskip(PROJECTS[request.param].package)
    return request.param


def build(project):
    torch.manual_seed(0)
    return project.build()


def fit(project, root, ckpt_path=None, **config):
    """The module, its data, and the checkpoints after each of two epochs; plain without arguments of the plugin."""
    package = importlib.import_module(project.lightning)

    class Seed(
        package.Callback
    ):  # an epoch and a batch draw the same numbers in a resumed run, also without the plugin
        def on_train_batch_start(self, trainer, *_):
            package.seed_everything(trainer.global_step, verbose=False)

        def on_train_start(self, trainer, module):
            package.seed_everything(trainer.current_epoch, verbose=False)

        def on_train_epoch_end(self, trainer, module):
            package.seed_everything(trainer.current_epoch + 1, verbose=False)

    saver = package.callbacks.ModelCheckpoint(root, "{epoch}", save_top_k=-1)
    module, data = build(project)
    arguments = {"plugins": QLoRAPrecision(**config)} if config else {}
    trainer = project.trainer(root, callbacks=[saver, Seed()], **arguments)
    trainer.fit(module, **data, ckpt_path=ckpt_path, weights_only=False)
    return module, data, [root / f"epoch={epoch}.ckpt" for epoch in range(2)]


def metrics(project, root, module, data):
    """What a Trainer without the plugin logs in validation."""
    torch.manual_seed(0)
    return project.trainer(root).validate(module, **validation(data), verbose=False)[0]


def validation(data):
    loader = data.get("val_dataloaders")
    return {"datamodule": data["datamodule"]} if loader is None else {"dataloaders": loader}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_trains_and_validates(name, tmp_path):
    project = PROJECTS[name]
    module, data, _ = fit(project, tmp_path, r=4)
    plain, _, _ = fit(project, tmp_path)
    fresh, _ = build(project)
    trains = {key for key, layer in adapted_layers(module).items() if layer.lora_B.any()}
    weights = [dict(each.named_parameters()) for each in (fresh, plain)]
    moves = {key for key in adapted_layers(module) if not torch.equal(*(of[f"{key}.weight"] for of in weights))}
    assert trains <= moves and len(trains) > len(moves) / 2  # fewer where a weight moves because a bias does
    linear = sum(part.weight.numel() for part in fresh.modules() if isinstance(part, nn.Linear))
    report = convert(fresh, r=4)
    trained = dict(module.named_parameters())
    assert all(torch.equal(p, trained[key]) for key, p in fresh.named_parameters() if not p.requires_grad)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics(project, tmp_path, module, data).values())
    share = sum(rows * columns for rows, columns in report.shapes.values()) / linear
    assert f"| {name} | {share:.1%} |" in RECORD.read_text(), f"{share:.1%}"


def test_resumes_where_the_plain_module_does(name, tmp_path):
    project = PROJECTS[name]
    for config in ({}, {"r": 4}):
        roots = [tmp_path / f"{len(config)}{part}" for part in range(2)]
        straight, _, paths = fit(project, roots[0], **config)
        resumed, _, _ = fit(project, roots[1], paths[0], **config)
        equal = same(straight.state_dict(), resumed.state_dict())
        assert equal == project.resumes or (equal and config)


@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_loads_and_merges(name, tmp_path, checkpoint):
    project = PROJECTS[name]
    trained, data, paths = fit(project, tmp_path, r=4, checkpoint=checkpoint)
    expected = metrics(project, tmp_path, trained, data)
    if checkpoint == "adapter":  # onto the same base, by a Trainer
        module, _ = build(project)
        trainer = project.trainer(tmp_path, plugins=QLoRAPrecision(r=4))
        trainer.validate(module, **validation(data), ckpt_path=paths[1], weights_only=False, verbose=False)
    else:  # with the base, by the class
        module = load_from_checkpoint(type(trained), paths[1], weights_only=False, **project.load(trained))
        vars(module).update({key: getattr(trained, key) for key in project.attributes})
    assert metrics(project, tmp_path, module, data) == pytest.approx(expected, rel=1e-5)
    merge(module)
    assert metrics(project, tmp_path, module, data) == pytest.approx(expected, rel=1e-3)
    plain, _ = build(project)
    assert [type(part) for part in module.modules()] == [type(part) for part in plain.modules()]
    plain.load_state_dict(module.state_dict())
    assert [(n, p.dtype, p.requires_grad) for n, p in module.named_parameters()] == [
        (n, p.dtype, p.requires_grad) for n, p in plain.named_parameters()
    ]


def test_its_package_saves_and_loads_it(name, tmp_path):
    PROJECTS[name].own(tmp_path)
