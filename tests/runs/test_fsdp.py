"""FSDP2 on one rank, in this process: when a module is converted, what is refused, and loading of checkpoints."""

import re
import shutil
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader

from lightning_qlora import (
    QLoRAPrecision,
    convert,
    disable_adapter,
    load_adapter,
    load_from_checkpoint,
    load_weights,
    merge,
    save_adapter,
)
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.runs.patches import load_whole_tensors, shard_bytes
from lightning_qlora.tensors.dtensor import gather, is_sharded
from lightning_qlora.tools.cli import main
from tests.conftest import Classifier, dataset, fingerprints, loader, raises_before_teardown, raises_in_one_line
from tests.toys import assert_equal

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture
def run(trainer, one_rank):
    """A run on one rank, sharded unless another strategy is given; its Trainer."""

    def fit(module, data=None, strategy=None, epochs=1, path=None, plugins=None):
        new = trainer(
            strategy=strategy or ModelParallelStrategy(1, 1),
            max_epochs=epochs,
            plugins=plugins,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        new.fit(module, data or loader(), ckpt_path=path)
        return new

    return fit


@pytest.fixture
def fit(run):
    return lambda module, **arguments: run(module, plugins=QLoRAPrecision(**ARGUMENTS | arguments))


@pytest.fixture
def setup_module(one_rank):
    def setup(parallelize, single_file=False, net=None):
        strategy = FabricStrategy(parallelize, 1, 1, save_distributed_checkpoint=not single_file)
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=QLoRAPrecision(**ARGUMENTS))
        fabric.launch()
        return fabric, fabric.setup_module(net or Classifier().net)

    return setup


def shard(net, mesh, **arguments):
    fully_shard(net[0], mesh=mesh["data_parallel"], **arguments)
    return fully_shard(net, mesh=mesh["data_parallel"], **arguments)


class Sharded(Classifier):
    def configure_model(self):
        if self._device_mesh is not None and not isinstance(self.net, FSDPModule):
            self.trainer.precision_plugin.convert_module(self.net)
            shard(self.net, self.device_mesh)


def test_a_block_in_a_checkpoint_wrapper_that_is_not_in_the_module_yet(fit):
    """As in Lightning's example of tensor parallelism."""

    class Wrapped(Classifier):
        def configure_model(self):
            self.trainer.precision_plugin.convert_module(self.net)
            block = checkpoint_wrapper(self.net[0])
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
            self.net[0] = block
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    module = Wrapped()
    plain = Sharded()
    fit(module)
    fit(plain)
    assert module.losses == plain.losses
    assert [gather(p).tolist() for p in module.parameters()] == [gather(p).tolist() for p in plain.parameters()]
    assert all(is_sharded(layer.packed) for layer in adapted_layers(plain).values())


def test_a_model_that_is_sharded_before_it_is_converted_is_refused_and_other_models_are_not_converted(fit, run):
    class Unconverted(Classifier):
        def configure_model(self):
            shard(self.net, self.device_mesh)

    class WithTeacher(Sharded):
        def configure_model(self):
            self.teacher = [shard(Classifier().net, self.device_mesh)]
            super().configure_model()

    with pytest.raises(ValueError, match=r"^net\.0: .*trainer\.precision_plugin\.convert_module\(self\.model\) before"):
        fit(Unconverted())
    module = WithTeacher()
    fit(module)
    assert len(adapted_layers(module)) == 2 and not adapted_layers(module.teacher[0])
    run(Sharded())  # Lightning's own plugin does nothing there


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_fabric_splits_4_bit_layers_by_a_plan_and_a_style_of_another_kind_is_refused(style, setup_module):
    def parallelize(net, mesh, made=style):
        return parallelize_module(net, mesh["tensor_parallel"], {"4": made()})

    fabric, net = setup_module(parallelize)
    fabric.backward(net(torch.randn(2, 64)).sum())
    layer = adapted_layers(net)["_forward_module.4"]
    assert is_sharded(layer.packed) and is_sharded(layer.lora_B.grad)

    class Theirs(style):
        def _partition_linear_fn(self, name, module, mesh):
            module.register_parameter("bias", nn.Parameter(distribute_tensor(module.bias, mesh, [Replicate()])))

    with pytest.raises(ValueError, match=r"^4: a 4-bit layer is split by .*, not by another style.*exclude_modules"):
        setup_module(lambda net, mesh: parallelize(net, mesh, Theirs))


