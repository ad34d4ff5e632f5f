"""A module in 16 bits on a CPU whose 16-bit products are slow: held in fp32, and nobody else notices."""

import copy
import pickle
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_qlora import (
    QLoRALinear,
    QLoRAPrecision,
    calibrate,
    convert,
    estimate_memory,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_qlora.dtypes.full_precision import hold
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.plugin import converted_modules
from lightning_qlora.tensors.device_types import Held
from tests.conftest import tensors
from tests.machines.products import FAST, SLOW, stated
from tests.toys import ARGUMENTS, assert_equal, ids, perturb, pretrain, toy

pytest.importorskip("transformers")


class Lit(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Products(TorchDispatchMode):
    """The types of the tensors that are multiplied."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"):
            self.types |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def model(dtype, name="llama", **changes):
    """A model whose values 16 bits hold exactly, in a type."""
    return toy(name, **changes).bfloat16().half().float().to(dtype)


def step(module, **inputs):
    with Products() as products:
        loss = module(**inputs).loss
        loss.backward()
    return loss, products.types


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


BF16, FP16 = torch.bfloat16, torch.float16
ONE_LAYER = {"num_hidden_layers": 1}
IN_FULL = {"modules_to_save": ["lm_head", "norm"]}


@pytest.mark.parametrize(
    ("name", "dtype", "changes", "extra"),
    [
        ("llama", FP16, ONE_LAYER, {"use_dora": True}),
        ("llama", BF16, ONE_LAYER, IN_FULL),
        ("llama", FP16, ONE_LAYER, IN_FULL),
        ("llama", BF16, ONE_LAYER, {"gradient_checkpointing": True}),
        (
            "llama",
            BF16,
            ONE_LAYER | {"tie_word_embeddings": True},
            {"init_lora_weights": "calibrated", "trainable_token_indices": [3, 4]},
        ),
        ("gpt2", BF16, {"n_layer": 1}, {}),
        ("bert", BF16, ONE_LAYER, {}),
        ("t5", BF16, {"num_layers": 1}, {}),
    ],
)
def test_two_steps_are_those_of_an_fp32_run(slow, name, dtype, changes, extra):
    runs = []
    for before in (dtype, torch.float32):
        module = model(before, name, **changes).train()
        report = convert(module, **ARGUMENTS | {"lora_dropout": 0.1} | extra)
        held = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and not t.requires_grad]
        assert report.held_bytes == (4 - before.itemsize) * sum(map(torch.numel, held))
        assert ("kept in fp32" in report.summary()) is (before is dtype)
        optimizer = torch.optim.AdamW(trained(module).values(), lr=1e-3)
        torch.manual_seed(1)
        values = []
        for _ in range(2):
            optimizer.zero_grad()
            loss, types = step(module, input_ids=ids(), labels=torch.tensor([0, 1]) if name == "bert" else ids())
            assert types == {torch.float32}
            values += [loss.detach(), *(p.grad.clone() for p in trained(module).values() if p.grad is not None)]
            calibrate(module)
            optimizer.step()
        runs.append(values + [p.detach().clone() for p in trained(module).values()])
        weights = {layer.weight.dtype for layer in adapted_layers(module).values()}
        assert {p.dtype for p in module.parameters()} == weights == {torch.float32}
        if name == "llama":
            module.generate(ids(), max_new_tokens=2)
        merge(module)
        assert {p.dtype for p in module.parameters()} == {before}
    assert_equal(*runs)


def test_the_plan_for_a_cpu_counts_it(slow):
    """And of what trains in full the plan counts fp32 everywhere."""

    def plan(dtype, device):
        narrow = model(dtype, num_hidden_layers=1)
        return estimate_memory(narrow, sequence_length=8, device=device, r=4, modules_to_save=["norm"]).parts

    narrow, wide = plan(BF16, "cpu"), plan(torch.float32, "gpu")
    assert narrow == wide
    on_gpu = plan(BF16, "gpu")
    for part in ("trained weights", "gradients", "optimizer state"):
        assert on_gpu[part] == wide[part]
    assert on_gpu["other frozen weights"] < wide["other frozen weights"]


def test_an_explicit_type_stays(slow):
    module = pretrain(model(BF16))
    convert(module, **ARGUMENTS, compute_dtype="bf16")
    assert module.lm_head.weight.dtype is module(ids()).logits.dtype is BF16


def test_merged_weights_and_files_have_the_types_of_before_and_state_dicts_share_memory(slow, trainer, tmp_path):
    lit = Lit(model(BF16))
    classes = [type(part) for part in lit.modules()]
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, modules_to_save=["norm"], checkpoint="full"), max_steps=1)
    run.fit(lit, DataLoader(ids(), batch_size=2))
    run.save_checkpoint(tmp_path / "1.ckpt")
    lit.model.lm_head.weight.data[0, 0] = 1 + 2**-12  # what 16 bits don't hold stays
    run.save_checkpoint(tmp_path / "2.ckpt")
    states = [torch.load(tmp_path / f"{number}.ckpt")["state_dict"] for number in (1, 2)]
    assert [state["model.lm_head.weight"].dtype for state in states] == [BF16, torch.float32]
    assert states[0]["model.model.norm.weight"].dtype is torch.float32  # it trains
    for name, value in lit.state_dict().items():
        if value.is_floating_point() and "." in name and ".weight." not in name and "lora" not in name:
            assert value.dtype is torch.float32 and value.data_ptr() == tensors(lit)[name].data_ptr()
    changed = {name for name, part in lit.named_modules() if type(part) not in classes}
    assert changed == {name for name, part in lit.named_modules() if isinstance(part, QLoRALinear)}
    merge(lit)
    assert {p.dtype for p in lit.parameters()} == {BF16}
    assert [type(part) for part in lit.modules()] == classes
    assert lit.model(ids()).logits.dtype is BF16


class _Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_layer_of_a_held_module_that_was_merged_is_converted_again(fast):
    module = pretrain(_Blocks()).to(BF16)
    report = convert(module, r=4)
    types = {name: parameter.dtype for name, parameter in module.named_parameters()}
    merge(module.blocks[1][1])
    assert convert(module, r=4).converted == report.converted
    assert "forward" not in vars(module.blocks[1][1])
    assert {name: parameter.dtype for name, parameter in module.named_parameters()} == types


@pytest.mark.parametrize("from_slow", [True, False])
def test_checkpoints_and_adapters_move_both_ways(from_slow, tmp_path):
    def converted(is_slow):
        with stated(SLOW if is_slow else FAST):
            module = model(BF16)
            convert(module, **ARGUMENTS, modules_to_save=["norm"])
        assert (module.lm_head.weight.dtype is torch.float32) is is_slow
        return module

    source = converted(from_slow)
    state = perturb(source, 0.01).state_dict()
    target = converted(not from_slow)
    target.load_state_dict(state)
    assert all(torch.equal(value.float(), state[name].float()) for name, value in target.state_dict().items())
    save_adapter(source, tmp_path)
    other = converted(not from_slow)
    load_adapter(other, tmp_path)
    assert_equal(trained(other), trained(source))
    assert_equal([*merge(target).parameters()], [*merge(source).parameters()])


class Casts(nn.Module):
    """Code that casts to a constant type, or to that of the model."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.convolution = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.recurrent = nn.GRU(8, 64, batch_first=True)
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        dtype = BF16
        if self.how == "model":
            dtype = next(self.parameters()).dtype
        x = self.convolution(x.to(dtype)).to(dtype)
        x = self.norm(x).transpose(1, 2).to(dtype)
        x = self.attention(x, x, value=x)[0]
        x = self.linear(self.recurrent(x.to(dtype))[0].to(dtype))
        return self.head(x.to(dtype))


@pytest.mark.parametrize("how", ["constant", "model"])
def test_code_that_casts_its_input_works(slow, how):
    module = Casts(how).bfloat16()
    assert module.norm.running_mean.dtype is BF16
    convert(module, r=2, target_modules=["linear"], lora_dropout=0.0)
    wide = Casts("model").bfloat16().float()
    convert(wide, r=2, target_modules=["linear"], lora_dropout=0.0)
    x = torch.randn(2, 8, 5)
    y = module(x)
    torch.testing.assert_close(y.float(), wide(x), atol=0.05 if how == "constant" else 0, rtol=0)
    y.sum().backward()
    assert module.norm.running_mean.dtype is torch.float32
    assert module.state_dict()["norm.running_mean"].dtype in (BF16, torch.float32)


class Shift(nn.Module):
    """A part with a buffer and no parameter, as rotary embeddings are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(64))

    def forward(self, x):
        return x + self.shift


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Shift(), nn.Linear(64, 4)).bfloat16()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "compile", "assign", "meta", "again"])
def test_it_stays_with_copies_and_goes_with_the_device(slow, how):
    module = small()
    convert(module, r=1, lora_dropout=0.0)
    x = torch.randn(2, 64).bfloat16()
    expected = module(x).detach()
    use = module
    if how == "deepcopy":
        use = copy.deepcopy(module)
    if how == "pickle":
        use = pickle.loads(pickle.dumps(module))
    if how == "compile":
        use = torch.compile(module, backend="aot_eager")
    if how == "assign":
        use.load_state_dict(module.state_dict(), assign=True)
    if how == "meta":
        use = module.to("meta")
    if how == "again":
        with stated(FAST):
            convert(module, r=1, lora_dropout=0.0)
    frozen = [p for p in use.parameters() if not p.requires_grad]
    dtype = BF16 if how == "again" else torch.float32
    assert {p.dtype for p in (*frozen, *use.buffers())} == {dtype} == {module[0].weight.dtype}
    if dtype is torch.float32 and how != "meta":
        assert torch.equal(use(x), expected)


class Collects(nn.Linear):
    """A part that appends to a list of its caller, and returns one."""

    def forward(self, x, outputs):
        outputs.append(super().forward(x))
        return outputs


class Reads(nn.Module):
    """Without tensors of its own; reads a weight of a part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.body(x)) + nn.functional.linear(x, self.head.weight)


class ReadsInStep(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Reads()

    def training_step(self, batch, _=0):
        return nn.functional.linear(batch, self.model.head.weight) + self.model(batch)


@pytest.mark.usefixtures("fast")
def test_a_forward_pass_appends_to_a_list_of_its_caller():
    part = Collects(64, 4).bfloat16()
    module = nn.ModuleList([nn.Linear(64, 64), part]).bfloat16()
    convert(module, r=1, target_modules=["0"], modules_to_save=["1"])
    outputs = []
    assert part(torch.randn(2, 64).bfloat16(), outputs) is outputs and len(outputs) == 1


def test_what_fabric_moves_to_a_device_that_is_slow_in_16_bits_is_held_there(monkeypatch):
    """Fabric converts a module where it is, and moves it then. The meta device stands for a T4."""

    def decide(device, dtype):
        return Held(torch.float32, "a meta device is slow") if device.type == "meta" else None

    monkeypatch.setattr(converted_modules, "hold", partial(hold, decide=decide))
    messages = []
    monkeypatch.setattr(converted_modules, "rank_zero_info", messages.append)
    plugin = QLoRAPrecision(**ARGUMENTS)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    module = model(BF16)
    fabric.setup_module(module, move_to_device=False)
    module.to("meta")
    with plugin.forward_context():
        pass
    layer = module.model.layers[0].mlp.up_proj
    assert {p.dtype for p in module.parameters()} == {torch.float32} == {layer.weight_dtype}
    assert plugin.report.held == [(torch.float32, "a meta device is slow")] and plugin.report.held_bytes > 0
    assert messages == [f"QLoRA: moved to meta. {plugin.report.summary()}"]
    module.to_empty(device="cpu")
    with plugin.forward_context():
        pass
    assert module.lm_head.weight.dtype is layer.weight_dtype is BF16
    assert plugin.report.held == [] and plugin.report.held_bytes == 0
