"""Weights that are read after a module was sharded on the meta device: the bytes that one device has."""

import copy
import json
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_qlora import QLoRAPrecision, convert, load_adapter, load_weights, merge, quantize, save_adapter
from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.huggingface.sharded.without_data import mark_as_found
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.provenance import LOADED_TENSOR
from lightning_qlora.tensors.dtensor import gather, reshard
from tests.conftest import ROOT, launch, raises_before_teardown, tensors
from tests.experts.test_experts import gpt_oss, made
from tests.toys import ARGUMENTS, Lit, converted, perturb, save_in_4_bits, toy

transformers = pytest.importorskip("transformers")
from tests.experts.test_experts import qwen3_moe  # noqa: E402


def check_equal(sharded, alone):
    assert sharded.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(gather(sharded[name].detach()).reshape(value.shape), value), name


GIVEN = [  # DoRA's norms and dropout; sums over the batches of all ranks
    {"use_dora": True},
    {"init_lora_weights": "calibrated", "lora_dropout": 0.0, "split": True},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with four models: blocks across rows, tied embeddings, Conv1D, a new head, experts."""
    from tests.scripts.load_weights import save_models

    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture(scope="module")
def alone(models):
    from tests.scripts import load_weights

    return [load_weights.fit(models, 1, **given) for given in GIVEN]


def check_same_start(sharded, alone):
    check_equal(sharded["start"], alone["start"])
    assert sharded["trains"] == alone["trains"] and sharded["fingerprints"] == alone["fingerprints"]


@pytest.mark.parametrize("place", range(len(GIVEN)), ids=["dora", "calibrated"])
def test_one_rank_has_the_bytes_and_losses_of_no_strategy(place, models, alone, one_rank):
    from tests.scripts import load_weights

    sharded = load_weights.fit(models, 1, sharded=True, **GIVEN[place])
    check_same_start(sharded, alone[place])
    assert sharded["losses"] == pytest.approx(alone[place]["losses"], rel=1e-6) and len(alone[place]["losses"]) == 3


def test_two_ranks_have_the_bytes_and_losses_of_one_device(models, alone):
    from tests.scripts.load_weights import load

    ranks = launch("tests.scripts.load_weights", models, 2, *map(json.dumps, GIVEN))[1]
    for place, expected in enumerate(alone):
        results = [of_fits[place] for of_fits, _ in ranks]
        for result in results:
            check_same_start(result, expected)
        losses = torch.tensor([result["losses"] for result in results]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
    without_trainer = load(models)
    for _, by_transformers in ranks:
        check_equal(by_transformers, without_trainer)


@pytest.mark.slow
def test_the_peak_is_the_part_of_a_rank_and_one_layer(tmp_path):
    """A layer, or a part of the embedding, in 16 bits and as it is quantized: less than 25 MB of 572."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.scripts.memory_of_loading", str(tmp_path / "llama"), "16"]
    for ranks in (2, 4):
        done = subprocess.run([*command, str(ranks)], cwd=ROOT, capture_output=True, text=True, timeout=300)
        peaks = re.findall(r"peak ([\d.]+) MB, end [\d.]+ MB, ([\d.]+) MB in parameters", done.stdout)
        assert len(peaks) == ranks, done.stderr[-3000:]
        for peak, kept in peaks:
            assert float(peak) < float(kept) + 25 and float(kept) < 200 / ranks


class Net(nn.Sequential):
    """Of no library, with a head that is tied to the first layer, and buffers."""

    def __init__(self):
        super().__init__(nn.Linear(96, 200), nn.BatchNorm1d(200), nn.Linear(200, 96, bias=False), nn.Linear(96, 8))
        self.table = nn.Embedding(8, 96)
        self[3].weight = self.table.weight

    def forward(self, x):
        return self[3](self[2](self[1](self[0](x))))


@pytest.fixture
def folder(tmp_path):
    net = Net()
    net[1].running_mean.normal_()
    nn.init.normal_(net[3].bias)
    state = net.state_dict()
    del state["3.weight"]
    save_file(state, tmp_path / "model.safetensors")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    return tmp_path


