import copy
import json
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAConfig,
    QLoRALinear,
    QLoRAPrecision,
    convert,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_qlora.files.safetensors_folder import WeightFolder
from lightning_qlora.huggingface.patches import QUANTIZER_FOR
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.tensor_parallel import unknown_style
from tests.conftest import Classifier, loader, raises_before_teardown, raises_in_one_line
from tests.huggingface.test_experts_on_load import assert_same_conversion, same_modules, same_parameters
from tests.huggingface.test_experts_on_load import loaded as load
from tests.toys import ARGUMENTS, NAMES, Lit, assert_equal, converted, ids, logits, needs, save_in_4_bits, toy

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    def save(name, **arguments):
        changes = arguments.pop("changes", {})
        toy(name, **changes).save_pretrained(tmp_path / "base", **{"max_shard_size": "60KB", **arguments})
        return tmp_path / "base"

    return save


@pytest.fixture
def fit(trainer):
    """One step, whose Trainer is returned."""

    def run(module, data=None, max_steps=1, **arguments):
        used = trainer(plugins=QLoRAPrecision(**arguments or ARGUMENTS), max_steps=max_steps)
        used.fit(module, data)
        return used

    return run


@pytest.fixture
def as_converted(trainer):
    """What is quantized while it loads under the plugin equals what is converted after loading, as do both reports."""

    def predict(module, **arguments):
        plugin = QLoRAPrecision(**arguments)
        trainer(plugins=plugin).predict(module)
        return plugin.report

    return partial(assert_same_conversion, convert_ours=predict)


def class_of(name):
    return type(toy(name))


def llama(path, **arguments):
    return transformers.LlamaForCausalLM.from_pretrained(path, **arguments)


class InConfigureModel(Lit):
    """As Lightning's documentation has it for large models."""

    def __init__(self, folder, kind=transformers.LlamaForCausalLM, **arguments):
        super().__init__(None)
        self.folder = folder
        self.kind = kind
        self.arguments = arguments

    def configure_model(self):
        if self.model is None:
            self.model = self.kind.from_pretrained(self.folder, **self.arguments)
            self.quantized = [*packed(self.model)]  # before conversion

    def predict_step(self, batch, batch_idx):
        return None

    predict_dataloader = Lit.train_dataloader


def packed(model):
    return {name: layer.packed_weight for name, layer in model.named_modules() if isinstance(layer, QLoRALinear)}


def fingerprints(module):
    return {name: layer.base_fingerprint() for name, layer in adapted_layers(module).items()}


