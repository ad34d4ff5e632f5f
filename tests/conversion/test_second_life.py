"""A module that is merged and converted again, or becomes a part of another one: equal afterwards, or refused."""

import copy
import random
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRALinear,
    QLoRAPrecision,
    convert,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.plugin.precision import MERGED_BEFORE
from lightning_qlora.survey.records import conversion_of
from tests.conftest import Classifier, loader
from tests.toys import perturb, pretrain

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def body(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))


def trained(module, seed=0):
    return perturb(module, seed=seed).eval()


class Built(pl.LightningModule):
    """A LightningModule around a body and what was added to it."""

    def __init__(self, layers=(), net=None):
        super().__init__()
        self.save_hyperparameters("layers")
        self.net = net or body()
        for seed in layers[len(self.net) - 4 :]:
            torch.manual_seed(seed)
            self.net.append(nn.Linear(64, 64))

    def forward(self, x):
        return self.net(x)


def save(module, path):
    state = {key: value.clone() for key, value in module.state_dict().items()}
    torch.save(
        {"state_dict": state, "hyper_parameters": dict(module.hparams), "pytorch-lightning_version": pl.__version__},
        path,
    )


def test_merge_gives_back_what_conversion_took():
    module = body()
    module[3].bias.requires_grad_(False)
    module[1].weight.requires_grad_(False)

    def parameters():
        return {name: (p.requires_grad, p.dtype, p.shape) for name, p in module.named_parameters()}

    before = parameters()
    convert(module, r=4)
    merge(trained(module))
    assert parameters() == before
    assert module.state_dict().keys() == body().state_dict().keys()
    assert not [name for part in module.modules() for name in vars(part) if name.startswith(("was_", "lora_"))]