@pytest.mark.parametrize("single_file", [False, True], ids=["shards", "one file"])
def test_parameters_gathered_by_an_evaluation_are_sharded_again_before_saving_and_loading(
    single_file, setup_module, tmp_path
):
    """FSDP2 keeps the parameters of the root gathered after a forward pass, in the dtype of the policy."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    fabric, net = setup_module(lambda net, mesh: shard(net, mesh, mp_policy=policy), single_file)
    fabric.save(tmp_path / "checkpoint", {"net": net})
    save_adapter(net, tmp_path / "before")
    for use in (
        lambda: save_adapter(net, tmp_path / "after"),
        lambda: fabric.load(tmp_path / "checkpoint", {"net": net}),
        lambda: load_adapter(net, tmp_path / "after"),
    ):
        net.eval()(torch.randn(2, 64))
        use()
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert_equal(after, before)
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_a_state_dict_is_loaded_after_an_evaluation(setup_module):
    _, net = setup_module(shard)
    whole = {key: gather(value).clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        before = net.eval()(torch.ones(2, 64))
        for layer in adapted_layers(net).values():
            layer.lora_B.add_(0.1)
        changed = net(torch.ones(2, 64))
    net.load_state_dict(whole)
    assert torch.equal(net(torch.ones(2, 64)), before) and not torch.equal(changed, before)


def test_adapters_are_disabled_in_shards_which_are_not_merged(setup_module):
    fabric, net = setup_module(shard)
    untouched = Classifier().net.eval()
    x = torch.randn(2, 64)
    convert(untouched, **ARGUMENTS)
    with torch.no_grad():
        for layer in adapted_layers(net).values():
            layer.lora_B.add_(0.1)
    with disable_adapter(net), torch.no_grad():
        assert torch.equal(net(x), untouched(x))
        assert torch.equal(net.module[0].weight, untouched[0].decode())
    with disable_adapter(net):
        base = net(x)
    fabric.backward((net(x) - base.detach()).square().sum())
    assert all(p.grad is not None for layer in adapted_layers(net).values() for p in layer.adapter_parameters())
    net.eval()(x)
    with pytest.raises(ValueError, match="is sharded"):
        merge(net)


def test_an_adapter_is_loaded_into_shards_and_one_of_another_rank_refused(setup_module, tmp_path):
    for r in (4, 6):
        dense = Classifier().net
        convert(dense, **ARGUMENTS | {"r": r})
        for layer in adapted_layers(dense).values():
            layer.lora_B.data.normal_()
        save_adapter(dense, tmp_path / f"r{r}")
    _, net = setup_module(shard)
    load_adapter(net, tmp_path / "r4")
    net(torch.randn(2, 64))  # what it computes with is gathered from the shards
    save_adapter(net, tmp_path / "again")
    given, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("r4", "again"))
    assert_equal(again, given)
    with pytest.raises(CheckpointMismatchError, match="has rank 6, and the sharded layer keeps its rank 4"):
        load_adapter(net, tmp_path / "r6")


def test_a_dense_checkpoint_is_loaded_into_shards_with_dora(fit):
    module = Sharded()
    other = Classifier(seed=5)
    fit(module, use_dora=True)
    module.load_state_dict(other.state_dict())
    convert(other, **ARGUMENTS, use_dora=True)
    for name, parameter in other.named_parameters():
        if "lora_A" not in name and "lora_B" not in name:
            torch.testing.assert_close(gather(module.get_parameter(name)).reshape(parameter.shape), parameter)
    assert torch.equal(module.net[0].weight + 0, other.net[0].weight + 0)


class OfTrained(Sharded):
    """The optimizer holds what trains, so its numbers are no places among all parameters of the module."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture
def fit_of_trained(run):
    def fit(strategy, epochs, path=None):
        module, data = OfTrained(1024), DataLoader(dataset(width=1024), batch_size=8)
        return run(module, data, strategy, epochs, path, QLoRAPrecision(**ARGUMENTS)), module.losses

    return fit


def test_a_run_goes_on_elsewhere_from_one_file(fit_of_trained, tmp_path):
    expected = fit_of_trained("auto", 2)[1][4:]
    sharded = ModelParallelStrategy(1, 1, save_distributed_checkpoint=False)
    fit_of_trained(sharded, 1)[0].save_checkpoint(tmp_path / "of_shards")
    _, losses = fit_of_trained("auto", 2, tmp_path / "of_shards")
    assert losses == pytest.approx(expected, rel=1e-6)
    fit_of_trained("auto", 1)[0].save_checkpoint(tmp_path / "of_one")
    _, losses = fit_of_trained(ModelParallelStrategy(1, 1), 2, tmp_path / "of_one")
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_module_on_the_meta_device_has_the_fingerprints_of_what_is_loaded(setup_module, tmp_path):
    """As docs/many-gpus.md shows: nothing is known of values before they are there."""
    dense = Classifier().net
    save_file(dense.state_dict(), tmp_path / "model.safetensors")

    def shard_and_load(net, mesh):
        shard(net, mesh)
        assert [layer.base_fingerprint() for layer in adapted_layers(net).values()] == [0, 0]  # as several ranks do
        load_weights(net, tmp_path)
        return net

    with torch.device("meta"):
        net = Classifier().net
    _, net = setup_module(shard_and_load, True, net)
    convert(dense, **ARGUMENTS)
    found = fingerprints(net.module.state_dict())
    assert found == fingerprints(dense.state_dict()) and all(found.values()) and {"0", "4", "2.weight"} <= found.keys()
    net.module.load_state_dict(dense.state_dict())
    other = Classifier(seed=5).net
    convert(other, **ARGUMENTS)
    with pytest.raises(CheckpointMismatchError, match="another base"):
        net.module.load_state_dict(other.state_dict())