class WithNewParts(InConfigureModel):
    """A decoder and a head without pretrained values beside the model."""

    def configure_model(self):
        if self.model is None:
            super().configure_model()
            torch.manual_seed(0)
            decoder = nn.Sequential(nn.Conv1d(64, 64, 3, padding=1), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(12, 12))
            self.decoder = decoder.to(self.model.dtype)
            self.head = nn.Linear(64, 100).to(self.model.dtype)

    def training_step(self, batch, batch_idx):
        hidden = self.model.model(input_ids=ids()).last_hidden_state
        logits = self.head(self.decoder(hidden.mT).mT)
        return F.cross_entropy(logits.float().flatten(0, 1), ids().flatten() % 100)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_parts_beside_a_model_that_is_quantized_while_it_loads_train_in_full(dtype, folder, trainer, tmp_path):
    path = folder("llama")

    def fit(epochs, module=None, ckpt_path=None, **arguments):
        module = module or WithNewParts(path, dtype=dtype)
        plugin = QLoRAPrecision(**ARGUMENTS, **arguments)
        run = trainer(plugins=plugin, max_epochs=epochs)
        run.fit(module, ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "c.ckpt")
        return module, plugin.report

    loaded = WithNewParts(path, dtype=dtype)
    loaded.configure_model()
    expected, as_loaded = fit(2, loaded)
    fit(1)
    module, report = fit(2, ckpt_path=tmp_path / "c.ckpt")
    assert module.quantized and not expected.quantized
    assert (report.converted, report.trained_in_full) == (as_loaded.converted, as_loaded.trained_in_full)
    new = {"decoder.0", "decoder.1", "decoder.3", "head"}
    assert report.trained_in_full == dict.fromkeys(new, "new: outside of the loaded LlamaForCausalLM")
    assert module.head.weight.dtype is torch.float32
    assert_equal(module.state_dict(), expected.state_dict())
    with pytest.warns(UserWarning, match=r"not what trains outside of it: decoder\.0, .*, head"):
        save_adapter(module, tmp_path / "adapter")
    again, _ = fit(0, adapter=str(tmp_path / "adapter"))
    for one, other in zip(adapted_layers(again).values(), adapted_layers(module).values(), strict=True):
        assert_equal(one.lora_B, other.lora_B)
    before = module.eval().training_step(None, 0)
    assert {p.dtype for p in merge(module).parameters()} == {dtype}
    torch.testing.assert_close(module.training_step(None, 0), before, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_configure_model_equals_conversion_after_loading(name, folder, as_converted):
    path = folder(name)
    types = {"dtype": torch.bfloat16} if name == "gpt2" else {}
    streamed, loaded = (
        InConfigureModel(path, class_of(name), **types),
        Lit(class_of(name).from_pretrained(path, **types)),
    )
    as_converted(streamed, loaded, **ARGUMENTS)
    assert streamed.quantized == [*packed(streamed.model)]
    assert torch.equal(logits(streamed.model), logits(loaded.model))
    assert not streamed.model.__dict__.keys() & {"hf_quantizer", "is_quantized"}
    same_parameters(merge(streamed.to(torch.bfloat16)), merge(loaded.to(torch.bfloat16)))
    assert all(parameter.requires_grad for parameter in streamed.parameters())


def test_plugin_init_and_a_head_beside_the_model(folder, trainer):
    class WithHead(Lit):
        def __init__(self, path):
            super().__init__(transformers.AutoModel.from_pretrained(path))
            self.head = torch.nn.Linear(64, 64)

        def training_step(self, batch, batch_idx):
            return self.head(self.model(input_ids=ids()).last_hidden_state).square().mean()

    path = folder("llama")
    plugin = QLoRAPrecision(**ARGUMENTS)
    with plugin.init():
        lit = WithHead(path)
    assert not packed(llama(path))  # outside of the context nothing changes
    assert len(packed(lit)) == 14
    trainer(plugins=plugin, max_steps=1).fit(lit)
    assert len(packed(lit)) == len(plugin.report.converted) == 14
    assert plugin.report.trained_in_full == {"head": "new: outside of the loaded LlamaModel"}
    trainer(plugins=QLoRAPrecision(), max_steps=1).fit(lit)
    assert len(packed(lit)) == 14 and lit.head.weight.requires_grad


def test_a_bias_that_the_files_lack_is_initialized(folder):
    config = transformers.LlamaConfig.from_pretrained(folder("llama"))
    config.attention_bias = True
    path = folder("llama")
    memory = [torch.full((64,), 7.0) for _ in range(200)]  # so that memory without values does not happen to hold zeros
    del memory
    with QLoRAPrecision(**ARGUMENTS).init():
        model = llama(path, config=config)
    biases = [p for name, p in model.named_parameters() if name.endswith("proj.bias")]
    assert len(biases) == 8 and not any(bias.any() for bias in biases)


Q = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}
BLOCK = {"llama": r"model\.layers\.0\..*", "gpt2": r"transformer\.h\.0\..*"}
CHOICES = {
    "exclude an expression": lambda name: {"exclude_modules": BLOCK[name]},
    "exclude by the beginning": lambda name: {"exclude_modules": r"(?=model\.|transformer\.).*\.0\..*"},
    "exclude a name": lambda name: {"exclude_modules": [Q[name]]},
    "rank and alpha": lambda name: {"rank_pattern": {Q[name]: 8}, "alpha_pattern": {BLOCK[name]: 32}},
    "rank too large for some": lambda name: {"rank_pattern": {BLOCK[name]: 40}},
    "target an expression": lambda name: {"target_modules": BLOCK[name] + "proj"},
    "target a name": lambda name: {"target_modules": [Q[name]]},
    "save": lambda name: {"modules_to_save": [Q[name]]},
    "save a block": lambda name: {"modules_to_save": [BLOCK[name].replace("\\", "")[:-3]]},
    "dora": lambda name: {"use_dora": True, "rank_pattern": {Q[name]: 8}},
    "gaussian": lambda name: {"init_lora_weights": "gaussian"},
    "alpha": lambda name: {"alpha_pattern": {Q[name]: 32}},
    "calibrated": lambda name: {"init_lora_weights": "calibrated", "exclude_modules": [Q[name]]},
}