def test_a_second_module_around_a_converted_network(fit, tmp_path):
    class Preferences(pl.LightningModule):
        def __init__(self, net=None):
            super().__init__()
            self.policy = net or Classifier().net

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.policy(batch[0]), torch.zeros(1))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    first = Classifier()
    fit(first, loader())
    before = {name: p.detach().clone() for name, p in first.net.named_parameters()}
    second = Preferences(first.net)
    used = fit(second, loader())
    changed = {name for name, p in second.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    used.save_checkpoint(tmp_path / "c.ckpt")
    loaded = load_from_checkpoint(Preferences, tmp_path / "c.ckpt")
    assert torch.equal(loaded.eval().policy(X), second.eval().policy(X))
    assert {key: value.shape for key, value in first.state_dict().items()}  # the first module still saves itself


OTHERS = [
    {"use_rslora": True}, {"r": 8, "lora_alpha": 2},
    {"quant_type": "fp4", "compute_dtype": "bf16", "lora_dropout": 0.5}, {"block_size": 32}, {"use_dora": True},
    {"init_lora_weights": "gaussian"}, {"double_quant": False}, {"target_modules": ["4"]},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=[next(iter(other)) for other in OTHERS])
def test_new_layers_get_the_new_arguments_and_a_checkpoint_those_of_each_layer(other, tmp_path):
    module = Built()
    convert(module, r=4, lora_alpha=16)
    trained(module)
    old = {name: p for name, p in module.named_parameters() if p.requires_grad}
    torch.manual_seed(9)
    module.hparams.layers = [9]
    module.net.append(nn.Linear(64, 64))
    one_folder = set(other) <= {"use_rslora", "r", "lora_alpha", "target_modules"}
    report = convert(module, **{"r": 4, "target_modules": ["all-linear", "4"], **other})
    assert report.converted == ["net.0", "net.3", "net.4"]
    assert all(parameter is dict(module.named_parameters())[name] for name, parameter in old.items())
    trained(module, 1)
    save(module, tmp_path / "c.ckpt")
    loaded = load_from_checkpoint(Built, tmp_path / "c.ckpt").eval()
    assert torch.equal(loaded(X), module(X))
    names = ["quant_type", "block_size", "double_quant", "compute_dtype", "r", "lora_alpha", "lora_dropout"]
    names += ["use_rslora", "use_dora"]
    for name, layer in adapted_layers(module).items():
        there = adapted_layers(loaded)[name].config
        assert all(getattr(there, key) == getattr(layer.config, key) for key in names)
    if not one_folder:
        with pytest.raises(ValueError, match=rf"0 has {next(iter(other))}=.* and 4 has"):
            save_adapter(module.net, tmp_path / "folder")
        return
    save_adapter(module, tmp_path / "folder")
    from_folder = Built([9])
    convert(from_folder, adapter=str(tmp_path / "folder"))
    torch.testing.assert_close(from_folder.eval()(X), module(X))


def test_a_part_that_was_converted_alone_becomes_a_part_of_the_whole(tmp_path):
    module = Built()
    convert(module.net, r=4, exclude_modules=["3"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(module, r=4)
    assert report.converted == ["net.0"]
    assert report.skipped == {"net.3": "as an earlier conversion left it"}
    assert [key for key in module.state_dict() if key.endswith("_qlora_conversion")] == ["_qlora_conversion"]
    save(trained(module), tmp_path / "c.ckpt")
    assert torch.equal(load_from_checkpoint(Built, tmp_path / "c.ckpt").eval()(X), module(X))


def test_layers_added_later_stay_dense_in_evaluation_and_are_converted_for_training(fit, trainer):
    module = Classifier()
    fit(module, loader())
    module.net.append(nn.Linear(8, 8))
    module.probe = pretrain(nn.Linear(64, 64))
    used = trainer(plugins=QLoRAPrecision(r=4))
    used.validate(module, loader(), verbose=False)
    assert type(module.probe) is nn.Linear
    used.fit(module, loader())
    assert isinstance(module.probe, QLoRALinear)


def test_an_adapter_folder_for_a_converted_module_is_loaded_once_or_refused(tmp_path):
    source = body()
    convert(source, r=2, lora_alpha=3)
    save_adapter(trained(source), tmp_path / "folder")
    arguments = {"r": 4, "adapter": str(tmp_path / "folder")}
    module = body()
    convert(module, r=4)
    convert(module, **arguments)
    assert torch.equal(module.eval()(X), source(X))
    trained(module, 5)
    expected = module(X)
    convert(module, **arguments)  # as the Trainer does for each of its methods
    assert torch.equal(module(X), expected)
    for _ in range(2):  # further stages of a training, in other LightningModules
        convert(Built(net=module), **arguments)
    assert torch.equal(module(X), expected)
    save_adapter(module, tmp_path / "trained")
    for folder, outputs in [("trained", expected), ("folder", source(X))] * 2:  # two adapters compared on one module
        convert(module, r=4, adapter=str(tmp_path / folder))
        assert torch.equal(module(X), outputs)
    other = nn.Sequential(nn.Linear(64, 64))
    convert(other, r=4)
    with pytest.raises(CheckpointMismatchError, match=r"key 'base_model\.model\.3\.lora_A\.weight' does not fit"):
        convert(other, **arguments)


ARGUMENTS = {
    "r": [2, 4], "lora_alpha": [4, 16], "use_rslora": [False, True], "quant_type": [*QUANT_TYPES],
    "block_size": [32, 64], "double_quant": [False, True], "use_dora": [False, True],
    "init_lora_weights": ["default", "gaussian"], "checkpoint": ["adapter", "full"],
    "exclude_modules": [[], ["3"]],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_random_orders_are_equal_or_refused(seed, tmp_path):
    draw, module, layers, refused = random.Random(seed), Built(), [], 0
    for step in range(6):
        what = draw.choice(["convert", "convert", "merge", "wrap", "append", "part"])
        arguments = {name: draw.choice(values) for name, values in ARGUMENTS.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if what == "convert":
                convert(module, **arguments)
                trained(module, step)
            elif what == "part":
                convert(module.net, **arguments)
            elif what == "merge" and adapted_layers(module):
                merge(module)
            elif what == "wrap":
                module = Built(layers, module.net)
            elif what == "append":
                layers = [*layers, step + 10]
                module = Built(layers, module.net)
            module.eval()
            expected = module(X)
            if conversion_of(module) is None:
                continue
            save(module, tmp_path / "c.ckpt")
            try:
                loaded = load_from_checkpoint(Built, tmp_path / "c.ckpt").eval()
                assert torch.equal(loaded(X), expected), (what, arguments)
            except CheckpointMismatchError:
                refused += 1  # a base that was merged is not the base that the class builds
            try:
                save_adapter(module, tmp_path / "folder")
            except ValueError:
                continue
            again = copy.deepcopy(module)
            for layer in adapted_layers(again).values():
                layer.lora_B.data.zero_()
            load_adapter(again, tmp_path / "folder")
            torch.testing.assert_close(again(X), expected)
    assert refused <= 4


@pytest.mark.parametrize(("stage", "part"), [("validate", ""), ("test", "net"), ("predict", "")])
def test_a_merged_module_that_is_only_evaluated_stays_dense(stage, part, trainer):
    """Code that keeps the arguments of its Trainer (neuralforecast) evaluates with the plugin of the training."""
    module, run = Classifier(), {"plugins": QLoRAPrecision(r=4), "enable_checkpointing": False}
    trainer(**run).fit(module, loader())
    merge(module.get_submodule(part))
    with pytest.raises(ValueError, match="no module of this model fits"):
        convert(module, target_modules=["missing"])  # a conversion that fails changes nothing
    expected = module(torch.ones(3, 64))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    dense = Classifier()
    dense.load_state_dict(state)
    getattr(trainer(**run), stage)(module, loader())
    assert not adapted_layers(module)
    assert torch.equal(module(torch.ones(3, 64)), expected) and torch.equal(dense(torch.ones(3, 64)), expected)
    dense.load_state_dict(module.state_dict())


def test_a_merged_module_that_trains_is_converted_again_with_a_mark(trainer):
    module, run = Classifier(), {"plugins": QLoRAPrecision(r=4), "enable_checkpointing": False}
    trainer(**run).fit(module, loader())
    merge(module)
    for _ in range(2):
        trainer(**run).fit(module, loader())
    trainer(**run).test(module, loader())
    assert run["plugins"].report.notes == {MERGED_BEFORE: [""]}
    assert len(adapted_layers(module)) == 2


@pytest.mark.parametrize("manual", [False, True])
def test_adapters_that_are_merged_and_made_again_within_a_run_train(trainer, manual):
    """ReLoRA in a callback: the optimizer holds the new adapters, without the state of the old ones."""

    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()

    class Restart(pl.Callback):
        def on_train_epoch_end(self, run, module):
            if run.current_epoch == 1:
                merge(module)
                convert(module, r=4, lora_dropout=0.0)

    def fit(module, epochs, *callbacks):
        plugin = QLoRAPrecision(r=4, lora_dropout=0.0)
        run = trainer(plugins=plugin, max_epochs=epochs, callbacks=[*callbacks], enable_checkpointing=False)
        run.fit(module, loader(8))

    once, twice = (Manual() if manual else Classifier() for _ in range(2))
    fit(once, 4, Restart())
    fit(twice, 2)
    Restart().on_train_epoch_end(type("Run", (), {"current_epoch": 1}), twice)
    fit(twice, 2)
    assert once.losses == twice.losses
    assert all(torch.equal(*pair) for pair in zip(once.parameters(), twice.parameters(), strict=True))