def test_a_sharded_module_on_the_meta_device_is_refused_with_the_function_that_loads_it(fit):
    class OnMeta(Sharded):
        def configure_model(self):
            if self._device_mesh is not None:
                self.net = self.net.to("meta")
            super().configure_model()

    with raises_before_teardown(ValueError, r"is on the meta device.* Call lightning_qlora\.load_weights"):
        fit(OnMeta())


def test_broken_shards_give_a_one_line_error(fit, tmp_path, capsys):
    fit(module := Sharded()).save_checkpoint(tmp_path / "good.ckpt")
    good = load_from_checkpoint(Sharded, tmp_path / "good.ckpt")
    assert torch.equal(good.net[0].lora_B, gather(module.net[0].lora_B)) and good.net[0].lora_B.any()

    def broken(name, change):
        shutil.copytree(tmp_path / "good.ckpt", tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    (shard,) = (tmp_path / "good.ckpt").glob("*.distcp")
    unreadable = "not a checkpoint, or truncated"
    for name, change, error in [
        ("no_meta", lambda folder: (folder / "meta.pt").unlink(), "No such file or directory.*meta.pt"),
        ("no_index", lambda folder: (folder / ".metadata").unlink(), "No such file or directory.*.metadata"),
        ("no_shard", lambda folder: (folder / shard.name).unlink(), f"No such file or directory.*{shard.name}"),
        ("cut", lambda folder: (folder / shard.name).write_bytes(shard.read_bytes()[:999]), unreadable),
        ("other", lambda folder: (folder / "meta.pt").write_bytes(b"abc"), unreadable),
    ]:
        path = broken(name, change)
        with raises_in_one_line((ValueError, FileNotFoundError), error):
            load_from_checkpoint(Sharded, path)
        for command in (["inspect", path], ["export", path, str(tmp_path / "exported")]):
            with pytest.raises(SystemExit):
                main(command)
            assert re.search(error, capsys.readouterr().err)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_from_checkpoint(Sharded, tmp_path)


def test_sharded_layers_are_calibrated_in_the_first_step(fit):
    run = fit(Sharded(), init_lora_weights="calibrated")
    report = run.precision_plugin.report.calibration
    assert (len(report.calibrated), report.waiting, report.rows) == (2, [], 8)


def test_a_checkpoint_in_one_file_is_loaded_as_strictly_as_asked(tmp_path):
    convert(module := Classifier(), r=4)
    for name, left_out in (("partial", "net.0.lora_B"), ("whole", "")):
        state = {key: value.clone() for key, value in module.state_dict().items() if key != left_out}
        torch.save({"model": state}, tmp_path / name)
    with pytest.raises(RuntimeError, match="lora_B"):
        load_whole_tensors(None, tmp_path / "partial", {"model": module})
    load_whole_tensors(None, tmp_path / "partial", {"model": module}, False)
    with pytest.raises(KeyError, match="contains a key 'count' that does not exist"):
        load_whole_tensors(None, tmp_path / "whole", {"model": module, "count": 3})
    load_whole_tensors(None, tmp_path / "whole", {"model": module, "count": 3}, False)


def test_a_second_derivative_is_refused_where_weights_are_freed(setup_module):
    _, module = setup_module(shard)
    x = torch.randn(2, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(module._forward_module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"FSDP2 has freed the 4-bit weight|storage of size 0"):
        grad.square().sum().backward()


def test_what_older_versions_of_torch_need(monkeypatch):
    """Bytes that get no gradient and are not cast."""
    upstream = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")

    def init_dtype_attrs(part, policy):
        part.orig_dtype, part.param_dtype = part.sharded_param.dtype, policy.param_dtype

    monkeypatch.setattr(upstream, "nn", upstream.nn)
    monkeypatch.setattr(upstream.FSDPParam, "init_dtype_attrs", init_dtype_attrs)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.1"))
    shard_bytes()
    assert upstream.nn.Module is nn.Module and not upstream.nn.Parameter(torch.zeros(2), False).requires_grad
    for dtype, is_float in ((torch.uint8, False), (torch.float32, True)):
        part = SimpleNamespace(sharded_param=upstream.nn.Parameter(torch.zeros(2, dtype=dtype)))
        upstream.FSDPParam.init_dtype_attrs(part, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        assert part.sharded_param.requires_grad == is_float
        assert part.param_dtype == (torch.bfloat16 if is_float else None)