OF_TRANSPOSED = ("dora", "calibrated")  # those that read the weight


@pytest.mark.parametrize(
    ("name", "choice"), [("llama", choice) for choice in CHOICES] + [("gpt2", choice) for choice in OF_TRANSPOSED]
)
def test_every_choice_gives_the_module_of_a_model_that_was_loaded_in_init(name, choice, folder, as_converted):
    path = folder(name)
    arguments = {**ARGUMENTS, **CHOICES[choice](name)}
    bare = class_of(name).from_pretrained(path)
    streamed, loaded = InConfigureModel(path, class_of(name)), Lit(copy.deepcopy(bare))
    as_converted(streamed, loaded, **arguments)
    convert(bare, **arguments)
    same_parameters(streamed.model, bare)


@pytest.mark.parametrize("choice", ["dora", "exclude a name", "save a block"])
def test_nothing_is_read_from_a_file_twice(choice, folder):
    path = folder("llama")
    arguments = {**ARGUMENTS, **CHOICES[choice]("llama")}
    loaded = Lit(llama(path))
    plugin = QLoRAPrecision(**arguments)
    with plugin.init():
        streamed = Lit(llama(path))
    for file in path.glob("*.safetensors"):
        file.unlink()
    plugin.convert_module(streamed)
    convert(loaded, **arguments)
    same_modules(streamed, loaded)


WITH_THE_ATTRIBUTE = (  # patterns, and how a layer differs from what was loaded; None: it does not
    ({"target_modules": r"model\.model\..*q_proj"}, None),
    ({"target_modules": ["q_proj", "model.lm_head"]}, None),
    ({"exclude_modules": ["model.model.layers.0"]}, "is to stay dense now: in exclude_modules"),
    ({"rank_pattern": {"model.model.layers.0.self_attn.q_proj": 8}}, "r=4 and not 8"),
    ({"alpha_pattern": {r"model\.model\.layers\.0\..*": 32}}, "lora_alpha=8 and not 32"),
    ({"modules_to_save": ["model.model.norm"]}, None),
)


@pytest.mark.parametrize(("pattern", "difference"), WITH_THE_ATTRIBUTE, ids=str)
def test_a_pattern_with_the_attribute_of_the_module_is_refused_where_it_changes_a_layer(
    pattern, difference, folder, trainer
):
    path = folder("llama")
    streamed, loaded, relative = InConfigureModel(path), Lit(llama(path)), Lit(llama(path))
    plugin = QLoRAPrecision(**ARGUMENTS, **pattern)
    fit = partial(trainer(plugins=plugin).predict, streamed)
    convert(loaded, **ARGUMENTS, **pattern)
    if difference is None:
        fit()
        same_parameters(streamed, loaded)
    else:
        with raises_in_one_line(ValueError, rf"was quantized while its .*{difference}.*patterns must match the names"):
            fit()
    text = json.dumps(pattern).replace(r"model\\.model", "model").replace("model.model", "model")
    convert(relative, **ARGUMENTS, **json.loads(text.replace("model.lm_head", "lm_head")))
    same_parameters(loaded, relative)


class TeacherAndStudent(InConfigureModel):
    def __init__(self, folder, loaded=False):
        super().__init__(folder)
        self.teacher = None
        self.student = None
        if loaded:
            self.configure_model()

    def configure_model(self):
        if self.teacher is None:
            self.teacher = llama(self.folder)
            self.student = llama(self.folder)


