"""Adapter folders: PEFT reads ours, we read PEFT's, and what is refused."""

import copy
import dataclasses
import json
from collections import OrderedDict
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAPrecision,
    convert,
    load_adapter,
    load_from_checkpoint,
    merge,
    quantize,
    save_adapter,
)
from lightning_qlora.adapters.load import config_of_adapter
from lightning_qlora.adapters.peft_folder import read_adapter, write_adapter
from lightning_qlora.checks import TRAIN_IN_FULL
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.parts import Parts
from tests.adapters.folders import PLAIN, assert_same_folders, assert_same_tensors, read_config
from tests.conftest import Classifier, raises_in_one_line
from tests.experts.test_experts import made, qwen3_moe
from tests.toys import ARGUMENTS, NAMES, Lit, converted, delta, ids, logits, perturb, save_in_4_bits, toy

peft = pytest.importorskip("peft")


def decoded_base(lit):
    """A float model with the decoded 4-bit weights, on which the adapter was trained."""
    config = lit.model.config
    base = toy(config.model_type, tie_word_embeddings=config.tie_word_embeddings)
    for name, layer in adapted_layers(lit.model).items():
        base.get_submodule(name).weight.data = layer.decode().contiguous()
    return base


def assert_same_logits(one, other, atol=0.0):
    torch.testing.assert_close(logits(one), logits(other), atol=atol, rtol=0)


def assert_peft_computes_the_same(lit, folder, base=None):
    """PEFT with the folder, on the decoded base or another one; its model."""
    theirs = peft.PeftModel.from_pretrained(base or decoded_base(lit), folder)
    assert_same_logits(theirs, lit.model, atol=1e-5)
    return theirs


def bnb_base(name, folder, skip=("lm_head", "classifier")):
    model = toy(name)
    model.save_pretrained(folder / "float")
    arguments = {"bnb_4bit_compute_dtype": torch.float32, "llm_int8_skip_modules": [*skip]}
    save_in_4_bits(type(model), folder / "float", folder / "4 bits", **arguments)
    return type(model).from_pretrained(folder / "4 bits", dtype=torch.float32, device_map="cpu").eval()


def dora_and_patterns(name):
    return {"use_dora": True, "rank_pattern": {name: 8}, "alpha_pattern": {name: 3}}


POOLER = {"modules_to_save": ["pooler"]}
CONFIG = {  # adapter_config.json of a Llama; its type, ranks and alphas are written by PEFT too
    **PLAIN,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "inference_mode": True,
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "modules_to_save": None,
}
GPT2 = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
BERT = {"task_type": None, "target_modules": ["dense", "key", "query", "value"], "modules_to_save": ["classifier"]}
T5 = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["k", "o", "q", "v", "wi", "wo"]}


def both_patterns(block, name):
    names = [rf"^{block}\.{i}\.{name}" for i in range(2)]
    return {"use_dora": True, "rank_pattern": dict.fromkeys(names, 8), "alpha_pattern": dict.fromkeys(names, 3)}


SAVED = {  # a toy, the arguments of its conversion, and the entries that differ from CONFIG
    "llama": ("llama", {}, {}),
    "bert, whose head is smaller than an adapter": ("bert", {}, BERT),
    "bert's pooler, whose name ends as those of layers": (
        "bert",
        POOLER,
        {**BERT, "target_modules": ANY, "modules_to_save": ["bert.pooler.dense", "classifier"]},
    ),
    "gpt2's tied output embedding": (
        "gpt2",
        {"modules_to_save": ["lm_head"]},
        {**GPT2, "modules_to_save": ["lm_head", "transformer.wte"]},
    ),
    "t5's tied output embedding": (
        "t5",
        {"modules_to_save": ["lm_head"]},
        {**T5, "modules_to_save": ["decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared"]},
    ),
    "some of the layers of a name": ("llama", {"target_modules": r".*layers\.1\..*proj"}, {"target_modules": ANY}),
    "llama, DoRA and patterns": (
        "llama",
        dora_and_patterns("q_proj"),
        both_patterns(r"model\.layers", r"self_attn\.q_proj"),
    ),
    "gpt2, DoRA and patterns": (
        "gpt2",
        dora_and_patterns("c_attn"),
        {**GPT2, **both_patterns(r"transformer\.h", r"attn\.c_attn")},
    ),
}


