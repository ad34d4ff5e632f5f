"""Parts that were never trained train in full beside pretrained ones; everything new means nothing new."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_qlora import (
    QLoRALinear,
    QLoRAPrecision,
    convert,
    load_from_checkpoint,
    merge,
)
from lightning_qlora.conversion.report import NOTHING_PRETRAINED
from lightning_qlora.survey.untrained import AS_THE_BLOCK, BY_VALUES
from tests.conftest import launch, make_trainer
from tests.toys import assert_equal, pretrain

WIDTH = 64


def backbone():
    """Pretrained: linear layers, and others."""
    return pretrain(
        nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.GELU()
        )
    )


def block(inputs, outputs):
    return nn.Sequential(nn.Conv1d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


def decoder():
    return nn.Sequential(block(1, 32), block(32, 32), nn.Conv1d(32, 4, 1))


class Segmenter(pl.LightningModule):
    """A pretrained backbone with a new decoder and a new head."""

    def __init__(self, dtype="float32", pretrained=True, seed=0):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = backbone() if pretrained else nn.Sequential(*(copy.deepcopy(part) for part in _fresh()))
            self.decoder = decoder()
            self.head = nn.Linear(4 * WIDTH, 100)
        self.to(getattr(torch, dtype))

    def forward(self, x):
        return self.head(self.decoder(self.backbone(x)[:, None]).flatten(1))

    def training_step(self, x, batch_idx):
        loss = F.mse_loss(self(x).float(), x.float().roll(1, 1).repeat(1, 2)[:, :100])
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 3e-3)


def _fresh():
    return [nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.GELU()]


def batches(dtype=torch.float32, count=4):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(list(torch.randn(8 * count, WIDTH, generator=generator).to(dtype)), batch_size=8)


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name}


NEW = {"decoder.0.0", "decoder.0.1", "decoder.1.0", "decoder.1.1", "decoder.2", "head"}


def test_new_parts_train_in_full_beside_a_pretrained_backbone():
    module = Segmenter()
    report = convert(module, r=4)
    assert report.converted == ["backbone.0", "backbone.3"] and report.frozen == ["backbone.2"]
    assert set(report.trained_in_full) == NEW and not report.notes
    assert report.trained_in_full["head"] == f"{BY_VALUES}, uniform in +-{(4 * WIDTH) ** -0.5:.2g}"
    assert report.trained_in_full["decoder.0.1"] == AS_THE_BLOCK  # a norm
    assert trained(module) == {n for n, _ in module.named_parameters() if n.startswith(("decoder", "head"))}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_loss_of_a_new_decoder_follows_that_of_plain_torch(dtype, tmp_path):
    plain = Segmenter(dtype)
    plain.backbone.requires_grad_(False)
    ours = Segmenter(dtype)
    arguments = {"max_epochs": 15}
    data = batches(getattr(torch, dtype))
    precision = "32-true" if dtype == "float32" else "bf16-true"
    make_trainer(tmp_path, **arguments, precision=precision).fit(plain, data)
    make_trainer(tmp_path, **arguments, plugins=QLoRAPrecision(r=4)).fit(ours, data)
    assert ours.head.weight.dtype is ours.decoder[0][0].weight.dtype is torch.float32
    first, last = plain.losses[0], sum(plain.losses[-4:]) / 4
    assert ours.losses[0] == pytest.approx(first, rel=0.1) and last < 0.75 * first
    assert sum(ours.losses[-4:]) / 4 < last + 0.1 * (first - last)


def test_everything_new_means_nothing_new_with_a_mark_in_the_first_row():
    module = Segmenter(pretrained=False)
    with pytest.warns(UserWarning, match="nothing looks pretrained.*Load the weights in __init__ or configure_model"):
        report = convert(module, r=4)
    assert report.converted == ["backbone.0", "backbone.3", "head"] and not report.trained_in_full
    assert next(iter(report.notes)) == NOTHING_PRETRAINED
    assert report.rows()[0][:2] == ("(the module itself)", f"! {NOTHING_PRETRAINED}")


def test_few_parts_that_are_no_initialization_do_not_make_the_others_new():
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    pretrain(module[3])
    report = convert(module, r=4)
    assert len(report.converted) == 12 and NOTHING_PRETRAINED in report.notes


def test_parts_of_which_nothing_is_known_are_converted_as_before():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in module:
        nn.init.normal_(layer.weight, std=0.0873)
    report = convert(module, r=4)
    assert report.converted == ["0", "1"] and not report.notes


class _Words(nn.Module):
    """Layers with the normal values of an initialization, of which a few steps change little."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(100, WIDTH)
        self.mix = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU())
        nn.init.kaiming_normal_(self.mix[0].weight)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 100)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, x):
        x = self.mix(self.tokens(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.layer(x)))


