"""What users do next to the plugin with other libraries' functions: it works, or one error says what to use."""

import copy
import os
import sys
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
import transformers
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_qlora import QLoRAPrecision, convert, load_adapter, load_from_checkpoint, merge, save_adapter
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from tests.conftest import Classifier, dataset, loader
from tests.toys import Lit, assert_equal, ids, logits, perturb, pretrain, toy

# ---------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize(("checkpoint", "inside"), [("adapter", False), ("full", True)])
def test_save_pretrained_of_a_converted_model_writes_the_adapter_that_peft_loads(tmp_path, checkpoint, inside):
    peft = pytest.importorskip("peft")
    model = toy("llama")
    convert(Lit(model) if inside else model, r=4, checkpoint=checkpoint, lora_dropout=0.0)
    perturb(model)
    for number, arguments in enumerate(({}, {"state_dict": model.state_dict()})):
        with pytest.warns(UserWarning, match=r"save_pretrained wrote the adapter as a PEFT folder"):
            model.save_pretrained(tmp_path / str(number), **arguments)
        base = toy("llama")
        for name, layer in base.named_modules():
            if isinstance(converted := model.get_submodule(name), QLoRALinear):
                layer.weight.data = converted.decode()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / str(number)).eval()
        torch.testing.assert_close(logits(theirs), logits(model.eval()), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank").exists()
    with pytest.raises(ValueError, match=r"Call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    merged = merge(copy.deepcopy(model))
    merged.save_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "dense", state_dict=merged.state_dict())  # the user chose what is written
    for name in ("merged", "dense"):
        torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / name).eval()), logits(model.eval()))


def test_push_to_hub_uploads_the_adapter(monkeypatch):
    """Up to the upload, for which the tests have no network."""
    hub = pytest.importorskip("transformers.utils.hub")
    if not hasattr(hub, "hf_api"):
        pytest.skip("transformers 4 calls the hub in another way")
    model = toy("llama")
    uploaded = []
    convert(model, r=4)
    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda _, folder, *__, **___: uploaded.extend(os.listdir(folder))
    )
    model.push_to_hub("user/name")
    assert sorted(uploaded) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_module_that_saves_its_model_in_on_save_checkpoint_trains(fit, tmp_path):
    """As lightning-ir (base/module.py) and Donut do."""

    class Saves(Lit):
        def on_save_checkpoint(self, checkpoint):
            self.model.save_pretrained(tmp_path / "hf")

    fit(module := Saves(toy("llama")), max_steps=2).save_checkpoint(tmp_path / "x.ckpt")
    again = toy("llama")
    convert(again, adapter=str(tmp_path / "hf"))
    for layer, other in zip(adapted_layers(module).values(), adapted_layers(again).values(), strict=True):
        assert torch.equal(layer.lora_B, other.lora_B) and layer.lora_B.any()


