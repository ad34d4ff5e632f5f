"""A module in 16 bits on a CPU whose 16-bit products are slow: held in fp32, and nobody else notices.

Without oneDNN torch has no fast 16-bit product, on every machine.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora import QLoRAPrecision, convert, estimate_memory, load_adapter, merge, save_adapter
from lightning_qlora.layers.full_precision import hold_in_fp32
from lightning_qlora.layers.held_types import reason_for_fp32
from lightning_qlora.training import converted_modules
from tests.conftest import Classifier, loader
from tests.toys import ARGUMENTS, ids, toy

pytest.importorskip("transformers")


@pytest.fixture
def slow():
    """As on a processor without fast 16-bit products."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


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
    inputs = inputs or {"input_ids": ids(), "labels": ids()}
    with Products() as products:
        loss = module(**inputs).loss
        loss.backward()
    return loss, products.types


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {"use_dora": True}),
        (torch.bfloat16, {"modules_to_save": ["lm_head", "norm"]}),
        (torch.float16, {"modules_to_save": ["lm_head", "norm"]}),
    ],
)
def test_a_step_is_that_of_an_fp32_run(slow, dtype, extra):
    narrow = model(dtype)
    report = convert(narrow, **ARGUMENTS, **extra)
    wide = model(torch.float32)
    convert(wide, **ARGUMENTS, **extra)
    loss, types = step(narrow)
    expected, _ = step(wide)
    assert types == {torch.float32} and torch.equal(loss, expected)
    assert (
        {p.dtype for p in narrow.parameters()} == {torch.float32} == {narrow.model.layers[0].mlp.up_proj.weight.dtype}
    )
    for (name, p), other in zip(trained(narrow).items(), trained(wide).values(), strict=True):
        assert torch.equal(p.grad, other.grad), name
    held = sum(t.numel() for t in (*narrow.parameters(), *narrow.buffers()) if not t.requires_grad)
    assert "held in fp32" in report.summary() and report.held_bytes == 2 * held
    narrow.generate(ids(), max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "changes", "extra"),
    [
        ("llama", {"num_hidden_layers": 1}, {"init_lora_weights": "loftq", "gradient_checkpointing": True}),
        (
            "llama",
            {"num_hidden_layers": 1, "tie_word_embeddings": True},
            {"init_lora_weights": "calibrated", "trainable_token_indices": [3, 4]},
        ),
        ("gpt2", {"n_layer": 1}, {}),
        ("bert", {"num_hidden_layers": 1}, {}),
        ("t5", {"num_layers": 1}, {}),
    ],
)
def test_two_steps_are_those_of_an_fp32_run(slow, name, changes, extra):
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        module = model(dtype, name, **changes).train()
        convert(module, **ARGUMENTS | {"lora_dropout": 0.1} | extra)
        optimizer = torch.optim.AdamW(trained(module).values(), lr=1e-3)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            step(module, input_ids=ids(), labels=torch.tensor([0, 1]) if name == "bert" else ids())
            optimizer.step()
        runs.append({key: p.detach().clone() for key, p in trained(module).items()})
        merge(module)
        assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


def test_the_plan_for_a_cpu_counts_it(slow):
    """And of what trains in full the plan counts fp32 everywhere."""

    def plan(dtype, device):
        narrow = model(dtype, num_hidden_layers=1)
        return estimate_memory(narrow, sequence_length=8, device=device, r=4, modules_to_save=["norm"]).parts

    narrow, wide = plan(torch.bfloat16, "cpu"), plan(torch.float32, "gpu")
    assert narrow == wide
    on_gpu = plan(torch.bfloat16, "gpu")
    for part in ("trained weights", "gradients", "optimizer state"):
        assert on_gpu[part] == wide[part]
    assert on_gpu["other frozen weights"] < wide["other frozen weights"]