def test_a_module_that_was_trained_for_a_few_steps_is_pretrained_in_all_parts():
    module = _Words()
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(5):
        tokens = torch.randint(100, (8, 12))
        F.cross_entropy(module(tokens).flatten(0, 1), tokens[:, 2:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = convert(nn.ModuleDict({"words": module, "new": nn.Linear(WIDTH, 100)}), r=4)
    assert set(report.trained_in_full) == {"new"}


HEADS = {
    "linear": lambda: nn.Linear(WIDTH, 100),
    "wide": lambda: nn.Linear(2048, 2048),
    "few outputs": lambda: nn.Linear(512, 1),
    "normal": lambda: _filled(nn.Linear(WIDTH, 20), nn.init.normal_, std=0.01),
    "zeros": lambda: _filled(nn.Linear(WIDTH, 20), nn.init.zeros_),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 80), nn.LayerNorm(80), nn.Linear(80, 3)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 1, 1)),
    "few values": lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 1, 1)),
    "recurrent": lambda: nn.LSTM(WIDTH, 32, bidirectional=True),
    "embedding": lambda: nn.Embedding(300, 32),
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 128),
    "parameter": lambda: nn.ParameterList([torch.randn(100, WIDTH) * 0.02]),
    "queries": lambda: nn.ParameterList([torch.randn(100, WIDTH)]),
    "prompt": lambda: nn.ParameterList([torch.zeros(40, WIDTH)]),
    "layer scale": lambda: _Scaled(),
    "detector": lambda: _detector(),
}


def _filled(layer, initialize, **arguments):
    initialize(layer.weight, **arguments)
    nn.init.zeros_(layer.bias)
    return layer


def _detector():
    """RetinaNet's: small normal weights, and a bias that says how seldom objects are."""
    layers = [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 18, 3)]
    for layer in layers[::2]:
        _filled(layer, nn.init.normal_, std=0.01)
    nn.init.constant_(layers[2].bias, -4.6)
    return nn.Sequential(*layers)


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(1e-4 * torch.ones(WIDTH))


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_all_kinds_train_in_full(head):
    torch.manual_seed(1)
    module = nn.ModuleDict({"backbone": backbone(), "head": HEADS[head]()})
    report = convert(module, r=4)
    assert report.converted == ["backbone.0", "backbone.3"]
    assert trained(module) == {name for name, _ in module.named_parameters() if name.startswith("head")}
    assert all(reason.startswith("new: ") for reason in report.trained_in_full.values())


@pytest.mark.parametrize(
    ("arguments", "converted", "trains"),
    [
        ({"target_modules": ["all-linear", "head"]}, True, NEW - {"head"}),
        ({"target_modules": ["head"]}, True, NEW - {"head"}),
        ({"target_modules": ["backbone.0"]}, False, NEW),
        ({"exclude_modules": ["decoder"]}, False, {"head"}),
        ({"exclude_modules": ["head", "decoder.0"]}, False, NEW - {"head", "decoder.0.0", "decoder.0.1"}),
        ({"modules_to_save": ["decoder"]}, False, {"decoder", "head"}),
    ],
)
def test_names_decide_before_values(arguments, converted, trains):
    module = Segmenter()
    report = convert(module, r=4, **arguments)
    assert isinstance(module.head, QLoRALinear) is converted and set(report.trained_in_full) == trains


def test_what_the_module_froze_decides_before_values():
    module = Segmenter()
    module.decoder[0].requires_grad_(False)
    module.head.requires_grad_(False)
    report = convert(module, r=4)
    assert set(report.trained_in_full) == {"decoder.1.0", "decoder.1.1", "decoder.2"}
    assert report.skipped == {"head": "frozen by the module"}
    everything = Segmenter().requires_grad_(False)
    assert convert(everything, r=4).converted == ["backbone.0", "backbone.3", "head"]


def test_a_new_head_beside_a_frozen_backbone_trains_and_the_report_says_that_nothing_is_in_4_bits():
    module = Segmenter()
    module.backbone.requires_grad_(False)
    report = convert(module, r=4)
    assert report.converted == [] and set(report.trained_in_full) == NEW
    assert any("target_modules converts frozen layers that it names" in text for text in report.notes)


def test_a_new_critic_trains_in_full_beside_a_pretrained_generator():
    module = nn.ModuleDict({"generator": backbone(), "critic": nn.Sequential(*_fresh(), nn.Linear(WIDTH, 1))})
    report = convert(module, r=4)
    assert report.converted == ["generator.0", "generator.3"]
    assert trained(module) == {name for name, _ in module.named_parameters() if name.startswith("critic")}


def test_tied_new_parts_train_as_one_tensor():
    module = nn.ModuleDict({"backbone": backbone(), "tokens": nn.Embedding(300, WIDTH), "head": nn.Linear(WIDTH, 300)})
    module["head"].weight = module["tokens"].weight
    report = convert(module, r=4)
    assert {"tokens", "head"} <= set(report.trained_in_full) and module["head"].weight is module["tokens"].weight
    assert module["head"].weight.requires_grad