def test_a_checkpoint_of_huggingfaces_trainer_has_the_adapter(tmp_path):
    pytest.importorskip("accelerate")
    model = toy("llama")
    convert(model, r=4)
    data = [{"input_ids": row, "labels": row} for row in ids(4)]
    options = {"output_dir": str(tmp_path), "max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(**options, save_steps=2)
    transformers.Trainer(model, arguments, train_dataset=data).train()
    again = toy("llama")
    convert(again, adapter=str(tmp_path / "checkpoint-2"))
    expected = model.model.layers[0].mlp.up_proj.lora_B
    assert expected.any() and torch.equal(again.model.layers[0].mlp.up_proj.lora_B, expected)


# ---------------------------------------------------------------- adapters of other libraries


def parts_of(name, **parts):
    """A class of another library: a module with these parts."""

    def build(self):
        nn.Module.__init__(self)
        for key, make in parts.items():
            setattr(self, key, make())

    return type(name, (nn.Module,), {"__init__": build})


def linear(columns=64, rows=64):
    return lambda: nn.Linear(columns, rows, bias=columns == rows)


def zeros(*shape):
    return lambda: nn.Parameter(torch.zeros(shape))


OTHERS = [
    parts_of("LitGPTLinear", linear=linear(), lora_A=zeros(4, 64), lora_B=zeros(64, 4)),  # litgpt/lora.py
    parts_of("TorchtuneLinear", weight=zeros(64, 64), lora_a=linear(64, 4), lora_b=linear(4, 64)),
]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_lora_matrices_of_other_libraries_are_refused(kind, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # while it is loaded, all modules are asked
    model = nn.Sequential(nn.Linear(64, 64), kind())
    message = rf"^1: is a {kind.__name__} with an adapter of another library"
    with pytest.raises(ValueError, match=message):
        convert(model, r=2)
    assert type(model[0]) is nn.Linear  # nothing was converted
    report = convert(model, r=2, exclude_modules=["1"])
    assert report.converted == ["0"] and not any(p.requires_grad for p in model[1].parameters())
    trains = convert(nn.Sequential(nn.Linear(64, 64), kind()), r=2, modules_to_save=["1"])
    assert trains.trained_in_full == {"1": "in modules_to_save"}


def test_a_peft_model_is_refused_until_it_is_merged_and_an_adapter_that_was_injected():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(toy("llama"), config)
    message = r"is a .* with an adapter of another library.*before get_peft_model.*adapter=FOLDER"
    for module, target in ((wrapped, "all-linear"), (Lit(wrapped), "all-linear"), (wrapped, ["v_proj"])):
        with pytest.raises(ValueError, match=message):
            convert(module, r=4, target_modules=target)
    assert len(convert(wrapped.merge_and_unload(), r=4).converted) == 14
    peft.inject_adapter_in_model(config, model := toy("llama"))
    with pytest.raises(ValueError, match=r"q_proj: is a Linear with an adapter of another library"):
        convert(model, r=4)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("LoraConfig", {"target_modules": ["q_proj"]}),
        ("IA3Config", {"target_modules": ["q_proj"], "feedforward_modules": []}),
    ],
)
def test_a_converted_model_in_a_peft_model_is_refused_before_it_trains(kind, arguments):
    peft = pytest.importorskip("peft")
    convert(model := toy("llama"), r=4)
    # An AttributeError of PEFT, which takes a method of the 4-bit layer for its type.
    with pytest.raises(AttributeError, match="is_floating_point"):
        convert(peft.get_peft_model(model, getattr(peft, kind)(**arguments)), r=4)


def test_a_peft_model_that_was_made_while_the_plugin_quantized_is_refused(tmp_path, fit):
    peft = pytest.importorskip("peft")
    toy("llama").save_pretrained(tmp_path / "base")

    class Late(Lit):
        def configure_model(self):
            base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
            self.model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))

    # With transformers 4 the model is dense until it is converted, so PEFT accepts it and conversion does not.
    with pytest.raises((AttributeError, ValueError), match=r"is_floating_point|is peft's .* Convert the model without"):
        fit(Late(None))


def test_a_run_without_a_layer_that_is_large_enough_resumes(fit, trainer, tmp_path):
    path = tmp_path / "x.ckpt"
    fit(module := BoringModel(), plugins=QLoRAPrecision(r=1), max_steps=2).save_checkpoint(path)
    resumed = trainer(plugins=QLoRAPrecision(r=1), max_steps=3)
    resumed.fit(again := BoringModel(), ckpt_path=path)
    resumed.test(again, ckpt_path=path, verbose=False)
    for loaded in (again, load_from_checkpoint(BoringModel, path)):
        assert torch.equal(loaded.layer.weight, module.layer.weight)


# ---------------------------------------------------------------- metrics