def test_an_explicit_type_stays_and_one_warning_has_the_factor(slow):
    module = model(torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"compute_dtype='bf16': on this CPU a product takes \d+ times as long"
    ) as caught:
        convert(module, **ARGUMENTS, compute_dtype="bf16")
    assert len([each for each in caught if "times as long" in str(each.message)]) == 1
    assert module.lm_head.weight.dtype is torch.bfloat16
    assert module(ids()).logits.dtype is torch.bfloat16


def test_merged_weights_and_state_dicts_have_the_types_of_before(slow):
    module = model(torch.bfloat16)
    classes = [type(part) for part in module.modules()]
    convert(module, **ARGUMENTS, modules_to_save=["norm"], checkpoint="full")
    state = module.state_dict()
    assert state["lm_head.weight"].dtype is torch.bfloat16
    assert state["model.norm.weight"].dtype is torch.float32  # it trains
    with torch.no_grad():
        module.lm_head.weight[0, 0] = 1 + 2**-12  # what 16 bits don't hold stays
    assert module.state_dict()["lm_head.weight"].dtype is torch.float32
    merge(module)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert [type(part) for part in module.modules()] == classes
    assert module(ids()).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("from_slow", [True, False])
def test_checkpoints_and_adapters_move_both_ways(from_slow, tmp_path):
    def converted(is_slow):
        with torch.backends.mkldnn.flags(enabled=not is_slow):
            module = model(torch.bfloat16)
            convert(module, **ARGUMENTS, modules_to_save=["norm"])
        assert (module.lm_head.weight.dtype is torch.float32) is is_slow
        return module

    source = converted(from_slow)
    with torch.no_grad():
        for p in trained(source).values():
            p.add_(torch.randn_like(p) / 100)
    state = source.state_dict()
    target = converted(not from_slow)
    target.load_state_dict(state)
    assert {name: value.dtype for name, value in target.state_dict().items()} == {
        name: value.dtype for name, value in state.items()
    }
    save_adapter(source, tmp_path)
    other = converted(not from_slow)
    load_adapter(other, tmp_path)
    for module in (target, other):
        assert all(torch.equal(p, trained(source)[name]) for name, p in trained(module).items())
    assert all(torch.equal(a, b) for a, b in zip(merge(target).parameters(), merge(source).parameters(), strict=True))


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
        dtype = torch.bfloat16
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
    assert module.norm.running_mean.dtype is torch.bfloat16
    convert(module, r=2, target_modules=["linear"], lora_dropout=0.0)
    wide = Casts("model").bfloat16().float()
    convert(wide, r=2, target_modules=["linear"], lora_dropout=0.0)
    x = torch.randn(2, 8, 5)
    y = module(x)
    torch.testing.assert_close(y.float(), wide(x), atol=0.05 if how == "constant" else 0, rtol=0)
    y.sum().backward()
    assert module.norm.running_mean.dtype is torch.float32
    assert module.state_dict()["norm.running_mean"].dtype in (torch.bfloat16, torch.float32)


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
        with torch.backends.mkldnn.flags(enabled=True):
            if reason_for_fp32(torch.device("cpu"), torch.bfloat16):
                pytest.skip("this CPU has no fast product in bf16")
            convert(module, r=1, lora_dropout=0.0)
    frozen = [p for p in use.parameters() if not p.requires_grad]
    dtype = torch.bfloat16 if how in ("meta", "again") else torch.float32
    assert {p.dtype for p in (*frozen, *use.buffers())} == {dtype} == {module[0].weight.dtype}
    if dtype is torch.float32:
        assert torch.equal(use(x), expected)