def test_names_in_one_of_two_models(folder, trainer, as_converted):
    """Both models have the same names in them; a name that tells them apart needs a model that was loaded before."""
    path = folder("llama")
    arguments = {**ARGUMENTS, "exclude_modules": [Q["llama"]], "use_dora": True}
    streamed = TeacherAndStudent(path)
    as_converted(streamed, TeacherAndStudent(path, loaded=True), **arguments)
    assert len(packed(streamed.teacher)) == len(packed(streamed.student)) == 13
    arguments["exclude_modules"] = r"teacher\..*"
    message = r"^teacher\.model\.layers.* was quantized .*is to stay dense now: in exclude_modules"
    with pytest.raises(ValueError, match=message):
        trainer(plugins=QLoRAPrecision(**arguments)).predict(TeacherAndStudent(path))
    loaded = TeacherAndStudent(path, loaded=True)
    convert(loaded, **arguments)
    assert not packed(loaded.teacher) and len(packed(loaded.student)) == 14


def test_an_adapter_for_one_of_two_models(folder, as_converted, tmp_path):
    """The first one that has its layers gets it, and no other layer has 4 bits."""
    path = folder("llama")
    lit = converted("llama", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    save_adapter(lit, tmp_path / "adapter")
    streamed = TeacherAndStudent(path)
    as_converted(streamed, TeacherAndStudent(path, loaded=True), adapter=str(tmp_path / "adapter"))
    assert torch.equal(logits(streamed.teacher), logits(lit.model)) and not packed(streamed.student)


def test_other_arguments_at_conversion_are_refused(folder):
    with QLoRAPrecision(**ARGUMENTS).init():
        streamed = Lit(llama(folder("llama")))
    before = streamed.state_dict()
    others = {
        **{"quant_type": "fp4", "double_quant": False, "block_size": 32, "r": 2, "lora_alpha": 3},
        **{"init_lora_weights": "gaussian", "use_rslora": True, "use_dora": True},
    }
    config = QLoRAConfig(**ARGUMENTS)
    differing = ", ".join(f"{name}={getattr(config, name)!r} and not {value!r}" for name, value in others.items())
    for other, message in (
        (others, re.escape(f"({differing}). Load and convert with")),
        ({"rank_pattern": {"q_proj": 8}}, "r=4 and not 8"),
        ({"exclude_modules": ["q_proj"]}, "is to stay dense now: in exclude_modules"),
        ({"modules_to_save": ["layers.0"]}, "is to stay dense now: in modules_to_save"),
    ):
        with raises_in_one_line(ValueError, rf"^model.model.layers.0.self_attn.q_proj: was quantized .*{message}"):
            convert(streamed, **{**ARGUMENTS, **other})
        assert_equal(streamed.state_dict(), before)
    report = convert(streamed, **{**ARGUMENTS, "lora_dropout": 0.5, "compute_dtype": "bf16"})
    layers = adapted_layers(streamed)
    assert sorted(report.converted) == sorted(layers) and len(layers) == 14
    assert all(
        (layer.lora_dropout, layer.config.compute_dtype, layer.full_name) == (0.5, "bf16", name)
        for name, layer in layers.items()
    )


@pytest.mark.parametrize("start", ["default", "calibrated"])
def test_a_cast_between_loading_and_conversion_leaves_bytes_and_adapters(start, folder):
    path = folder("llama")
    arguments = {**ARGUMENTS, "init_lora_weights": start, "use_dora": start == "default"}
    plugins = [QLoRAPrecision(**arguments) for _ in range(2)]
    modules = []
    for plugin in plugins:
        with plugin.init():
            modules.append(Lit(llama(path)))
    cast, expected = modules
    cast.to(torch.bfloat16).half().to(torch.bfloat16)
    for plugin, module in zip(plugins, modules, strict=True):
        plugin.convert_module(module)
    assert cast.model.model.norm.weight.dtype in (torch.bfloat16, torch.float32)  # fp32 on a CPU that is slow in bf16
    assert packed(cast).keys() == packed(expected).keys()
    for name, layer in adapted_layers(cast).items():
        assert layer.dtype_before is torch.bfloat16, name
        same_parameters(layer, expected.get_submodule(name))
    assert cast.to(torch.bfloat16).model.model.layers[0].mlp.up_proj.lora_A.dtype is torch.bfloat16


def test_an_adapter_that_was_loaded_in_between_stays(folder, tmp_path):
    save_adapter(lit := converted("llama"), tmp_path / "adapter")
    with QLoRAPrecision(**ARGUMENTS).init():
        streamed = Lit(llama(folder("llama")))
    load_adapter(streamed, tmp_path / "adapter")
    convert(streamed, **ARGUMENTS)
    assert torch.equal(logits(streamed.model), logits(lit.model))


@pytest.mark.parametrize("choice", ["exclude a name", "calibrated"])
def test_the_weights_of_a_state_dict_are_quantized_too(choice):
    plain = toy("llama")
    arguments = {**ARGUMENTS, **CHOICES[choice]("llama")}
    plugin = QLoRAPrecision(**arguments)
    with plugin.init():
        state = plain.state_dict()
        streamed = Lit(type(plain).from_pretrained(None, config=plain.config, state_dict=state))
    assert len(packed(streamed)) == 14 - ("exclude_modules" in arguments)
    loaded = Lit(plain)
    plugin.convert_module(streamed)
    convert(loaded, **arguments)
    same_modules(streamed, loaded)


class Folded(InConfigureModel):
    """A model that a user makes of two loaded ones, so their layers have other names in it."""

    def configure_model(self):
        if self.model is None:
            parts = [transformers.BertModel.from_pretrained(self.folder) for _ in range(2)]
            config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*(part.config for part in parts))
            decoder = transformers.BertLMHeadModel.from_pretrained(
                self.folder, is_decoder=True, add_cross_attention=True
            )
            self.model = transformers.EncoderDecoderModel(config, parts[0], decoder)