def test_layers_that_were_never_loaded_inside_a_pretrained_model_train_in_full():
    layers = [pretrain(nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True), seed) for seed in range(3)]
    module = nn.Sequential(*layers, nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True))
    report = convert(module, r=4)
    assert report.converted and not any(name.startswith("3.") for name in report.converted)
    assert trained(module) == {name for name, _ in module.named_parameters() if name.startswith("3.")}


def test_norms_that_were_never_trained_in_a_pretrained_block_stay_as_the_block():
    module = backbone()
    module.append(nn.LayerNorm(WIDTH)).append(pretrain(nn.Linear(WIDTH, WIDTH)))
    report = convert(module, r=4)
    assert not report.trained_in_full and not trained(module)


def test_new_experts_beside_a_pretrained_part_train_in_full():
    experts = nn.Module()
    experts.num_experts = 4
    experts.up = nn.Parameter(torch.randn(4, 64, 32) * 0.02)
    module = nn.ModuleDict({"backbone": backbone(), "experts": experts})
    report = convert(module, r=4)
    assert trained(module) == {"experts.up"} and report.trained_in_full["experts.up"].startswith(BY_VALUES)


def test_parts_that_are_added_later_are_new_and_merged_ones_look_trained():
    module = Segmenter()
    convert(module, r=4)
    module.second = nn.Linear(WIDTH, 100)
    assert "second" in convert(module, r=4).trained_in_full
    with torch.no_grad():
        module.head.weight.add_(0.01 * torch.randn_like(module.head.weight))
    report = convert(merge(module), r=4)
    assert {"backbone.0", "backbone.3", "head"} == {*report.converted}


def test_a_training_of_a_step_is_enough():
    layer = nn.Linear(128, 128)
    module = nn.Sequential(pretrain(nn.Linear(128, 128)), layer)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    layer(torch.randn(64, 128)).square().mean().backward()
    optimizer.step()
    assert convert(module, r=4).converted == ["0", "1"]


def test_weights_that_are_loaded_before_fit_decide(tmp_path):
    module = Segmenter(pretrained=False)
    module.load_state_dict({f"backbone.{key}": value for key, value in backbone().state_dict().items()}, strict=False)
    make_trainer(tmp_path, max_steps=1, plugins=QLoRAPrecision(r=4)).fit(copy.deepcopy(module), batches())
    assert set(convert(module, r=4).trained_in_full) == NEW


def test_a_module_on_the_meta_device_is_converted_as_before():
    from lightning_qlora import QLoRAConfig
    from lightning_qlora.selection.selection import select_layers

    with torch.device("meta"):
        module = nn.ModuleDict({"backbone": nn.Linear(64, 64), "head": nn.Linear(64, 64), "conv": nn.Conv1d(4, 4, 3)})
    choice = select_layers(module, QLoRAConfig(r=4))
    assert [*choice.convert] == ["backbone", "head"] and not choice.train


def test_a_run_that_is_resumed_has_the_parts_of_its_checkpoint(tmp_path):
    arguments = {"r": 4, "lora_dropout": 0.0}
    run = make_trainer(tmp_path, plugins=QLoRAPrecision(**arguments))
    first = Segmenter()
    run.fit(first, batches(count=2))
    run.save_checkpoint(tmp_path / "c.ckpt")
    whole = Segmenter()
    make_trainer(tmp_path, max_epochs=2, plugins=QLoRAPrecision(**arguments)).fit(whole, batches(count=2))
    again = Segmenter(seed=3)
    plugin = QLoRAPrecision(**arguments)
    make_trainer(tmp_path, max_epochs=2, plugins=plugin).fit(again, batches(count=2), ckpt_path=tmp_path / "c.ckpt")
    assert plugin.report.converted == ["backbone.0", "backbone.3"]
    assert trained(again) == trained(first)
    assert_equal(list(again.parameters()), list(whole.parameters()))
    loaded = load_from_checkpoint(Segmenter, tmp_path / "c.ckpt", seed=5)
    assert trained(loaded) == trained(first)
    assert_equal(list(loaded.parameters()), list(first.parameters()))


@pytest.mark.slow
def test_all_ranks_train_the_parts_that_are_new_on_rank_0(tmp_path):
    first, second = launch("tests.scripts.new_parts_on_ranks", tmp_path)[1]
    for name, (state, names, reasons) in first.items():
        assert reasons == second[name][2] and set(reasons) == NEW
        assert names == second[name][1]
        other = {key: second[name][0][key] for key in state if "running" not in key}  # each had its own last batch
        assert_equal({key: state[key] for key in other}, other)


def test_parts_in_fp64_say_what_they_are():
    """Such a part is read with the others, whatever its values are; a Linear in it stays dense."""
    model = nn.Sequential(backbone(), backbone().double(), nn.Linear(WIDTH, 100).double())
    report = convert(model, r=2)
    assert report.converted == ["0.0", "0.3"] and BY_VALUES in report.trained_in_full["2"]
    assert not model[1][0].weight.requires_grad and not model[1][0].bias.requires_grad