def test_a_cast_by_the_user_is_what_the_user_asked_for(slow):
    module = small()
    convert(module, r=1)
    for cast, dtype in ((module.half, torch.float16), (module.float, torch.float32)):
        cast()
        assert {p.dtype for p in (*module.parameters(), *module.buffers())} == {dtype} == {module[0].weight.dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_that_was_cast_computes_and_trains_in_that_type(slow, dtype):
    module = small()
    convert(module, r=1, lora_dropout=0.0, modules_to_save=["3"])
    x = torch.randn(2, 64).bfloat16()
    expected = module(x).detach()
    y = module.to(dtype)(x.to(dtype))
    assert y.dtype is dtype and {p.dtype for p in module.parameters()} == {dtype} == {module[0].weight.dtype}
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.02)
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("fast", [False, True])
def test_values_in_16_bits_that_are_assigned_to_what_trains_are_held_in_fp32(fast):
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).bfloat16()
    module = copy.deepcopy(dense)
    with torch.backends.mkldnn.flags(enabled=fast):
        convert(module, r=1, lora_dropout=0.0, modules_to_save=["1"])
        module.load_state_dict(dense.state_dict(), assign=True)
        assert module[1].weight.dtype is torch.float32 and module[1].weight.requires_grad
        module(torch.randn(2, 64).bfloat16()).sum().backward()


class Collects(nn.Linear):
    """A part that appends to a list of its caller, and returns one."""

    def forward(self, x, outputs):
        outputs.append(super().forward(x))
        return outputs


@pytest.mark.parametrize("fast", [False, True])
def test_a_forward_pass_appends_to_a_list_of_its_caller(fast):
    part = Collects(64, 4).bfloat16()
    module = nn.ModuleList([nn.Linear(64, 64), part]).bfloat16()
    with torch.backends.mkldnn.flags(enabled=fast):
        convert(module, r=1, target_modules=["0"], modules_to_save=["1"])
        outputs = []
        assert part(torch.randn(2, 64).bfloat16(), outputs) is outputs and len(outputs) == 1


class In16Bits(Classifier):
    """It casts to a constant type, as code of a server does."""

    def __init__(self):
        super().__init__()
        self.net = self.net.bfloat16()

    def forward(self, x):
        return self.net(x.bfloat16()).float()


def test_all_loops_compute_the_same(slow, trainer):
    arguments = {"r": 4, "lora_dropout": 0.0, "modules_to_save": ["2"]}
    module = In16Bits()
    trainer(plugins=QLoRAPrecision(**arguments), enable_checkpointing=False).fit(module, loader())
    losses = [module.losses]
    for loop in ("fabric", "plain"):
        module = In16Bits()
        fabric = Fabric(accelerator="cpu", plugins=QLoRAPrecision(**arguments))
        use = module
        if loop == "fabric":
            use = fabric.setup_module(module)
        else:
            convert(module, **arguments)
        assert module.net[0].weight.dtype is torch.float32
        optimizer = torch.optim.AdamW(use.parameters(), lr=1e-2)
        losses.append([])
        for x, y in loader():
            optimizer.zero_grad()
            loss = F.cross_entropy(use(x), y)
            fabric.backward(loss) if loop == "fabric" else loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] == losses[2]


def test_what_fabric_moves_to_a_device_that_is_slow_in_16_bits_is_held_there(monkeypatch):
    """Fabric converts a module where it is, and moves it then. The meta device stands for a T4."""

    def decide(device, dtype):
        return "a meta device is slow" if device.type == "meta" else None

    monkeypatch.setattr(converted_modules, "hold_in_fp32", partial(hold_in_fp32, decide=decide))
    plugin = QLoRAPrecision(**ARGUMENTS)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    module = model(torch.bfloat16)
    fabric.setup_module(module, move_to_device=False)
    module.to("meta")
    with plugin.forward_context():
        pass
    assert (
        {p.dtype for p in module.parameters()} == {torch.float32} == {module.model.layers[0].mlp.up_proj.weight_dtype}
    )
    assert plugin.report.held_in_fp32 == ["a meta device is slow"] and plugin.report.held_bytes > 0
    module.to_empty(device="cpu")
    with plugin.forward_context():
        pass
    assert module.lm_head.weight.dtype is module.model.layers[0].mlp.up_proj.weight_dtype is torch.bfloat16
    assert plugin.report.held_in_fp32 == [] and plugin.report.held_bytes == 0