def test_a_model_made_of_loaded_models_keeps_what_they_were_loaded_with(folder, trainer):
    lit = Folded(folder("bert"))
    plugin = QLoRAPrecision(**ARGUMENTS, target_modules=r"encoder\.layer\.0\..*query")
    trainer(plugins=plugin).predict(lit)
    assert plugin.report.converted == ["model.encoder.encoder.layer.0.attention.self.query"]
    assert lit.model.encoder.encoder.layer[0].attention.self.query.seed_name == "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("change", [{"intermediate_size": 256}, {"num_key_value_heads": 4}])
def test_a_shape_that_is_not_the_models_is_refused(change, folder, trainer):
    lit = InConfigureModel(folder("llama"), **change)
    shapes = r"has shape \[\d+, \d+\], and the model has \[\d+, \d+\]"
    with raises_in_one_line(ValueError, rf"model-0000.*safetensors: 'model.layers.0.*weight' {shapes}"):
        trainer(plugins=QLoRAPrecision(**ARGUMENTS)).predict(lit)


def quantizer_of(model):
    from lightning_qlora.huggingface.quantizer import Loading, QLoRAQuantizer

    quantizer = QLoRAQuantizer(Loading(QLoRAConfig(**ARGUMENTS), sharding=False, adapter=None))
    quantizer._process_model_before_weight_loading(model)
    return quantizer