def loaded_alone(folder, **arguments):
    net = Net()
    net.load_state_dict(torch.load(folder / "state.pt"))
    convert(net, **ARGUMENTS | arguments)
    return net


def sharded_by_fabric(folder, fill=True, own=None, build=Net, **arguments):
    """A module on the meta device, which `parallelize_fn` shards and loads."""

    def parallelize(module, mesh):
        if build is Net:
            fully_shard(module[0], mesh=mesh["data_parallel"])
        fully_shard(module, mesh=mesh["data_parallel"])
        if fill:
            load_weights(module, folder)
        return module

    plugin = QLoRAPrecision(**ARGUMENTS | arguments)
    fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricStrategy(parallelize, 1, 1), plugins=plugin)
    fabric.launch()
    with torch.device("meta"):
        module = build()
    if own is not None:
        module[2] = own
    return fabric, fabric.setup_module(module)


def test_what_has_values_is_not_read(folder, one_rank):
    own = nn.Linear(200, 96, bias=False)
    expected = quantize(own.weight.detach()).dequantize()
    net = sharded_by_fabric(folder, own=own)[1].module
    assert torch.equal(net[2].decode(), expected)
    assert torch.equal(net[0].decode(), loaded_alone(folder)[0].decode())


@pytest.mark.parametrize("start", ["default", "calibrated", "adapter"])
def test_a_module_of_no_library_is_loaded_from_a_folder(start, folder, one_rank, monkeypatch):
    arguments = {"init_lora_weights": start, "target_modules": ["0", "2"]}
    if start == "adapter":
        trained = loaded_alone(folder, target_modules=["2"], use_rslora=True)
        save_adapter(perturb(trained), folder / "adapter")
        arguments = {"adapter": str(folder / "adapter")}
    bars = []

    def bar(groups, text, **arguments):
        bars.append((text, arguments))
        return groups

    monkeypatch.setattr("lightning_qlora.huggingface.sharded.load_weights.tqdm", bar)
    fabric, net = sharded_by_fabric(folder, **arguments)
    assert bars == [("Quantizing", {"leave": False, "delay": 2, "unit": " x 1 layers", "disable": None})]
    alone = loaded_alone(folder, **arguments)
    check_equal(tensors(net.module), tensors(alone))
    x = torch.randn(5, 96)
    fabric.backward(net(x).sum())
    alone(x).sum().backward()
    for name, parameter in alone.named_parameters():
        held = net.module.get_parameter(name)
        assert held.requires_grad == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(gather(held.grad), parameter.grad)
    if start == "calibrated":
        for name in arguments["target_modules"]:
            sums = [model.get_submodule(name).input_observer.sums for model in (net.module, alone)]
            torch.testing.assert_close(*sums)
    if start == "adapter":
        with torch.no_grad():
            net.module[2].lora_B.mul_(2)
        convert(net.module, **arguments)  # as the Trainer does for each of its methods
        assert torch.equal(gather(net.module[2].lora_B.detach()), 2 * alone[2].lora_B)
        save_adapter(perturb(alone, seed=1), folder / "other")
        with torch.no_grad():
            net.eval()(x)  # which leaves the whole parameters of the root gathered
        load_adapter(net.module, folder / "other")
        reshard(net.module.modules())
        check_equal(tensors(net.module), tensors(alone))


def test_a_model_of_transformers_is_loaded_by_the_names_that_transformers_finds(tmp_path, one_rank):
    model = toy("t5")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    renamed = {f"{model.base_model_prefix}.{key}": value for key, value in load_file(path).items()}
    save_file(renamed | {"of.another.model": torch.ones(2)}, path, metadata={"format": "pt"})
    net = sharded_by_fabric(tmp_path, build=lambda: type(model)(model.config))[1].module
    convert(model, **ARGUMENTS)
    check_equal(tensors(net), tensors(model))
    with pytest.raises(ValueError, match="is sharded, and a shard can't be merged"):
        merge(net)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration\.save_pretrained: the layers are sharded"):
        net.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("build", [gpt_oss, qwen3_moe])