class Distance(torchmetrics.Metric):
    """As FID and BERTScore: a network measures."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or nn.Sequential(pretrain(nn.Linear(64, 64), seed=5), nn.Linear(64, 200))
        self.add_state("total", torch.tensor(0.0))

    def update(self, x):
        with torch.no_grad():
            self.total += self.net(x).square().sum()

    def compute(self):
        return self.total


@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_in_a_metric_measures_as_before(frozen, fit):
    """Also one that begins as new layers do, or beside a module that is frozen as a whole."""
    torch.manual_seed(0)
    module = pretrain(Classifier(128))
    module.net.requires_grad_(not frozen)
    module.distance = Distance()
    dense = copy.deepcopy(module.distance)
    x = torch.randn(4, 64)
    plugin = QLoRAPrecision(r=2)
    fit(module, DataLoader(dataset(width=128), batch_size=8), plugins=plugin, max_steps=2)
    assert plugin.report.converted == ["net.0", "net.4"] and not plugin.report.trained_in_full
    reason = "in a metric; name it in target_modules to convert it"
    assert plugin.report.skipped == dict.fromkeys(["distance.net.0", "distance.net.1"], reason)
    assert torch.equal(module.distance(x), dense(x))
    assert all(parameter.requires_grad for parameter in merge(module).distance.parameters())


@pytest.mark.parametrize("is_first", [False, True])
def test_a_network_that_trains_and_measures_is_converted(is_first):
    module = pretrain(Classifier(128))
    parts = {"net": module.net, "distance": Distance(module.net)}
    module = nn.ModuleDict(dict(reversed(parts.items())) if is_first else parts)
    name = "distance.net" if is_first else "net"
    assert convert(module, r=2).converted == [f"{name}.0", f"{name}.4"]


@pytest.mark.parametrize("is_new", [False, True])
def test_a_metric_does_not_say_what_is_new(is_new, tmp_path):
    """As BERTScore beside another model: what was loaded to measure is not the model of which the rest is a head."""
    toy("bert").save_pretrained(tmp_path)
    module = Classifier(128) if is_new else pretrain(Classifier(128))
    for measures in (transformers.BertModel.from_pretrained(tmp_path), pretrain(nn.Linear(64, 64))):
        alone = copy.deepcopy(module)
        both = nn.ModuleDict({"of_user": copy.deepcopy(module), "distance": Distance(measures)})
        report = convert(both, r=2)
        expected = convert(alone, r=2)
        assert expected.converted == ["net.0", "net.4"]
        assert report.converted == ["of_user.net.0", "of_user.net.4"]
        assert not report.trained_in_full and report.notes.keys() == expected.notes.keys()


# ---------------------------------------------------------------- a second conversion


def test_a_second_conversion_names_the_arguments_that_it_does_not_use(fit, trainer, recwarn):
    module = Classifier()
    fit(module, loader(), plugins=QLoRAPrecision(r=4, paged_optimizer=False))
    for r in (2, 8):
        with pytest.warns(UserWarning, match=rf"Classifier was converted before, with r=4 and not {r}, and stays so"):
            convert(module, r=r)
    with pytest.warns(UserWarning, match=r"with quant_type='nf4' and not 'fp4', r=4 and not 64, and stays so"):
        trainer(plugins=QLoRAPrecision(quant_type="fp4")).test(module, loader())


def test_the_same_arguments_are_no_reason_for_a_warning(fit, trainer, tmp_path):
    module = Classifier()
    run = fit(module, loader())
    save_adapter(module, tmp_path / "adapter")
    again = load_from_checkpoint(Classifier, run.checkpoint_callback.best_model_path)
    from_folder = Classifier()
    other = Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*converted before")
        run.test(module, loader())
        convert(module, r=4, paged_optimizer=False)  # an argument of the run, not of the conversion
        trainer(plugins=QLoRAPrecision(r=4)).test(again, loader())
        start = QLoRAPrecision(adapter=str(tmp_path / "adapter"))
        for _ in range(2):
            fit(from_folder, loader(), plugins=start)
        convert(other, r=2)
        load_adapter(other, tmp_path / "adapter")
        convert(other, r=2)
        convert(other, r=4)  # as the adapter


# ---------------------------------------------------------------- checkpoints in a module that is not converted


def test_an_adapter_checkpoint_in_a_dense_module_is_refused_by_strict_loading(fit, trainer):
    path = fit(Classifier(), loader()).checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    convert(merged := Classifier(), r=4)
    for load in (
        lambda: Classifier.load_from_checkpoint(path),
        lambda: trainer().fit(Classifier(), loader(), ckpt_path=path),
        lambda: Classifier().load_state_dict(state),
        lambda: merge(merged).load_state_dict(state),
    ):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.0\.lora_A"):
            load()
    assert load_from_checkpoint(Classifier, path).net[0].lora_B.any()


def test_a_module_without_the_plugin_loads_its_checkpoints(fit, trainer):
    path = fit(module := Classifier(), loader(), plugins=None).checkpoint_callback.best_model_path
    trainer(max_epochs=2).fit(resumed := Classifier(), loader(), ckpt_path=path)
    for each in (module, resumed, Classifier.load_from_checkpoint(path)):
        assert type(each.net[0]) is nn.Linear
    missing = Classifier().load_state_dict({}, strict=False).missing_keys
    assert missing == list(Classifier().state_dict())


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(64, 32))),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer.weight.requires_grad_(),
    ],
)
def test_a_dense_weight_in_a_4_bit_layer_is_refused(write):
    module = Classifier()
    convert(module, r=4)
    before = module.net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"read-only, because it is computed|a 4-bit weight can't train"):
        write(module.net[0])
    assert torch.equal(module.net[0].weight.requires_grad_(False), before)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_were_resized_after_conversion_are_in_the_state(tied):
    model, again = (toy("llama", tie_word_embeddings=tied) for _ in range(2))
    for each in (model, again):
        convert(each, r=4)
        each.resize_token_embeddings(140)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    state = perturb(model).state_dict()
    assert {state[name].shape for name in names} == {(140, 64)}
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(model))
    model.load_state_dict(state)
    model.get_input_embeddings().weight.data = torch.zeros(140, 64)
    assert not model.state_dict()[names[0]].any()


@pytest.mark.parametrize("use_dora", [False, True])
def test_torchscript_by_tracing_and_after_a_merge(use_dora):
    module = Classifier()
    x = torch.randn(3, 64)
    convert(module, r=4, use_dora=use_dora)
    expected = perturb(module).eval()(x)
    traced = module.to_torchscript(method="trace", example_inputs=x)
    torch.testing.assert_close(traced(x), expected)
    merge(module)
    torch.testing.assert_close(torch.jit.script(module.net)(x), expected)


class WithScripted(pl.LightningModule):
    """A network with a TorchScript module in the middle, alone or in a list."""

    def __init__(self, how="script", in_list=False):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            self.before = nn.Linear(64, 64)
            self.after = nn.Linear(64, 64)
        inner = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, torch.ones(4, 64))
        self.inner = nn.ModuleList([inner]) if in_list else inner

    def forward(self, x):
        inner = self.inner[0] if isinstance(self.inner, nn.ModuleList) else self.inner
        return self.after(inner(self.before(x)))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    configure_optimizers = Classifier.configure_optimizers


@pytest.mark.parametrize(("how", "in_list"), [("script", False), ("trace", True)])
def test_a_torchscript_module_stays_as_it_is(how, in_list, fit, tmp_path):
    module = WithScripted(how, in_list)
    plugin = QLoRAPrecision(r=4)
    name = "inner.0" if in_list else "inner"
    before = copy.deepcopy(module.inner.state_dict())
    run = fit(module, loader(), plugins=plugin)
    assert plugin.report.converted == ["before", "after"]
    assert plugin.report.skipped == {name: "a torch.jit.ScriptModule, which can't be changed"}
    assert_equal(module.inner.state_dict(), before)
    run.save_checkpoint(tmp_path / "x.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT loads the folder, too
        save_adapter(module, tmp_path / "adapter")
    loaded = load_from_checkpoint(WithScripted, tmp_path / "x.ckpt")
    x = torch.randn(3, 64)
    expected = module.eval()(x)
    assert expected.requires_grad and torch.equal(loaded.eval()(x), expected)
    load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(merge(loaded)(x), expected)


def test_a_torchscript_module_that_is_named_or_the_whole():
    message = r"No layer was converted[\s\S]*inner: a torch.jit.ScriptModule, which can't be"
    with pytest.raises(ValueError, match=message):
        convert(WithScripted(), target_modules=["inner"])
    with pytest.raises(ValueError, match=r"\(the module itself\): a torch.jit.ScriptModule, which can't be changed"):
        convert(torch.jit.script(nn.Sequential(nn.Linear(64, 64))))
    module = WithScripted()
    convert(module, r=4, modules_to_save=["inner"])
    assert all(parameter.requires_grad for parameter in module.inner.parameters())


class Reads(nn.Module):
    """Code that reads the weight instead of calling the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return x @ self.layer.weight.T


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [Reads, lambda: Classifier().net])
def test_onnx_needs_a_merge(build, dynamo, tmp_path):
    if dynamo:
        pytest.importorskip("onnxscript")
    module = build().eval()
    x = torch.randn(3, 64)
    convert(module, r=4)
    with pytest.raises(Exception, match=r"4-bit layers can't be exported to ONNX. Merge first.*merge\(copy"):
        torch.onnx.export(module, (x,), tmp_path / "x.onnx", dynamo=dynamo)
    if build is not Reads:
        exported = torch.export.export(module, (x,))
        torch.testing.assert_close(exported.module()(x), module(x))
    if dynamo:
        torch.onnx.export(merge(module), (x,), tmp_path / "x.onnx", dynamo=True)