def test_a_shape_that_transformers_did_not_compare_is_refused(folder):
    """As before 5.23, where a quantizer is used."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder("bert"))
    quantizer = quantizer_of(model)
    model.classifier.bias = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match="there") as error:
        quantizer._process_model_after_weight_loading(model)
    assert str(error.value) == (
        "'classifier.bias' has shape [7], and the model has [3] there. Load it with the config that belongs to the "
        "files, or pass ignore_mismatched_sizes=True to from_pretrained to initialize this layer anew (transformers "
        "5.23 and newer)."
    )
    quantizer.loading.mismatches.append(ValueError("names the file"))
    with pytest.raises(ValueError, match="names the file"):
        quantizer._process_model_after_weight_loading(model)


@needs("transformers", "5.23", "with a quantizer, older versions do not compare shapes, so nothing starts anew")
def test_layers_of_another_size_start_anew_where_that_is_asked_for(folder, trainer):
    path = folder("bert", changes={"num_labels": 200})
    kind = transformers.BertForSequenceClassification
    lit = InConfigureModel(path, kind, num_labels=100, ignore_mismatched_sizes=True)
    arguments = {**ARGUMENTS, "target_modules": ["query", "classifier"]}  # unless it is named, it trains in full
    trainer(plugins=QLoRAPrecision(**arguments)).predict(lit)
    assert logits(lit.model).shape == (2, 100)
    assert isinstance(lit.model.classifier, QLoRALinear) and lit.model.classifier.weight.shape == (100, 64)
    loaded = Lit(kind.from_pretrained(path, num_labels=100, ignore_mismatched_sizes=True))
    convert(loaded, **arguments)
    ours, theirs = fingerprints(lit.model), fingerprints(loaded.model)
    del ours["classifier"], theirs["classifier"]
    assert ours == theirs

    def load_two():
        with QLoRAPrecision(**arguments).init():
            kind.from_pretrained(path, num_labels=100, ignore_mismatched_sizes=True)
            kind.from_pretrained(path, num_labels=200, intermediate_size=192)

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # no error of the first load
        load_two()


def test_tied_weights_stay_tied_and_names_may_fit_another_part(folder):
    path = folder("llama", changes={"tie_word_embeddings": True})
    names = {"target_modules": ["q_proj", "lm_head", "query"], "exclude_modules": ["layers.0.self_attn.q_proj"]}
    model = load(path, **names)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(packed(model)) == ["model.layers.1.self_attn.q_proj"]


def test_a_class_without_the_head_and_one_with_a_new_head(folder):
    path = folder("llama")
    with QLoRAPrecision(**ARGUMENTS).init():
        body = transformers.AutoModel.from_pretrained(path)
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    assert len(packed(body)) == len(packed(judge)) == 14
    assert not judge.score.weight.is_meta and judge.score.weight.std() > 0


# ---- bitsandbytes' folders


@pytest.fixture
def bnb_folder(folder, tmp_path):
    """A folder as transformers and bitsandbytes write it."""

    def save(name, **changes):
        changes = {"llm_int8_skip_modules": ["lm_head", "classifier"], **changes}
        return save_in_4_bits(class_of(name), folder(name), tmp_path / "bnb", **changes)

    return save


def tensors(folder):
    weights = WeightFolder(folder)
    return weights.tensors(list(weights.entries))


def same_entries(model, folder):
    """The 4-bit layers of a model have the entries of a folder, whose bytes may be of another type."""
    theirs = tensors(folder)
    ours = {k: v for name, weight in packed(model).items() for k, v in weight.bnb_state_dict(f"{name}.weight").items()}
    assert ours
    for key, value in ours.items():
        stored = theirs[key] if theirs[key].dtype is value.dtype else theirs[key].view(torch.uint8).view(-1, 1)
        assert torch.equal(stored, value), key


WITH_STORAGE = needs("transformers", "5.22", "older versions cast the bytes to the type of the model, which is refused")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *[(name, {}) for name in NAMES],
        ("llama", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        ("bert", {"llm_int8_skip_modules": None}),  # transformers' own choice: BERT's head is in 4 bits
        pytest.param("llama", {"bnb_4bit_quant_storage": "bfloat16"}, marks=WITH_STORAGE),
    ],
)
def test_a_folder_of_bitsandbytes_is_loaded_with_its_bytes(name, changes, bnb_folder, as_converted):
    """Also where conversion gets bitsandbytes' layers: of a folder loaded in __init__, or a BitsAndBytesConfig."""
    path = bnb_folder(name, **changes)
    theirs = class_of(name).from_pretrained(path, device_map="cpu")
    expected = logits(theirs)
    streamed, loaded = InConfigureModel(path, class_of(name)), Lit(theirs)
    as_converted(streamed, loaded, **ARGUMENTS)
    assert not (name == "t5" and any("wo" in layer for layer in packed(loaded)))  # dense in the folder, dense here
    for model in (streamed.model, loaded.model):
        same_entries(model, path)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
        assert not vars(model).keys() & {"hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"}
        assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_are_not_chosen_are_decoded(dtype, bnb_folder):
    path = bnb_folder("gpt2")
    with QLoRAPrecision(**ARGUMENTS, target_modules=["c_attn"]).init():
        model = transformers.GPT2LMHeadModel.from_pretrained(path, dtype=dtype)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "attn.c_attn" not in name} == {dtype}
    convert(model, **ARGUMENTS, target_modules=["c_attn"])
    assert [layer.weight_dtype for layer in adapted_layers(model).values()] == [dtype] * 2
    for name in ("mlp.c_fc", "attn.c_proj"):  # the second is square
        dense = toy("gpt2").transformer.h[0].get_submodule(name).weight
        expected = quantize(dense.T.contiguous()).dequantize(dtype).T
        weight = model.transformer.h[0].get_submodule(name).weight
        assert torch.equal(weight.float(), expected.float())  # a CPU that is slow in bf16 holds it in fp32


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("llama", "exclude an expression"),
        ("gpt2", "target a name"),
        ("llama", "rank and alpha"),
        ("gpt2", "rank too large for some"),
        ("llama", "save a block"),
    ],
)
def test_choices_for_bnb_folders(name, choice, bnb_folder, as_converted):
    path = bnb_folder(name)
    loaded = Lit(class_of(name).from_pretrained(path, device_map="cpu"))
    as_converted(InConfigureModel(path, class_of(name)), loaded, **ARGUMENTS, **CHOICES[choice](name))