def test_experts_that_a_folder_has_as_a_stack_or_one_by_one(build, tmp_path, one_rank):
    model = made(build)
    model.save_pretrained(tmp_path)
    empty = copy.deepcopy(model)
    for part in empty.modules():  # as accelerate.init_empty_weights leaves it, with buffers
        for key, parameter in part._parameters.items():
            part._parameters[key] = nn.Parameter(parameter.to("meta")) if parameter is not None else None
    net = sharded_by_fabric(tmp_path, build=lambda: empty)[1].module
    convert(model, **ARGUMENTS)
    assert any(isinstance(layer, QLoRAExperts) for layer in adapted_layers(net).values())
    check_equal(tensors(net), tensors(model))


def test_what_a_folder_lacks_or_has_in_another_shape_is_named_and_a_module_without_weights_refused(folder, one_rank):
    with pytest.raises(RuntimeError, match=r"lightning_qlora\.load_weights\(module, FOLDER\), after fully_shard"):
        sharded_by_fabric(folder, fill=False)
    state = load_file(folder / "model.safetensors")
    nan = state["2.weight"].clone()
    small = state["0.weight"][:9].clone()
    nan[3, 3] = torch.nan
    for name, value, error in [
        ("2.weight", nan, r"^2: weight: holds NaN"),
        ("0.weight", small, r"model\.safetensors: '0\.weight' has shape \[9, 96\], and the module has \[200, 96\]"),
        ("0.weight", None, r"'0\.weight' is missing\. Use a folder with all weights of the model in 16 or 32 bits\.$"),
        ("0.weight.absmax", small, r"'0\.weight' is in 4 bits already\. Use"),
        ("1.running_var", None, r"^1\.running_var: is on the meta device.*has no tensor of this name"),
    ]:
        changed = {**state, name: value}
        save_file({key: held for key, held in changed.items() if held is not None}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=error):
            sharded_by_fabric(folder)