@pytest.mark.parametrize(("name", "arguments", "entries"), SAVED.values(), ids=SAVED)
def test_peft_computes_the_same_and_what_it_writes_is_read(name, arguments, entries, tmp_path):
    lit = converted(name, **arguments)
    save_adapter(lit, tmp_path / "ours")
    assert read_config(tmp_path / "ours") == {**CONFIG, **entries}
    assert_peft_computes_the_same(lit, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = converted(name, seed=1, **arguments)
    load_adapter(again, tmp_path / "theirs")
    assert_same_logits(again.model, lit.model)
    started = Lit(toy(name))
    convert(started, adapter=str(tmp_path / "theirs"))
    assert_same_logits(started.model, lit.model, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_peft_reads_ours_on_the_4_bit_base(name, tmp_path):
    # transformers keeps T5's `wo` in fp32, so bitsandbytes gets none
    lit = converted(name, exclude_modules=["wo"] if name == "t5" else [])
    save_adapter(lit, tmp_path / "adapter")
    assert_peft_computes_the_same(lit, tmp_path / "adapter", bnb_base(name, tmp_path))


@pytest.mark.parametrize(("name", "rslora"), [*zip(NAMES, [False, True] * 2, strict=True)])
def test_peft_to_ours_to_peft(name, rslora, tmp_path):
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query"], "t5": ["q", "wo"]}
    theirs = peft.get_peft_model(
        toy(name),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets[name],
            use_rslora=rslora,
            fan_in_fan_out=name == "gpt2",
            rank_pattern={next(iter(targets[name])): 8},
            alpha_pattern={targets[name][-1]: 3},
            modules_to_save=["classifier"] if name == "bert" else None,
        ),
    )
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    lit = Lit(toy(name))
    convert(lit, adapter=str(tmp_path / "theirs"))
    save_adapter(lit, tmp_path / "ours")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert read_config(tmp_path / "ours")["fan_in_fan_out"] is (name == "gpt2")
    assert_peft_computes_the_same(lit, tmp_path / "ours")


@pytest.mark.parametrize("on", ["float", "4 bits"])
def test_an_adapted_output_embedding_whose_base_weight_peft_saves_too(on, tmp_path):
    lit = converted("llama", target_modules=["q_proj", "lm_head"])
    save_adapter(lit, tmp_path / "ours")
    base = toy("llama") if on == "float" else bnb_base("llama", tmp_path, skip=[])
    peft.PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert any(".base_layer." in key for key in load_file(tmp_path / "theirs/adapter_model.safetensors"))
    again = converted("llama", seed=1, target_modules=["q_proj", "lm_head"])
    load_adapter(again, tmp_path / "theirs")
    assert_same_logits(again.model, lit.model)


def test_modules_that_trained_before_they_were_frozen_are_saved(tmp_path):
    lit = converted("bert", **POOLER)
    again = converted("bert", seed=1, **POOLER)
    for parameter in lit.parameters():
        parameter.requires_grad_(False)
    save_adapter(lit, tmp_path)
    assert read_config(tmp_path)["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    load_adapter(again, tmp_path)
    assert_same_logits(again.model, lit.model)


def test_what_an_earlier_folder_had_and_this_one_lacks_is_named(tmp_path):
    """PEFT goes back to the pretrained pooler, which the converted model no longer has."""
    save_adapter(converted("bert", **POOLER), tmp_path / "with")
    lit = converted("bert", exclude_modules=["pooler"])
    save_adapter(lit, tmp_path / "without")
    load_adapter(lit, tmp_path / "with")
    with pytest.warns(UserWarning, match=r"without has no values for.*: bert\.pooler\.dense\. They stay"):
        load_adapter(lit, tmp_path / "without")


@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_of_tokens_that_a_folder_lacks_are_those_of_the_base(is_tied, tmp_path):
    """As in PEFT, where rows belong to the adapter: the module is its base and the folder, and nothing of before."""

    def trained(seed, **arguments):
        model = toy("llama", tie_word_embeddings=is_tied)
        convert(model, **ARGUMENTS, **arguments)
        return perturb(model, seed=seed)

    save_adapter(without := trained(0), tmp_path / "without")
    model = trained(1, trainable_token_indices=[5, 3, 7])
    save_adapter(model, tmp_path / "with")
    trained_rows = logits(model)
    assert not torch.allclose(trained_rows, logits(without))
    load_adapter(model, tmp_path / "without")
    assert_same_logits(model, without, atol=1e-6)
    load_adapter(model, tmp_path / "with")
    assert torch.equal(logits(model), trained_rows)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_embedding_that_was_resized_after_conversion_is_saved(name, tmp_path):
    """As PEFT does. It is frozen, and the base has no values for its new rows."""
    lit = converted(name)
    again = converted(name, seed=1)
    for module in (lit, again):
        module.model.resize_token_embeddings(module.model.config.vocab_size + 8)
    save_adapter(lit, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert_same_logits(again.model, lit.model)
    dense = toy(name)
    dense.resize_token_embeddings(dense.config.vocab_size + 8)
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").get_input_embeddings()
    assert torch.equal(loaded.modules_to_save["default"].weight, lit.model.get_input_embeddings().weight)


def test_a_module_that_peft_cannot_name_alone_is_refused(tmp_path):
    """PEFT's modules_to_save are ends of names, so no form of "head" leaves out "pre_head" (RF-DETR: class_embed)."""

    def model():
        return nn.ModuleDict({"body": nn.Linear(64, 64), "pre_head": nn.Linear(64, 64), "head": nn.Linear(64, 2)})

    theirs = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    assert {name.partition(".modules_to_save")[0] for name, _ in theirs.named_parameters() if "to_save" in name} == {
        "base_model.model.pre_head",
        "base_model.model.head",
    }
    convert(module := model(), r=2)
    with pytest.raises(ValueError, match="'head' was trained in full, and PEFT would also select 'pre_head'"):
        save_adapter(module, tmp_path)


TIED = [
    ("llama", "q_proj", ["embed_tokens"]),
    ("llama", "q_proj", ["lm_head"]),
    ("llama", "q_proj", ["embed_tokens", "lm_head"]),
    ("gpt2", "c_attn", ["wte"]),
    ("t5", "q", ["shared"]),
]


def tied(name):
    return toy(name, **({"tie_word_embeddings": True} if name == "llama" else {}))


@pytest.mark.parametrize(("name", "target", "modules"), TIED)
def test_a_tied_weight_that_peft_trained_separately_is_refused(name, target, modules, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=[target], modules_to_save=modules, fan_in_fan_out=name == "gpt2")
    perturb(peft.get_peft_model(tied(name), config)).save_pretrained(tmp_path)
    with raises_in_one_line(CheckpointMismatchError, r"was trained separately from .*ensure_weight_tying=True"):
        convert(Lit(tied(name)), adapter=str(tmp_path))


def test_a_tied_weight_that_peft_kept_tied_is_read(tmp_path):
    tying = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **tying)
    perturb(peft.get_peft_model(tied("llama"), config)).save_pretrained(tmp_path)
    lit = Lit(tied("llama"))
    convert(lit, adapter=str(tmp_path))
    assert lit.model.lm_head.weight is lit.model.model.embed_tokens.weight
    assert_peft_computes_the_same(lit, tmp_path)


@pytest.fixture
def folder(tmp_path):
    save_adapter(converted("llama"), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_trained_adapter_generates_the_same_tokens_in_peft(tmp_path, trainer):
    lit = Lit(toy("llama"))
    trainer(plugins=QLoRAPrecision(**{**ARGUMENTS, "lora_dropout": 0.5}), max_steps=3).fit(lit)
    save_adapter(lit, tmp_path / "adapter")
    theirs = assert_peft_computes_the_same(lit, tmp_path / "adapter")
    arguments = {"input_ids": ids(1, 5), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(**arguments), lit.model.generate(**arguments))


def change_config(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps(read_config(folder) | changes))


def test_adapters_in_any_float_type_are_read(folder):
    path = folder / "adapter_model.safetensors"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
        assert {state["lora_A"].dtype for state in read_adapter(folder).layers.values()} == {dtype}


def test_every_entry_of_peft_that_changes_an_adapter_is_checked(folder):
    before = read_config(folder)
    names = {entry.name for entry in dataclasses.fields(peft.LoraConfig)}
    refused = {}
    for name in names:
        change_config(folder, **{name: {"": 1}})
        try:
            read_adapter(folder)
        except ValueError as error:
            refused[name] = str(error)
        (folder / "adapter_config.json").write_text(json.dumps(before))
    assert all(f"adapter_config.json: {name}={{'': 1}}: " in text for name, text in refused.items())
    assert names - refused.keys() == names & {
        *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "megatron_config"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config", "init_lora_weights"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "ensure_weight_tying", "megatron_core"),
        "qalora_group_size",
    }


def test_rows_of_tied_embeddings_stand_in_the_file_once(tmp_path):
    save_adapter(converted("llama", trainable_token_indices=[3, 7]), tmp_path)
    change_config(tmp_path, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 7]})  # as PEFT
    assert read_adapter(tmp_path).tokens == {"model.embed_tokens": [3, 7]}


def test_initializations_that_leave_the_base_as_it_is_are_read(folder):
    for method in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        change_config(folder, init_lora_weights=method)
        assert read_adapter(folder).config["r"] == 4


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_adapter_whose_initial_values_peft_subtracted_is_read(method, tmp_path):
    theirs = peft.get_peft_model(
        toy("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=method)
    )
    theirs.peft_config["default"].init_lora_weights = True  # as in PEFT's documentation
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = method
    perturb(theirs).save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    lit = Lit(toy("llama"))
    convert(lit, adapter=str(tmp_path / "plain"))
    assert_peft_computes_the_same(lit, tmp_path / "plain")


def test_an_adapter_that_peft_began_as_loftq_on_a_plain_base_is_read(tmp_path):
    """As PEFT's replace_lora_weights_loftq, which needs a GPU: its decomposition of the quantization error."""
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    theirs = peft.get_peft_model(toy("llama"), config)
    for layer in (part for part in theirs.modules() if isinstance(part, peft.tuners.lora.Linear)):
        weight = layer.get_base_layer().weight.detach()
        factors = loftq_utils._low_rank_decomposition(weight - quantize(weight).dequantize(), reduced_rank=4)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = factors["R"], factors["L"]
    theirs.save_pretrained(tmp_path)
    lit = Lit(toy("llama"))
    convert(lit, adapter=str(tmp_path))
    assert_peft_computes_the_same(lit, tmp_path)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_of_peft_whose_base_changed_is_refused_by_its_start(method, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=method)
    peft.get_peft_model(toy("llama"), config).save_pretrained(tmp_path)
    module, lit = converted("llama"), Lit(toy("llama"))
    for load in (lambda: load_adapter(module, tmp_path), lambda: convert(lit, adapter=str(tmp_path))):
        with raises_in_one_line(
            ValueError, f"adapter_config.json: init_lora_weights='{method}': PEFT changed the base"
        ):
            load()


def test_another_architecture_is_refused_with_file_and_key(folder):
    message = r"adapter_model.safetensors: key 'base_model.model.model.layers.0.*has no (such )?layer"
    with pytest.raises(CheckpointMismatchError, match=message):
        load_adapter(converted("gpt2"), folder)
    with pytest.raises(CheckpointMismatchError, match=message):
        convert(toy("gpt2"), adapter=str(folder))
    with pytest.raises(CheckpointMismatchError, match=r"has no layer with an adapter there"):
        load_adapter(converted("llama", target_modules=["q_proj"]), folder)
    wider = toy("llama", intermediate_size=256)
    convert(wider, **ARGUMENTS)
    with pytest.raises(
        CheckpointMismatchError, match=r"a layer of 256 inputs and 64 outputs there.* lora_A \[4, 128\]"
    ):
        load_adapter(wider, folder)


def test_a_checkpoint_saved_after_load_adapter_loads(tmp_path, trainer):
    save_adapter(converted("llama", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}), tmp_path / "a")

    class OfToy(Lit):
        def __init__(self):
            super().__init__(toy("llama"))

    lit = OfToy()
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}}  # the folder has others
    fit = trainer(plugins=QLoRAPrecision(r=6, lora_alpha=3, **patterns), max_steps=1)
    fit.fit(lit)
    load_adapter(lit, tmp_path / "a")
    assert float(lit.model.model.layers[0].mlp.up_proj.lora_B.abs().max()) == 0
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = load_from_checkpoint(OfToy, tmp_path / "x.ckpt")
    assert_same_logits(again.model, lit.model)
    made, layers = ([(layer.r, layer.scaling) for layer in adapted_layers(each).values()] for each in (again, lit))
    assert made == layers


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(64, 64) for _ in range(2))})
        self.layers = nn.ModuleList([nn.Linear(64, 64)])
        self.config = {}  # for PEFT

    def forward(self, x):
        for layer in (*self.decoder["layers"], *self.layers):
            x = layer(x).tanh()
        return x