def test_a_bnb_folder_of_another_shape_is_refused(bnb_folder):
    path = bnb_folder("llama")
    with (
        pytest.raises(ValueError, match=r"model.safetensors: 'model.layers.*' has shape \[64, 128\], and the model"),
        QLoRAPrecision(**ARGUMENTS).init(),
    ):
        llama(path, intermediate_size=256)


def test_starts_that_need_the_float_weight_are_refused(bnb_folder):
    path = bnb_folder("llama")
    message = r"layers.0.*: init_lora_weights='calibrated' needs the float weight"
    with pytest.raises(ValueError, match=message):
        convert(llama(path, device_map="cpu"), r=2, init_lora_weights="calibrated")
    with pytest.raises(ValueError, match=message):
        load(path, init_lora_weights="calibrated")


def test_nan_in_a_weight_is_named(tmp_path):
    model = toy("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors: model.layers.1.mlp.up_proj: weight: holds NaN"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), r"this shard is missing; .* holds 'model.layers"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "not a safetensors file, or truncated"),
    ],
)
def test_a_broken_folder_is_named(harm, message, folder, fit):
    path = folder("llama")
    harm(next(path.glob("model-00002-of-*.safetensors")))
    with raises_in_one_line((ValueError, FileNotFoundError), rf"model-00002-of-\d+.safetensors: {message}"):
        fit(InConfigureModel(path))


def test_a_foreign_quant_type_is_named(bnb_folder, fit):
    path = bnb_folder("llama") / "model.safetensors"
    state = load_file(path)
    key = next(key for key in state if "bitsandbytes__nf4" in key)
    meta = json.loads(bytes(state[key].tolist()))
    state[key] = torch.tensor(list(json.dumps({**meta, "quant_type": "af4"}).encode()), dtype=torch.uint8)
    save_file(state, path, metadata={"format": "pt"})
    with raises_in_one_line(ValueError, r"safetensors: model.layers.*weight: quant_type='af4'"):
        fit(InConfigureModel(path.parent))


def test_an_adapter_of_another_architecture(folder, fit, tmp_path):
    save_adapter(converted("gpt2"), tmp_path / "adapter")
    with pytest.raises(CheckpointMismatchError, match=r"adapter_model.safetensors: key .* has no such layer"):
        fit(InConfigureModel(folder("llama")), adapter=str(tmp_path / "adapter"))


class OnMeta(Classifier):
    """Built on the meta device; `configure_model` loads all whose name does not begin with `missing`, as torch does."""

    def __init__(self, missing="nothing"):
        with torch.device("meta"):
            super().__init__()
            self.register_buffer("seen", torch.zeros(64))
        self.missing = missing

    def configure_model(self):
        if self.net[0].weight.is_meta:
            state = {**Classifier().state_dict(), "seen": torch.ones(64)}
            state = {name: value for name, value in state.items() if not name.startswith(self.missing)}
            self.load_state_dict(state, strict=False, assign=True)


def test_a_meta_module_that_is_loaded_in_configure_model(fit):
    fit(lit := OnMeta(), loader())
    convert(expected := Classifier(), **ARGUMENTS)
    assert fingerprints(lit) == fingerprints(expected)
    assert lit.seen.all()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("net.0", "net.0.weight: this parameter"),
        ("net.2", "net.2.weight: this parameter"),
        ("seen", "seen: this buffer"),
    ],
)
def test_what_stayed_on_the_meta_device_is_named(missing, message, fit):
    with raises_before_teardown(ValueError, f"^{message} is.* on the meta device.* Load it[^\n]*$"):
        fit(OnMeta(missing), loader())