class Loaded(Lit):
    """Loads and shards as users write it; `then` is called in between."""

    def __init__(self, folder, then=lambda module: None, kind=transformers.AutoModelForCausalLM, **arguments):
        super().__init__(None)
        self.folder = folder
        self.then = then
        self.kind = kind
        self.arguments = arguments

    def configure_model(self):
        self.model = self.kind.from_pretrained(self.folder, **self.arguments)
        self.on_meta = any(parameter.is_meta for parameter in self.model.parameters())
        self.then(self)
        if self._device_mesh is not None:
            if not self.model.config.tie_word_embeddings:
                fully_shard(self.model.lm_head, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def fit(trainer, module, strategy="auto", **arguments):
    run = trainer(
        strategy=strategy,
        plugins=QLoRAPrecision(**ARGUMENTS | arguments),
        enable_checkpointing=False,
        max_epochs=0,
        use_distributed_sampler=False,
    )
    run.fit(module)
    return module


def converted_now(module):
    module.trainer.precision_plugin.convert_module(module.model)


def converted_as_a_whole(module):
    module.trainer.precision_plugin.convert_module(module)


def not_yet_converted(module):
    pass


def check_sharded(
    trainer,
    folder,
    on_meta=True,
    kind=transformers.AutoModelForCausalLM,
    dtype="auto",
    then=not_yet_converted,
    **arguments,
):
    """A sharded model has the tensors of one that is not; `on_meta`: it was sharded before its values were read."""
    alone, sharded = (Loaded(folder, then, kind, dtype=dtype) for _ in range(2))
    fit(trainer, alone, **arguments)
    fit(trainer, sharded, ModelParallelStrategy(1, 1), **arguments)
    check_equal(tensors(sharded), tensors(alone))
    assert sharded.on_meta is on_meta and not alone.on_meta
    trains = [name for name, parameter in alone.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in sharded.named_parameters() if parameter.requires_grad] == trains
    return sharded


@pytest.fixture
def llama(tmp_path):
    toy("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("then", [not_yet_converted, converted_now, converted_as_a_whole])
def test_an_adapter_to_start_from_and_a_head_that_trains_in_full(then, trainer, tmp_path, llama, one_rank):
    save_adapter(converted("llama", modules_to_save=["lm_head"]), tmp_path / "adapter")
    start = {"adapter": str(tmp_path / "adapter"), "modules_to_save": ["lm_head"]}
    sharded = check_sharded(trainer, llama, then=then, **start)
    assert sharded.model.lm_head.weight.requires_grad
    assert gather(sharded.model.model.layers[0].mlp.up_proj.lora_B).any()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def in_4_bits(folder):
    return save_in_4_bits(type(toy("gpt2")), folder, folder / "packed")


@pytest.mark.parametrize(
    ("name", "changed", "arguments"),
    [
        ("t5", None, {"on_meta": True, "dtype": torch.float16}),  # transformers keeps its `wo` in fp32
        ("gpt2", None, {"dtype": torch.bfloat16, "then": converted_now, "trainable_token_indices": [3, 7]}),
        ("llama", pickled, {}),
        ("gpt2", in_4_bits, {}),
    ],
    ids=["types", "tokens", "pickled", "in 4 bits"],
)
def test_sharded_models_of_all_kinds_of_folders(name, changed, arguments, trainer, tmp_path, one_rank):
    """All are read after sharding, but those whose values are needed before, or that are not in safetensors."""
    model = toy(name)
    model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "base"
    if changed is not None:
        folder = changed(folder)
    check_sharded(trainer, folder, kind=type(model), **{"on_meta": False, **arguments})


def test_errors_while_a_model_has_no_weights(trainer, llama, one_rank):
    def copies(module):
        module.reference = copy.deepcopy(module.model)

    def resizes(module):
        module.model.resize_token_embeddings(140)

    def appends(module):
        module.model.resize_token_embeddings(140, mean_resizing=False)

    def writes(module):
        torch.nn.init.normal_(module.model.lm_head.weight)

    for module, error in [
        (Loaded(llama, writes), r"lm_head\.weight: configure_model wrote values to it"),
        (Loaded(llama, resizes), r"meta tensors The weights are read after .* in __init__"),
        (Loaded(llama, appends), r"has shape \[128, 64\], and the module has \[140, 64\].* in __init__"),
        (Loaded(llama, copies), r"^reference\..* on the meta device, .* load it by from_pretrained too"),
        (Loaded(llama, Mock(side_effect=RuntimeError("theirs"))), "^theirs$"),
        (Loaded(llama, intermediate_size=192), r"has shape \[.*128.*\], and the model has \[.*192.*\]"),
    ]:
        with raises_before_teardown((ValueError, RuntimeError), error):
            fit(trainer, module, ModelParallelStrategy(1, 1))


def test_a_model_that_is_not_sharded_is_loaded_too(trainer, llama, one_rank):
    def teacher(module):
        module.teacher = [transformers.AutoModelForCausalLM.from_pretrained(llama)]

    module = fit(trainer, Loaded(llama, teacher), ModelParallelStrategy(1, 1))
    check_equal(tensors(module.model), tensors(module.teacher[0]))


def test_a_module_that_nobody_sharded_is_loaded(folder, one_rank):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with torch.device("meta"):
        net = Net()
    convert(net, **ARGUMENTS)
    load_weights(net, folder)
    check_equal(tensors(net), tensors(loaded_alone(folder)))


def test_types_and_marks_are_those_of_the_dense_copy():
    with torch.device("meta"):
        model, dense = nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16)
    setattr(dense.weight, LOADED_TENSOR, True)
    model.bias.requires_grad_(False)
    mark_as_found(model, SimpleNamespace(model=dense))
    assert model.weight.dtype is model.bias.dtype is torch.bfloat16
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert [hasattr(p, LOADED_TENSOR) for p in model.parameters()] == [True, False]