def test_a_rank_or_alpha_of_one_layer_reaches_no_other_in_peft(tmp_path):
    net = Repeated()
    patterns = {"rank_pattern": {r"decoder\.layers.*": 4}, "alpha_pattern": {r"decoder\.layers.*": 2}}
    convert(net, r=8, lora_alpha=3, lora_dropout=0.0, **patterns)
    assert (net.decoder["layers"][0].r, net.layers[0].r) == (4, 8)
    save_adapter(perturb(net), tmp_path)
    assert read_config(tmp_path)["rank_pattern"] == {r"^layers\.0": 8}
    base = Repeated()
    for name, layer in adapted_layers(net).items():
        base.get_submodule(name).load_state_dict({"weight": layer.decode(), "bias": layer.bias})
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(3, 64)
    torch.testing.assert_close(theirs(x), net(x), atol=1e-5, rtol=0)
    again = Repeated()
    convert(again, adapter=str(tmp_path))
    assert again.layers[0].r == 8 and again.layers[0].scaling == net.layers[0].scaling
    assert again.decoder["layers"][0].scaling == net.decoder["layers"][0].scaling


def test_layers_beside_a_transformers_model_come_back(tmp_path):
    class WithHead(Lit):
        def __init__(self):
            super().__init__(toy("llama"))
            torch.manual_seed(1)
            self.head = nn.Linear(64, 64)

    module = WithHead()
    convert(module, **ARGUMENTS, target_modules=["all-linear", "head"])
    perturb(module)
    save_adapter(module, tmp_path)
    again = WithHead()
    convert(again, adapter=str(tmp_path))
    x = torch.randn(3, 64)
    assert torch.equal(again.head.eval()(x), module.head.eval()(x))
    assert_same_logits(again.model, module.model)


