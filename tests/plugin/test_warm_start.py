"""Values that came after conversion (a warm start, a momentum teacher): saved whole, so a new build can load them."""

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_qlora import QLoRAPrecision, convert, load_from_checkpoint, to_parameters
from lightning_qlora.tensors.dtensor import gather
from tests.conftest import Classifier, fingerprints, loader, tensors

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}
OLD = Classifier(seed=9).net.state_dict()
FIRST = {key.removeprefix("0."): value for key, value in OLD.items() if key.startswith("0.")}
PREFIXED = {f"net.{key}": value for key, value in OLD.items()}
NORM = {"net.2.weight": torch.full((64,), 0.7)}
WARM = {
    "all of it": lambda module: module.load_state_dict(
        {f"net.{key}": value for key, value in OLD.items()}, strict=False
    ),
    "a part": lambda module: module.net[0].load_state_dict(FIRST),
    "a norm": lambda module: module.load_state_dict(NORM, strict=False),
    "a write": lambda module: module.net[2].bias.data.fill_(0.3),
    "quantize_weight": lambda module: module.net[0].quantize_weight(OLD["0.weight"]),
}


class Warm(Classifier):
    """Begins with other values than it is built with, and has a teacher that follows it."""

    def __init__(self, warm="all of it", sharded=False):
        super().__init__()
        self.warm, self.sharded = warm, sharded
        self.teacher = Classifier(seed=5).net[4].requires_grad_(False)
        self.save_hyperparameters()

    def configure_model(self):
        if self.sharded and self._device_mesh is not None and not isinstance(self.net, FSDPModule):
            self.trainer.precision_plugin.convert_module(self)
            for part in (self.net, self.teacher):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def on_fit_start(self):
        if self.trainer.ckpt_path is None:
            WARM[self.warm](self)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.mul_(0.9).add_(0.01)


def values(module):
    return {name: gather(value.detach()).clone() for name, value in tensors(module).items()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def runs(trainer, make, path, **options):
    """An uninterrupted run of two epochs, and one that was saved after the first and resumed in a new module."""

    def fit(epochs, ckpt=None):
        module = make()
        if module.sharded:
            options["strategy"] = ModelParallelStrategy(1, 1)
        run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_epochs=epochs, enable_checkpointing=False, **options)
        run.fit(module, loader(), ckpt_path=ckpt)
        return module, run

    whole, _ = fit(2)
    first, run = fit(1)
    after_first = values(first)
    run.save_checkpoint(path)
    second, _ = fit(2, str(path))
    return whole, second, after_first


@pytest.mark.parametrize("warm", WARM)
def test_a_run_with_a_warm_start_resumes_bit_equal_and_loads(warm, trainer, tmp_path):
    path = tmp_path / "first.ckpt"
    whole, resumed, after_first = runs(trainer, lambda: Warm(warm), path)
    assert_same(values(resumed), values(whole))
    assert_same(values(load_from_checkpoint(Warm, path)), after_first)
    state = torch.load(path)["state_dict"]
    assert {"teacher.weight", "teacher.bias"} <= state.keys()
    expected = {"all of it": {"net.0", "net.4"}, "a part": {"net.0"}, "quantize_weight": {"net.0"}}.get(warm, set())
    assert {name for name in ("net.0", "net.4") if f"{name}.weight" in state} == expected
    assert {"net.0", "net.4"} - fingerprints(state).keys() == expected


@pytest.mark.parametrize("warm", ["all of it", "a norm", "a write"])
def test_shards_have_the_keys_that_a_new_module_asks_for(warm, trainer, one_rank, tmp_path):
    whole, resumed, _ = runs(
        trainer, lambda: Warm(warm, sharded=True), tmp_path / "shards", use_distributed_sampler=False,
    )  # fmt: skip
    assert_same(values(resumed), values(whole))


def test_the_base_of_conversion_that_is_loaded_again_has_its_fingerprint():
    module = Classifier()
    plain = Classifier()
    convert(module, **ARGUMENTS)
    keys = module.state_dict().keys()
    module.load_state_dict(Classifier(seed=9).state_dict())
    assert keys < module.state_dict().keys()
    module.load_state_dict(plain.state_dict())
    assert module.state_dict().keys() == keys


def test_shards_without_lightning_have_what_the_module_froze_itself(one_rank, tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def make():
        module = Warm()
        convert(module, **ARGUMENTS)
        to_parameters(module)
        return fully_shard(module)

    module = make()
    with torch.no_grad():
        module.teacher.weight.mul_(0.5)
    dcp.save({"model": get_model_state_dict(module)}, checkpoint_id=tmp_path)
    again = make()
    state = {"model": get_model_state_dict(again)}
    assert "teacher.weight" in state["model"] and "net.2.weight" not in state["model"]
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(again, state["model"])
    assert_same(values(again), values(module))
