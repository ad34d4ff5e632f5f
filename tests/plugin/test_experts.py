"""A mixture of experts under the real Trainer, its checkpoints, merging to 16 bits, calibration, the planner."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils.data import DataLoader

from lightning_qlora import QLoRAPrecision, calibrate, convert, estimate_memory, merge
from lightning_qlora.kernels.rounding import round_stochastically
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import make_trainer
from tests.experts.test_experts import gpt_oss, made, outputs, qwen3_moe
from tests.toys import assert_equal, delta, expert_stacks, perturb

transformers = pytest.importorskip("transformers")


class Lit(pl.LightningModule):
    """As a user writes it."""

    def __init__(self, early: bool = False):
        super().__init__()
        self.model = made(lambda: qwen3_moe(num_experts=4)).requires_grad_(True)
        self.losses = []
        self.early = torch.optim.AdamW(self.named_parameters(), lr=1e-2) if early else None

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.early or torch.optim.AdamW(self.parameters(), lr=1e-2)


def data():
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    return DataLoader(ids, batch_size=2)


def fit(folder, epochs=2, module=None, ckpt=None, **plugin):
    pl.seed_everything(0, verbose=False)
    module = module or Lit()
    plugin = QLoRAPrecision(**{"r": 2, "lora_dropout": 0.2, "paged_optimizer": False, **plugin})
    run = make_trainer(folder, plugins=plugin, max_epochs=epochs)
    run.fit(module, data(), ckpt_path=ckpt)
    return module, run


def test_the_trainer_trains_experts_in_4_bits_with_an_optimizer_made_before_and_resumes_bit_equal(tmp_path):
    module, run = fit(tmp_path / "a", module=Lit(early=True))
    stacks = [stack for *_, stack in expert_stacks(module.named_modules())]
    assert len(stacks) == 4 and module.losses[-1] < module.losses[0] and any(stack.lora_B.any() for stack in stacks)
    group = run.optimizers[0].param_groups[0]
    held = {id(p) for p in group["params"]}
    assert all(id(p) in held for stack in stacks for p in stack.adapter_parameters())
    assert "model.model.layers.0.mlp.experts.down_proj_experts.lora_B" in group["param_names"]
    report = run.precision_plugin.report
    rows = {(name, status): count for name, status, count in report.rows()}
    assert rows["model.model.layers.*.mlp.experts.gate_up_proj", "4-bit + adapter, 4 experts of 64x64"] == "2"
    linear = 2 * (64 * 64 * 2 + 2 * 64 * 32)
    experts = 2 * 4 * (64 * 64 + 32 * 64)
    rest = sum(p.numel() for p in module.parameters() if not p.requires_grad and p.is_floating_point())
    adapters = report.trainable_parameters
    assert report.total_parameters == linear + experts + rest + adapters
    assert report.bytes_before == 4 * (linear + experts + rest)
    _, half = fit(tmp_path / "b", epochs=1, module=Lit(early=True))
    saved = half.checkpoint_callback.best_model_path  # written at the end of the first epoch
    resumed, _ = fit(tmp_path / "c", ckpt=saved, module=Lit(early=True))
    assert resumed.losses == module.losses[2:]
    assert_equal([*resumed.parameters()], [*module.parameters()])


@pytest.mark.parametrize("arguments", [{"checkpoint": "full"}, {"use_rslora": True}], ids=str)
def test_the_distributed_checkpoint_api_saves_and_loads_stacks(arguments):
    source, target = made(qwen3_moe), made(qwen3_moe)
    for model in (source, target):
        convert(model, r=2, **arguments)
    perturb(source)
    state = get_model_state_dict(source)
    assert state.keys() == source.state_dict().keys()
    set_model_state_dict(target, state)
    assert torch.equal(outputs(target.eval()).logits, outputs(source.eval()).logits)


@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_the_entries_of_a_stack(checkpoint):
    convert(model := made(qwen3_moe), r=2, checkpoint=checkpoint)
    prefix = "model.layers.0.mlp.experts.gate_up_proj_experts."
    entries = {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}
    assert (entries["lora_A"].shape, entries["lora_B"].shape) == ((6, 2, 64), (6, 64, 2))
    base = {"packed", "absmax", "nested", "weight.quant_state.bitsandbytes__nf4", "adapter_arguments"}
    assert entries.keys() == {"lora_A", "lora_B"} | (base if checkpoint == "full" else set())


def test_a_dense_state_loads_into_converted_experts():
    dense, converted = made(qwen3_moe), made(qwen3_moe)
    for parameter in dense.parameters():
        parameter.data.mul_(0.9)
    convert(converted, r=2)
    converted.load_state_dict(dense.state_dict())
    convert(dense, r=2)
    assert_equal(
        *([stack.decode() for *_, stack in expert_stacks(model.named_modules())] for model in (converted, dense))
    )
    wrong = {"model.layers.0.mlp.experts.down_proj": torch.zeros(6, 64, 31)}
    with pytest.raises(CheckpointMismatchError, match=r"down_proj: its weight has shape \[6, 64, 31\]"):
        converted.load_state_dict(wrong, strict=False)


@pytest.mark.usefixtures("fast")
def test_a_merge_to_16_bits_rounds_every_expert_as_a_layer():
    model = made(qwen3_moe).to(torch.bfloat16)
    convert(model, r=2)
    name, _, _, stack = next(iter(expert_stacks(model.named_modules())))
    nn.init.normal_(stack.lora_B, std=0.05)
    exact = (stack.decode().bfloat16().float() + delta(stack))[2]  # as files have the base, also where it is in fp32
    merge(model)
    assert torch.equal(model.get_parameter(name)[2], round_stochastically(exact, torch.bfloat16))


def test_a_calibrated_start_covers_the_experts_that_tokens_reached():
    model = made(lambda: qwen3_moe(num_experts=32)).train()
    report = convert(model, r=2, init_lora_weights="calibrated")
    model(input_ids=torch.tensor([[5, 6]]))
    calibrate(model)
    calibration = report.calibration
    assert not calibration.waiting and {*calibration.calibrated} == {*adapted_layers(model)}
    for name, _, _, stack in expert_stacks(model.named_modules()):
        unseen = [number for number in range(32) if f"{name}.{number}" in calibration.unseen]
        assert 0 < len(unseen) < 32 and not stack.lora_B[unseen].any()
        assert stack.lora_B.flatten(1).any(dim=1).sum() == 32 - len(unseen)
        assert not calibration.input_rms[name][unseen].any()
        assert calibration.input_rms[name].any(dim=1).sum() == 32 - len(unseen)


@pytest.mark.usefixtures("fast")
def test_the_planner_counts_experts():
    kind, config = gpt_oss()
    config.architectures, config.dtype = [kind.__name__], torch.bfloat16
    model = kind._from_config(config, dtype=config.dtype)
    estimate = estimate_memory(config, sequence_length=16, device="cpu", r=2, paged_optimizer=False)
    report = convert(model, r=2)
    assert estimate.trainable_parameters == report.trainable_parameters
    assert sum(estimate.parts[part] for part in list(estimate.parts)[:3]) == report.bytes_after
    assert estimate.counted_activations