def test_a_module_with_one_layer_comes_back(tmp_path):
    class One(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 64)

    module = One()
    again = One()
    again.load_state_dict(module.state_dict())
    convert(module, **ARGUMENTS)
    perturb(module)
    save_adapter(module, tmp_path)
    assert "base_model.model.net.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    convert(again, adapter=str(tmp_path))
    assert torch.equal(again.eval()(x := torch.randn(3, 64)), module(x))


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        ([], "2.running_mean, 2.running_var, 3.running_mean, ..."),
        (["2"], "3.running_mean, 3.running_var"),
        (["2", "3"], None),
    ],
    ids=str,
)
def test_changed_statistics_of_batch_norm_are_named(saved, names, tmp_path, recwarn):
    norms = (nn.BatchNorm1d(64) for _ in range(2))
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), *norms, nn.Linear(64, 64))
    convert(module, **ARGUMENTS, modules_to_save=saved)
    save_adapter(module, tmp_path)
    module(torch.randn(8, 64))
    assert not [each for each in recwarn if "buffers" in str(each.message)]
    save_adapter(module, tmp_path)
    found = [str(each.message) for each in recwarn if "buffers" in str(each.message)]
    text = f"The folder does not get the buffers that training changed: {names}. A Lightning checkpoint has them; or "
    assert found == ([] if names is None else [f"{text}{TRAIN_IN_FULL}."])