def test_a_buffer_that_no_state_dict_holds_is_named_with_what_to_do(fit):
    plain = toy("llama")
    state = toy("llama").state_dict()
    with torch.device("meta"):
        model = type(plain)(plain.config)
    model.load_state_dict(state, assign=True)
    message = r"^model.model.rotary_emb.inv_freq: this buffer .* from_pretrained\(None, config=..., state_dict=...\).$"
    with raises_before_teardown(ValueError, message):
        fit(Lit(model))
    model = type(plain).from_pretrained(None, config=plain.config, state_dict=state)
    convert(plain, **ARGUMENTS)
    convert(model, **ARGUMENTS)
    assert torch.equal(logits(model), logits(plain))


def test_what_transformers_asks_of_every_quantizer():
    model = toy("llama")
    quantizer = quantizer_of(model)
    sizes = {name: quantizer.param_element_size(model, name, p) for name, p in model.named_parameters()}
    assert {name for name, size in sizes.items() if size == 0.5} == quantizer.chosen.keys()
    assert len(quantizer.chosen) == 14 and {*sizes.values()} == {0.5, 4}
    assert quantizer.is_trainable is True and quantizer.is_serializable() is False


@pytest.mark.parametrize("before", [None, "0"])
def test_loading_leaves_the_environment_as_it_was(before, monkeypatch):
    """Within it transformers reads a weight when it converts it, and its changed functions are imported."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    events = []
    words = "lightning_qlora.huggingface.quantize_on_load."
    monkeypatch.setattr(words + "import_module", events.append)
    monkeypatch.setattr(words + "make_changes", lambda library: events.append(f"changes to {library}"))
    with QLoRAPrecision(r=4).init():
        assert os.environ[name] == "1"
        assert events == ["transformers.modeling_utils", "changes to transformers"]
    assert os.environ.get(name) == before


@pytest.mark.parametrize("missing", ["transformers", "transformers.core_model_loading"])
def test_without_transformers_5_weights_are_quantized_later(missing, monkeypatch):
    def find_spec(name):
        assert missing.startswith(name)
        return None if name == missing else name

    monkeypatch.setattr("lightning_qlora.huggingface.quantize_on_load.find_spec", find_spec)
    with QLoRAPrecision(r=4).init():
        assert QUANTIZER_FOR.get() is None


def test_what_no_folder_of_these_tests_has():
    from lightning_qlora.huggingface.operations import LOAD_WHOLE, LoadPacked, _not_splittable, _of_expert

    assert _of_expert({"a": [torch.ones(2)] * 3, "b": [torch.ones(2)]}, 0, 3) is None
    mesh = SimpleNamespace(ndim=2)
    for dimensions, placement, message in (
        (2, Shard(0), LOAD_WHOLE),
        (1, Shard(0), None),
        (1, Replicate(), unknown_style("a plan for fused layers")),
    ):
        mesh.ndim = dimensions
        place = SimpleNamespace(device_mesh=mesh, placements=[placement])
        assert _not_splittable(place, SimpleNamespace(stack=None)) == message
    weight = quantize(torch.randn(8, 64))
    model = torch.nn.ModuleDict({"e": torch.nn.Embedding(8, 64, dtype=torch.bfloat16)})
    load_packed = LoadPacked(SimpleNamespace(chosen={}, file_of={})).convert
    found = load_packed(weight.bnb_state_dict("weight"), model=model, full_layer_name="e.weight")
    assert_equal(found, {"e.weight": weight.dequantize(torch.bfloat16)})


def test_folders_with_pickled_weights_or_a_variant(folder, fit):
    path = folder("llama", max_shard_size="1GB")
    expected, pickled = (InConfigureModel(path) for _ in range(2))
    variant = InConfigureModel(path, variant="x")
    fit(expected)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").rename(path / "model.x.safetensors")
    for module in (pickled, variant):
        fit(module)
        assert fingerprints(module) == fingerprints(expected)
