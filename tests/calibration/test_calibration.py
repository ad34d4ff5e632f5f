import copy
import pickle
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_qlora import (
    PagedAdamW,
    QLoRAPrecision,
    calibrate,
    convert,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_qlora.calibration import calibrated_adapter, calibration
from lightning_qlora.kernels import ops
from lightning_qlora.layers.dora import dora_scale
from lightning_qlora.starts import calibrated
from lightning_qlora.starts.input_statistics import add_input
from tests.adapters.folders import adapter_of
from tests.conftest import loader
from tests.toys import assert_equal, delta

CALIBRATED = {"r": 8, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["0", "2"]}
CALIBRATED["init_lora_weights"] = "calibrated"
LAYERS = ["layers.0", "layers.2"]
IN_LIT = ["net.layers.0", "net.layers.2"]


class Net(nn.Module):
    """Input channels of very different sizes, as in language models."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))
        self.register_buffer("sizes", torch.logspace(-2, 1, width)[torch.randperm(width)])

    def forward(self, x):
        return self.layers(x * self.sizes)


class Lit(pl.LightningModule):
    """Logs, keeps running statistics, and draws random numbers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm = nn.BatchNorm1d(64)
            self.net = Net()
        self.seen = []

    def forward(self, x):
        return self.net(self.norm(x))

    def training_step(self, batch, batch_idx):
        noise = torch.rand(())
        self.seen.append((batch_idx, batch[0].sum().item(), noise.item()))
        self.log("noise", noise, on_step=True)
        self.log("ones", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return (self(batch[0]) + 0.1 * torch.randn_like(batch[0]) - batch[0]).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append(dict(self.trainer.callback_metrics))

    def on_train_epoch_end(self):
        self.seen.append(torch.rand(1))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(trainer, module=None, start="calibrated", data=None, ckpt_path=None, **arguments):
    module = module or Lit()
    plugin = QLoRAPrecision(**{**CALIBRATED, "init_lora_weights": start})
    torch.manual_seed(0)
    run = trainer(plugins=plugin, **{"limit_val_batches": 0, "enable_checkpointing": False, **arguments})
    run.fit(module, loader() if data is None else data, loader(), ckpt_path=ckpt_path)
    return module, plugin.report.calibration


def waiting(rows=8):
    """A converted module, a batch, and what the report says of its calibration."""
    net = Net()
    return net, torch.randn(rows, 64), convert(net, **CALIBRATED).calibration


def step(net, x):
    """One training step whose learning rate is 0, so that only the calibration changes the adapters."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net(x).square().mean().backward()
    calibrate(net)
    optimizer.step()
    optimizer.zero_grad()


def adapters(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if "lora_" in n}


def dense_layers(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def test_the_first_step_calibrates_every_layer_on_its_own_inputs(monkeypatch):
    net, x = Net(), 1e-3 * torch.randn(200, 64)
    dense = copy.deepcopy(net)
    printed = []
    monkeypatch.setattr(calibration, "rank_zero_info", printed.append)
    whole_report = convert(net, **CALIBRATED)
    report = whole_report.calibration
    assert convert(net, **CALIBRATED).calibration is report
    assert (report.waiting, report.host_bytes) == (LAYERS, 4 * 2 * 96 * 64)
    assert not net.layers[0].lora_B.any()
    quantized = copy.deepcopy(dense)
    convert(quantized, **{**CALIBRATED, "init_lora_weights": "default"})
    step(net, x)
    inputs = x * net.sizes
    layer, weight = net.layers[0], dense.layers[0].weight.detach()
    rms = inputs.square().mean(0).sqrt()
    assert_close(report.input_rms["layers.0"], rms)
    size = (rms / rms.square().mean().sqrt()).clamp_min(0.01)
    u, s, v = torch.linalg.svd((weight - quantize(weight).dequantize()) * size)
    assert_close(delta(layer).detach(), (u[:, :8] * s[:8]) @ v[:8] / size, rtol=1e-3, atol=1e-5)
    left, errors = (weight - layer.decode() - delta(layer)) * rms, report.errors
    assert errors["layers.0"] == pytest.approx((left.norm() / (weight * rms).norm()).item(), rel=1e-4)
    worst = max(errors, key=errors.get)
    assert f"largest errors left: {worst} {errors[worst]:.1%}, " in str(whole_report)
    with torch.no_grad():
        hidden = quantized.eval().layers[:2](inputs)
    assert_close(report.input_rms["layers.2"], hidden.square().mean(0).sqrt())
    assert (report.calibrated, report.waiting, report.unseen, report.rows) == (LAYERS, [], [], 200)
    assert 0 < report.seconds < 60 and printed == [f"QLoRA: {report}"]
    for module in net.modules():
        assert not module._forward_pre_hooks and getattr(module, "input_observer", None) is None
    before = adapters(net)
    step(net, 100 * x)
    assert_equal(adapters(net), before)


def test_forward_passes_outside_training_do_not_count_and_without_gradients_nothing_is_calibrated():
    net, x, report = waiting(4)
    calibrate(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net.eval()(100 * x)
    net.train()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            net(100 * x)
    with pytest.raises(RuntimeError, match="no forward pass ran in training mode"):
        calibrate(net)
    net.zero_grad()
    calibrate(net)
    assert report.waiting == LAYERS and not report.calibrated
    step(net, x)
    assert report.rows == 4 and not report.waiting and net.layers[0].lora_B.any()


@pytest.mark.parametrize("with_closure", [False, True])
def test_the_first_step_changes_the_adapters_by_the_calibration_alone_and_other_parameters_as_usual(with_closure):
    net, x = Net(), torch.randn(4, 64)
    net.extra = nn.Parameter(torch.ones(64))
    twin = copy.deepcopy(net)
    for module, rate in ((net, 0.1), (twin, 0.0)):
        report = convert(module, **CALIBRATED)
        module.extra.requires_grad_(True)
        optimizer = torch.optim.SGD(module.parameters(), lr=rate)

        def closure(module=module):
            loss = (module(x) * module.extra).square().mean()
            loss.backward()
            calibrate(module)
            return loss

        if with_closure:
            assert optimizer.step(closure) > 0
        else:
            closure()
            optimizer.step()
        assert (report.calibration.waiting, report.calibration.rows) == ([], 4)
    assert_equal(adapters(net), adapters(twin))
    assert not torch.equal(net.extra, twin.extra)


def test_parts_are_calibrated_one_after_another_and_a_merged_one_is_not():
    nets = nn.ModuleList(Net() for _ in range(3))
    report = convert(nets, **{**CALIBRATED, "target_modules": LAYERS}).calibration
    x = torch.randn(4, 64)
    merge(nets[2])
    assert not hasattr(nets[2].layers[0], "input_observer")
    step(nets[0], x)
    assert report.waiting == ["1.layers.0", "1.layers.2"]
    step(nets[1], x[:2])
    names = ["0.layers.0", "0.layers.2", "1.layers.0", "1.layers.2"]
    assert (report.waiting, report.calibrated, report.rows) == ([], names, 4)


class Branches(nn.Module):
    """One layer of three is used; the inputs of another one are zeros."""

    def __init__(self):
        super().__init__()
        self.used, self.zeros, self.unused = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.used(x) + self.zeros(0 * x)


def test_a_layer_without_input_keeps_the_default_initialization_and_is_named():
    net = Branches()
    report = convert(net, r=4, init_lora_weights="calibrated").calibration
    before = adapters(net)
    step(net, x := torch.randn(1, 64))
    assert (report.calibrated, report.unseen) == (["used"], ["zeros", "unused"])
    assert_close(report.input_rms["used"], x[0].abs())
    del before["used.lora_A"], before["used.lora_B"]
    assert_equal({name: net.get_parameter(name) for name in before}, before)
    assert "because the first step had no input for them: zeros, unused" in str(report)
    assert net.unused.input_observer is None


def test_rows_that_are_not_finite_do_not_count_and_an_error_names_a_layer_that_has_no_others():
    nets, x = [Net(), Net()], torch.randn(6, 64)
    nets[1].load_state_dict(nets[0].state_dict())
    reports = [convert(net, **CALIBRATED).calibration for net in nets]
    before = adapters(nets[1])
    with pytest.raises(ValueError, match=r"layers\.0: NaN or Inf in all its inputs"):
        step(nets[1], torch.full((2, 64), torch.inf))
    assert reports[1].waiting == LAYERS
    assert_equal(adapters(nets[1]), before)
    step(nets[0], x)
    step(nets[1], torch.cat([x, torch.full((2, 64), torch.nan)]))
    assert torch.equal(*(report.input_rms["layers.0"] for report in reports)) and reports[1].rows == 6


@pytest.mark.parametrize(("of", "first"), [("the module", "module"), ("a part", "copy")])
def test_a_copy_gets_the_values_of_the_module(of, first, tmp_path):
    """As an average that begins before the first step."""
    net, x = Net(), torch.randn(8, 64)
    dense = copy.deepcopy(net)
    report = convert(net, **CALIBRATED)
    layers = net.layers
    copied = copy.deepcopy(net).layers if of == "the module" else copy.deepcopy(layers)
    assert copied[0].input_observer.dense_weight is layers[0].input_observer.dense_weight
    step((layers if first == "module" else copied), x * net.sizes)
    assert (report.calibration.waiting, report.calibration.calibrated) == ([], LAYERS)
    for one, other in ((layers[0], copied[0]), (layers[2], copied[2])):
        assert one.input_observer is None and other.input_observer is None
        assert one.lora_B.any()
        assert_equal([*one.parameters()], [*other.parameters()])
        assert_equal(one.initial, other.initial)
        assert one.lora_A is not other.lora_A
    copied[0].lora_B.data += 0.1
    change = delta(copied[0]) - delta(layers[0])
    save_adapter(copied, tmp_path, base="float")
    other = copy.deepcopy(dense.layers)
    convert(other, adapter=str(tmp_path))
    assert_close(delta(other[0]), change, atol=1e-5, rtol=1e-4)


def test_a_copy_with_another_weight_waits_for_its_own_step():
    net, x, report = waiting()
    other, dense = copy.deepcopy(net), Net()
    other.load_state_dict({**dense.state_dict(), "sizes": net.sizes})
    step(net, x)
    assert net.layers[0].lora_B.any() and not other.layers[0].lora_B.any()
    assert report.waiting == LAYERS
    step(other, x)
    assert report.waiting == []
    weight = dense.layers[0].weight
    expected = calibrated.calibrated_adapter(
        weight, quantize(weight).to_bytes(), (x * net.sizes).square().mean(0).sqrt(), other.layers[0].config, "layers.0"
    )
    assert_close(other.layers[0].lora_B.detach(), expected[1].detach(), atol=1e-5, rtol=1e-4)
    alone, _, report = waiting()
    alone.load_state_dict({**dense.state_dict(), "sizes": net.sizes})
    assert report.waiting == LAYERS
    step(alone, x)
    assert (report.waiting, report.calibrated) == ([], LAYERS)
    assert_equal(adapters(alone), adapters(other))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_with_calibration_has_the_same_batches_numbers_first_metrics_and_bytes(trainer, accumulate):
    (plain, _), (calibrated, report) = (
        fit(trainer, start=start, accumulate_grad_batches=accumulate) for start in ("default", "calibrated")
    )
    assert report.rows == 8 * accumulate
    assert report.calibrated == IN_LIT
    assert calibrated.seen == plain.seen and len(plain.seen) == 6
    for name, layer in dense_layers(plain).items():
        assert_equal(calibrated.get_submodule(name).weight_bytes[:3], layer.weight_bytes[:3])


def test_statistics_are_summed_over_the_batches_of_a_step_and_blocks_that_are_recomputed_count_like_others():
    nets, x = [nn.Sequential(Net(), Net())], torch.randn(16, 64)
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    reports = []
    for net in nets:
        arguments = {**CALIBRATED, "target_modules": "all-linear", "gradient_checkpointing": net is nets[1]}
        reports.append(convert(net, **arguments).calibration)
    nets[2](x[:8]).square().mean().backward()
    for net, report, batch in zip(nets, reports, (x, x, x[8:]), strict=True):
        step(net, batch)
        assert report.input_rms.keys() == dense_layers(net).keys()
        assert_close(report.input_rms, reports[0].input_rms)
    assert reports[0].rows == reports[2].rows == 16


def test_validation_before_training_does_not_calibrate_and_a_checkpoint_of_then_is_calibrated_after_loading(trainer):
    module, plugin = Lit(), QLoRAPrecision(**CALIBRATED)
    runner = trainer(plugins=plugin, enable_checkpointing=False, limit_val_batches=1)
    runner.validate(module, loader(), verbose=False)
    assert plugin.report.calibration.waiting == IN_LIT
    assert not module.net.layers[0].lora_B.any()
    other, later = Lit(), Lit()
    reports = [convert(each, **CALIBRATED).calibration for each in (other, later)]
    other.load_state_dict(module.state_dict())
    assert reports[0].waiting == IN_LIT
    step(other, torch.randn(8, 64))
    later.load_state_dict(other.state_dict())
    assert reports[1].waiting == []
    assert torch.equal(later.net.layers[0].initial[0], other.net.layers[0].initial[0])
    torch.manual_seed(0)
    runner.fit(module, loader(), loader())  # its sanity check validates, too
    fresh, _ = fit(trainer, limit_val_batches=1)
    assert_equal(adapters(module), adapters(fresh))


def test_a_resumed_run_does_not_calibrate_again_and_is_bit_equal(trainer, tmp_path):
    straight, _ = fit(trainer, max_epochs=3)
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True)
    fit(trainer, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    resumed, report = fit(trainer, max_epochs=3, ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert (report.calibrated, report.waiting) == ([], [])
    assert_equal(resumed.state_dict(), straight.state_dict())


def test_manual_optimization_calibrates_in_its_first_step(trainer):
    class Manual(Lit):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    (plain, _), (module, report), (automatic, _) = (
        fit(trainer, Manual(), start="default"), fit(trainer, Manual()), fit(trainer),
    )  # fmt: skip
    assert report.calibrated == IN_LIT and module.seen == plain.seen
    assert_close(adapters(module), adapters(automatic))


def test_fabric_calibrates_in_the_first_step_and_refuses_a_step_in_eval_mode():
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(**CALIBRATED))
    module = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(torch.optim.SGD(module.parameters(), lr=1e-3))
    optimizer.step()  # without gradients, to create the state
    module.eval()
    fabric.backward(module(torch.randn(4, 64)).square().mean())
    with pytest.raises(RuntimeError, match=r"before the adapter of layers\.0 is calibrated.*model\.train\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    module.train()
    fabric.backward(module(torch.randn(4, 64)).square().mean())
    optimizer.step()
    assert module.layers[0].lora_B.any()


def test_16_bit_weights_and_dora():
    net = Net().to(torch.bfloat16)
    report = convert(net, **CALIBRATED, use_dora=True)
    assert report.calibration.host_bytes == 2 * 2 * 96 * 64
    step(net, torch.randn(4, 64, dtype=torch.bfloat16))
    layer = net.layers[0]
    assert_close(dora_scale(layer, layer.matrices()[0]), torch.ones(96))
    assert layer.lora_A.dtype == torch.float32


def test_a_pickle_has_a_first_step_of_its_own_and_neither_autocast_nor_fp64_change_the_type_of_the_calibration():
    plain, x, _ = waiting()
    again, autocast, fp64 = (pickle.loads(pickle.dumps(plain)) for _ in range(3))
    step(plain, x)
    assert not again.layers[0].lora_B.any()
    step(again, x)
    assert torch.equal(again.layers[0].lora_B, plain.layers[0].lora_B)
    with torch.autocast("cpu", torch.bfloat16):
        step(autocast, x)
    step(fp64, x.double())
    expected = delta(plain.layers[0])
    for net, tolerance in ((autocast, 0.05), (fp64, 1e-5)):
        assert net.layers[0].lora_A.dtype == torch.float32
        assert (delta(net.layers[0]) - expected).norm() / expected.norm() < tolerance


def test_a_learning_rate_finder_keeps_the_calibration(trainer):
    module, plugin = Lit(), QLoRAPrecision(**CALIBRATED)
    module.lr = 1e-3
    runner = trainer(plugins=plugin, enable_checkpointing=False, limit_val_batches=0)
    Tuner(runner).lr_find(module, loader(), num_training=3, update_attr=False)
    fresh, _ = fit(trainer, max_steps=1)
    for name, layer in dense_layers(fresh).items():
        assert torch.equal(module.get_submodule(name).initial[0], layer.initial[0])
        assert module.get_submodule(name).lora_B.any()
    assert plugin.report.calibration.waiting == []


def test_loading_a_state_saved_before_calibration_restores_the_calibrated_adapters_or_warns():
    net, x, _ = waiting()
    before = copy.deepcopy(net.state_dict())
    step(net, x)
    start = adapters(net)
    for _ in range(2):
        net.layers[0].lora_B.data += 1
        net.load_state_dict(before)
        assert_equal(adapters(net), start)
        net.state_dict()
    net.layers[0].set_initial(None)  # as after loading the adapter folder of a calibrated module
    with pytest.warns(UserWarning, match=r"layers\.0: the loaded state dict was saved before the calibration"):
        net.load_state_dict(before)
    assert not net.layers[0].lora_B.any()


CALL = r"layers\.0 .*call lightning_qlora\.calibrate\(module\) between .*replicas=torch\.distributed\.group\.WORLD"


@pytest.mark.parametrize("how", ["training mode", "eval mode", "compiled", "recomputed", "closure", "F.linear"])
def test_a_step_without_the_call_is_an_error_of_the_next_forward_pass(how):
    torch._dynamo.reset()
    net, x, report = waiting()
    net.train(how != "eval mode")
    run = net
    if how == "compiled":
        run = torch.compile(net, backend="aot_eager", fullgraph=True)
    elif how == "recomputed":
        run = partial(checkpoint, net, use_reentrant=False)
    elif how == "F.linear":
        run = lambda x: F.linear(x, net.layers[0].weight)  # noqa: E731
    optimizer = (PagedAdamW if how == "training mode" else torch.optim.SGD)(net.parameters(), lr=1e-3)

    def closure():
        loss = run(x).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        run(x)
    if how == "closure":
        optimizer.step(closure)
    else:
        closure()
        closure()  # accumulates
        optimizer.step()
    with pytest.raises(RuntimeError, match=CALL):
        run(x)
    with torch.no_grad():
        run(x)
    if how != "eval mode":
        with pytest.warns(UserWarning, match=r"layers\.0 was trained before its calibration"):
            calibrate(net)
        assert not report.waiting
        run(x)


def test_a_raw_optimizer_in_the_trainer_is_a_loop_of_ones_own(trainer):
    class Manual(Lit):
        automatic_optimization = False
        calls = True

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(super().training_step(batch, batch_idx))
            if self.calls:
                calibrate(self)
            optimizer.step()

    assert fit(trainer, Manual())[1].calibrated == IN_LIT
    Manual.calls = False
    with pytest.raises(RuntimeError, match=CALL):
        fit(trainer, Manual())


def test_adapters_that_code_wrote_before_the_first_step_train_on():
    net, x, report = waiting()
    for layer in (net.layers[0], net.layers[2]):
        nn.init.normal_(layer.lora_B)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        net(x).square().mean().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=r"layers\.0 was trained before its calibration"):
        calibrate(net)
    assert (report.waiting, report.calibrated) == ([], [])


def test_a_loaded_state_or_adapter_ends_the_waiting(tmp_path):
    net, x = Net(), torch.randn(8, 64)
    dense = copy.deepcopy(net)
    convert(net, **CALIBRATED)
    step(net, x)
    save_adapter(net, tmp_path)
    trained = {name: value for name, value in net.state_dict().items() if "lora_" in name}
    loads = [
        lambda other: other.load_state_dict(net.state_dict()),
        lambda other: other.load_state_dict(trained, strict=False),
        lambda other: load_adapter(other, str(tmp_path)),
    ]
    for load in loads:
        other = copy.deepcopy(dense)
        report = convert(other, **CALIBRATED).calibration
        load(other)
        assert not report.waiting
        optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
        for _ in range(2):
            other(x).square().mean().backward()
            optimizer.step()


def test_the_op_of_inputs_follows_the_rules_of_torch():
    net, x, _ = waiting()
    sums = net.layers[0].input_observer.sums
    torch.library.opcheck(add_input, (sums.clone(), 0, x, net.layers[0].lora_B.detach(), True, "a"))
    assert all(tag in torch.ops.lightning_qlora.add_input.default.tags for tag in ops.TAGS)


def test_an_adapter_that_trained_before_its_calibration_is_not_changed():
    net, x, _ = waiting()
    net.layers[0].lora_B.data += 1
    with pytest.warns(UserWarning, match=r"layers\.0 was trained before its calibration"):
        step(net, x)
    assert (net.layers[0].lora_B == 1).all()
    assert net.layers[2].initial is not None


@pytest.mark.parametrize(("saved", "resumed"), [("calibrated", "default"), ("default", "calibrated")])
def test_a_checkpoint_keeps_the_initialization_of_its_adapters(saved, resumed):
    first, second = Net(), Net()
    second.load_state_dict(first.state_dict())
    convert(first, **{**CALIBRATED, "init_lora_weights": saved})
    step(first, torch.randn(8, 64))
    first.layers[0].lora_B.data += 0.1
    convert(second, **{**CALIBRATED, "init_lora_weights": resumed})
    with pytest.warns(UserWarning, match=f"initialized as '{saved}', so init_lora_weights='{resumed}' is not used"):
        second.load_state_dict(first.state_dict())
    one, other = first.state_dict(), second.state_dict()
    del one["_qlora_conversion"], other["_qlora_conversion"]
    assert_equal(one, other)
    assert adapter_of(second).quantization.init_lora_weights == saved
    x = torch.randn(4, 64)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("how", ["wrapped", "recomputed", "in place"])
def test_a_compiled_module_is_calibrated_in_its_graph_and_compiled_once_more_without(how):
    class Recomputed(Net):
        def forward(self, x):
            if how == "recomputed":
                return checkpoint(super().forward, x, use_reentrant=False)
            return super().forward(x)

    torch._dynamo.reset()
    first, x = Recomputed(), torch.randn(6, 64)
    second = copy.deepcopy(first)
    for net in (first, second):
        convert(net, **CALIBRATED)
    counters.clear()
    compiled = first
    if how == "in place":
        first.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(first, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        step(compiled, x)
    assert counters["stats"]["unique_graphs"] == 2
    step(second, x)
    assert_close(adapters(first), adapters(second))


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization as in github.com/davda54/sam: the gradient at a point uphill."""

    def __init__(self, params, rho=0.05, **others):
        super().__init__(params, {"rho": rho, **others})
        self.base = torch.optim.SGD(self.param_groups, **others)
        self.param_groups = self.base.param_groups

    def with_gradient(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        norm = torch.stack([p.grad.norm() for p in self.with_gradient()]).norm()
        for p in self.with_gradient():
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        self.zero_grad()
        closure()
        for p in self.with_gradient():
            p.data = self.state[p]["old"]
        self.base.step()


class ManualSam(Lit):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        sam_step(self, batch[0], optimizer, self.manual_backward)

    def configure_optimizers(self):
        return Sam(self.parameters(), lr=1e-3)


def sam_step(net, x, optimizer, backward=torch.Tensor.backward):
    def closure():
        loss = net(x).square().mean()
        backward(loss)
        return loss

    closure()
    optimizer.step(closure)
    optimizer.zero_grad()


@pytest.mark.parametrize("where", ["own loop", "Fabric", "Trainer"])
def test_sharpness_aware_minimization_begins_with_the_calibrated_values(where, trainer, recwarn):
    if where == "Trainer":
        module, report = fit(trainer, ManualSam(), max_steps=1, data=loader(batch_size=16))
        net = module.net
    else:
        net, x = Net(), torch.randn(16, 64)
        if where == "Fabric":
            fabric = Fabric(accelerator="cpu", devices=1, plugins=(plugin := QLoRAPrecision(**CALIBRATED)))
            module = fabric.setup_module(net)
            optimizer = fabric.setup_optimizers(Sam(module.parameters(), lr=1e-3))
            sam_step(module, x, optimizer, fabric.backward)
            report = plugin.report.calibration
        else:
            report = convert(net, **CALIBRATED).calibration
            net(x).square().mean().backward()
            calibrate(net)
            sam_step(net, x, Sam(net.parameters(), lr=1e-3))
    assert report.calibrated and not report.waiting and report.rows == 16
    assert not [each for each in recwarn if "trained before" in str(each.message)]
    for layer in (net.layers[0], net.layers[2]):
        start = layer.scaling * layer.initial[1] @ layer.initial[0]
        change = (delta(layer) - start).norm() / start.norm()
        assert layer.initial[1].any() and 0 < change < 0.1  # one step from there


def test_ranks_share_the_float_weights(monkeypatch):
    left = []
    waiting = [
        SimpleNamespace(has_weight=True, leave_to_another_rank=partial(left.append, place)) for place in range(5)
    ]
    monkeypatch.setattr(calibrated_adapter, "world_size", lambda: 2)
    monkeypatch.setattr(calibrated_adapter.dist, "get_rank", lambda: 1)
    calibrated_adapter.keep_weights_of_this_rank(waiting)
    assert left == [0, 2, 4]
    waiting[0].has_weight = False  # the ranks shared the loading
    calibrated_adapter.keep_weights_of_this_rank(waiting)
    assert left == [0, 2, 4]