@pytest.mark.parametrize(
    ("ending", "is_encoder_decoder", "task_type"),
    [
        ("ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("ForConditionalGeneration", False, "CAUSAL_LM"),  # multimodal
        ("ForCausalLM", True, "CAUSAL_LM"),
        ("LMHeadModel", False, "CAUSAL_LM"),
        ("ForSequenceClassification", False, None),
    ],
)
def test_the_task_type_and_the_name_of_the_base(ending, is_encoder_decoder, task_type, tmp_path):
    model = type(f"Some{ending}", (nn.Sequential,), {})(nn.Linear(64, 64))
    model.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder, _name_or_path="someone/model")
    convert(model, **ARGUMENTS)
    save_adapter(model, tmp_path)
    config = read_config(tmp_path)
    assert (config["task_type"], config["base_model_name_or_path"]) == (task_type, "someone/model")


def test_peft_computes_a_model_whose_input_is_no_text(tmp_path):
    """PEFT's classes for language models would pass `input_ids` to it."""
    transformers = pytest.importorskip("transformers")
    part = {"d_model": 64, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32}
    part |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**part, **tokens)).eval()
    convert(model, **ARGUMENTS)
    base = merge(copy.deepcopy(model))
    save_adapter(perturb(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    inputs = {"input_features": torch.randn(2, 16, 32), "labels": ids()}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dora", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_layers_that_a_folder_lacks_compute_as_the_base_and_are_saved_so(dora, dtype, tmp_path):
    arguments = {**ARGUMENTS, "use_dora": dora}
    dense = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    first, both, again = (copy.deepcopy(dense) for _ in range(3))
    convert(first, **arguments, target_modules=["0"], use_rslora=True)
    save_adapter(perturb(first, scale=0.3), tmp_path / "first")
    convert(both, **arguments)
    perturb(both, scale=0.3, seed=1)
    load_adapter(both, tmp_path / "first")
    x = torch.randn(5, 64).to(dtype)
    dense[0].weight.data = both[0].decode() + delta(both[0]).to(dtype)
    dense[2].weight.data = both[2].decode()
    expected = dense(x)
    assert (both(x) - expected).norm() < (1e-5 if dtype is torch.float32 else 1e-2) * expected.norm()
    torch.testing.assert_close(both[0](x), first[0](x))
    perturb(both, scale=0.3, seed=2)
    for layer in (both[0], both[2]):
        assert layer.scaling == layer.config.scaling == 4.0
    save_adapter(both, tmp_path / "both")
    loaded = copy.deepcopy(again)
    convert(loaded, adapter=str(tmp_path / "both"), lora_dropout=0.0)
    convert(again, **arguments, use_rslora=True)
    again.load_state_dict(both.state_dict())
    for other in (loaded, again):
        torch.testing.assert_close(other(x), both(x))


def test_experts_that_a_folder_lacks_get_the_default_initialization(tmp_path):
    names = {"target_modules": ["all-linear"], "r": 2, "lora_dropout": 0.0}
    model, fresh = (made(qwen3_moe).requires_grad_(True) for _ in range(2))
    attention = copy.deepcopy(model)
    convert(attention, r=2, target_modules=["q_proj"])
    save_adapter(attention, tmp_path)
    convert(fresh, **names)
    convert(model, **names)
    load_adapter(perturb(model), tmp_path)
    stack, expected = (net.model.layers[0].mlp.experts.gate_up_proj_experts for net in (model, fresh))
    assert torch.equal(stack.lora_A, expected.lora_A) and not stack.lora_B.any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"lora_dropout": 0.0, "init_lora_weights": "gaussian", "trainable_token_indices": [3, 7]},
        {"lora_dropout": 0.3, "use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2}},
        {"lora_dropout": 0.1, "alpha_pattern": {"v_proj": 3}, "modules_to_save": ["norm"], "quant_type": "fp4"},
        {"lora_dropout": 0.1, "rank_pattern": {"q_proj": 8, r".*1\.mlp.*": 2}, "alpha_pattern": {"o_proj": 0.1}},
    ],
    ids=str,
)
def test_a_folder_that_is_read_and_written_again_has_the_same_bytes(arguments, tmp_path):
    lit = Lit(toy("llama"))
    convert(lit, r=4, **arguments)
    save_adapter(perturb(lit), tmp_path / "a")
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "b")
    assert_same_folders(tmp_path / "a", tmp_path / "b")


def test_a_layer_whose_name_ends_another_name_is_alone_in_the_folder_too(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(64, 64), "x": nn.ModuleDict({"a": nn.Linear(64, 64)})})
    dense = copy.deepcopy(net)
    assert convert(net, r=4, target_modules=["a"], exclude_modules=["x.a"]).converted == ["a"]
    save_adapter(net, tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path)
    names = [name for name, part in theirs.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    assert names == ["base_model.model.a"]


@pytest.mark.parametrize("in_full", [[], ["x.base_layer"]])
def test_a_layer_with_the_name_of_pefts_wrapped_layer_comes_back(in_full, tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(OrderedDict(x=nn.Sequential(OrderedDict(base_layer=nn.Linear(64, 64))), y=nn.Linear(64, 64)))
    arguments = {"r": 4, "lora_dropout": 0.0, "modules_to_save": in_full}
    trained, loaded = (copy.deepcopy(dense) for _ in range(2))
    convert(trained, **arguments)
    save_adapter(perturb(trained), tmp_path)
    convert(loaded, **arguments)
    load_adapter(loaded, tmp_path)
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), trained(x)) and not torch.allclose(trained(x), dense(x), atol=0.1)


def test_modules_that_have_no_place_in_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter\. Convert it first"):
        save_adapter(toy("llama"), tmp_path)
    net = nn.ModuleDict({"a": nn.Linear(64, 64)})
    convert(net, r=4)
    net.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"of the ModuleDict itself trains.*Freeze it"):
        save_adapter(net, tmp_path)
    convert(layer := nn.Linear(64, 64), r=4)
    with pytest.raises(ValueError, match=r"PEFT can't adapt a layer that is the model itself\. Use a Lightning"):
        save_adapter(layer, tmp_path)


def test_what_a_folder_has_no_place_for_is_named(tmp_path):
    lit = Lit(toy("llama"))
    lit.head = nn.Linear(64, 64)
    convert(lit, **ARGUMENTS, modules_to_save=["head"])
    message = "The folder gets the adapters of 'model', a LlamaForCausalLM, and not what trains outside of it: head. A"
    with pytest.warns(UserWarning, match=f"^{message}"):
        save_adapter(lit, tmp_path)
    for other in ({"quant_type": "fp4"}, {"init_lora_weights": "gaussian"}, {"use_dora": True}):
        net = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        convert(net["a"], r=4)
        convert(net["b"], r=4, **other)
        ((key, value),) = other.items()
        default = getattr(QLoRAConfig(), key)
        with raises_in_one_line(ValueError, rf"^a has {key}={default!r} and b has {key}={value!r}: an adapter folder"):
            save_adapter(net, tmp_path)


REPLACED = {  # arguments that a run with adapter=FOLDER takes from the folder, or that do not apply to it
    "r": 7,
    "lora_alpha": 5,
    "target_modules": ["4"],
    "exclude_modules": ["0"],
    "modules_to_save": ["2"],
    "trainable_token_indices": [1],
    "init_lora_weights": "gaussian",
    "use_rslora": False,
    "use_dora": True,
    "rank_pattern": {"4": 3},
    "alpha_pattern": {"4": 3},
    "adapter": "the folder",
}
KEPT = {  # and those that stay as they are passed
    "quant_type": "fp4",
    "double_quant": False,
    "block_size": 128,
    "compute_dtype": "bf16",
    "lora_dropout": 0.5,
    "paged_optimizer": False,
    "gradient_checkpointing": True,
    "checkpoint": "full",
    "deferred_logits": False,
}


def test_each_argument_is_kept_or_taken_from_the_folder(tmp_path):
    """A new argument belongs in one of the two lists, and `config_of_adapter` does what its list says."""
    defaults = vars(QLoRAConfig())
    assert not REPLACED.keys() & KEPT.keys() and REPLACED.keys() | KEPT.keys() == defaults.keys()
    module = Classifier()
    convert(module, r=2, lora_alpha=3, use_rslora=True, target_modules=["0"])
    save_adapter(perturb(module), tmp_path)
    passed = QLoRAConfig(**KEPT | REPLACED | {"adapter": str(tmp_path)})
    assert all(getattr(passed, name) != defaults[name] for name in KEPT)
    of_folder = {"r": 2, "lora_alpha": 3, "target_modules": r"net\.0", "use_rslora": True}
    assert vars(config_of_adapter(Parts.of(Classifier()), read_adapter(tmp_path), passed)) == {
        **defaults,
        **of_folder,
        **KEPT,
    }
