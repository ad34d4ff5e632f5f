"""Merging into a folder: the same weights as merging in memory, and what is refused."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora import CheckpointMismatchError, convert, merge, save_adapter
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.kernels.rounding import round_stochastically
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.merge_folder import _copy_other_files, merge_folder
from tests.adapters.folders import adapter_of
from tests.conftest import elsewhere, raises_in_one_line
from tests.experts import test_experts as experts
from tests.toys import ARGUMENTS, Lit, assert_equal, converted, delta, logits, perturb, save_in_4_bits, toy

transformers = pytest.importorskip("transformers")


@pytest.fixture
def base(tmp_path):
    def save(name, **arguments):
        model = toy(name)
        model.save_pretrained(tmp_path / "base", **arguments)
        (tmp_path / "base/tokenizer.json").write_text("{}")
        return model, tmp_path / "base"

    return save


@pytest.fixture
def folder(base):
    return base("llama")[1]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def adapter():
    return adapter_of(converted("llama"))


@pytest.fixture
def refused(out):
    def assert_refused(kind, message, *arguments):
        with raises_in_one_line(kind, message):
            merge_folder(*arguments, out)
        assert not out.exists()

    return assert_refused


def load(name, folder, **arguments):
    return type(toy(name)).from_pretrained(folder, **arguments).eval()


def assert_merged(folder, lit, name="llama"):
    torch.testing.assert_close(logits(load(name, folder)), logits(lit.model), atol=1e-5, rtol=0)


def assert_same_weights(merged, expected):
    """Those of a model that was loaded from the folder, or those of one of its files, are those merged in memory."""
    state = merged if isinstance(merged, dict) else merged.state_dict()
    expected = expected.state_dict()
    assert_equal(state, {key: expected[key] for key in state})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama", {}),
        ("gpt2", {"use_dora": True, "rank_pattern": {"c_attn": 8}, "alpha_pattern": {"c_attn": 3}}),
        ("bert", {}),
        ("t5", {"use_dora": True}),
        ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}}),
        ("gpt2", {"modules_to_save": ["lm_head"]}),
        ("t5", {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_merged_folder_is_the_merged_module(name, arguments, base, tmp_path, out):
    lit, (_, folder) = converted(name, **arguments), base(name, max_shard_size="50KB")
    save_adapter(lit, tmp_path / "adapter")
    merge_folder(folder, read_adapter(tmp_path / "adapter"), out)
    others = {path.name for path in folder.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in out.iterdir()} == others | {"model.safetensors"}
    assert_merged(out, lit, name)
    assert_same_weights(load(name, out), merge(lit).model)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "auto"), ("gpt2", "fp16")])
def test_16_bit_weights_are_rounded_as_in_memory(name, dtype, tmp_path, out):
    model = toy(name).bfloat16()
    model.save_pretrained(tmp_path / "base")
    lit = Lit(model)
    convert(lit, **ARGUMENTS, modules_to_save=["norm", "lm_head"] if name == "llama" else ["ln_f"])
    perturb(lit)
    merge_folder(tmp_path / "base", adapter_of(lit), out, dtype=dtype)
    assert_same_weights(load(name, out), merge(lit, dtype=dtype).model)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_a_tied_weight_that_peft_trained_separately(modules, tmp_path, out, refused):
    """In a folder an output embedding can be untied; a changed embedding with an unchanged output can't be stored."""
    peft = pytest.importorskip("peft")
    model = toy("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)
    trained = perturb(peft.get_peft_model(model, config))
    trained.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    if "lm_head" not in modules:
        refused(CheckpointMismatchError, r"was trained separately from lm_head\.weight", tmp_path / "base", adapter)
        return
    merge_folder(tmp_path / "base", adapter, out, base="float")
    torch.testing.assert_close(logits(load("llama", out)), logits(trained), atol=1e-5, rtol=0)


def test_on_the_float_base_and_in_another_type(base, out):
    lit, (model, folder) = converted("llama"), base("llama")
    merge_folder(folder, adapter_of(lit), out, dtype="bf16", base="float")
    key = "model.layers.0.self_attn.q_proj"
    expected = (model.get_submodule(key).weight + delta(lit.model.get_submodule(key))).detach()
    merged = load("llama", out)
    assert torch.equal(merged.get_submodule(key).weight, round_stochastically(expected, torch.bfloat16))
    assert merged.config.dtype == torch.bfloat16


def test_models_that_were_trained_without_the_head_of_the_folder_or_with_a_new_one(base, tmp_path):
    llama, bert = base("llama")[1], tmp_path / "bert"
    toy("bert").save_pretrained(bert)
    for folder, name, more in (
        (llama, "LlamaModel", {}),
        (tmp_path / "LlamaModel", "LlamaForCausalLM", {}),
        (llama, "LlamaForSequenceClassification", {"num_labels": 5, "pad_token_id": 0}),
        (bert, "BertForTokenClassification", {"num_labels": 3}),
        (bert, "BertForQuestionAnswering", {}),
    ):
        kind = getattr(transformers, name)
        model = kind.from_pretrained(folder, **more)
        convert(model, **ARGUMENTS)
        perturb(model)
        merge_folder(folder, adapter_of(model), tmp_path / name)
        merged = kind.from_pretrained(tmp_path / name)
        assert_same_weights(merged, merge(model))
        assert merged.state_dict().keys() == model.state_dict().keys()


def test_another_base_than_that_of_the_training_is_refused(adapter, tmp_path, out, refused):
    toy("llama", seed=1).save_pretrained(tmp_path / "other")
    refused(
        CheckpointMismatchError,
        r"other: model.layers.0.* has other 4-bit weights than in the",
        tmp_path / "other",
        adapter,
    )
    merge_folder(tmp_path / "other", adapter, out, base="float")


def test_a_base_that_was_trained_in_another_type(folder, out):
    lit = Lit(load("llama", folder, dtype=torch.bfloat16))
    convert(lit, **ARGUMENTS)
    perturb(lit)
    merge_folder(folder, adapter_of(lit), out)
    merged = load("llama", out)
    assert_same_weights(merged, merge(lit).model)
    assert {value.dtype for value in merged.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_code_of_a_folder_runs_only_if_the_user_says_so(in_4_bits, base, tmp_path, out, refused):
    model, folder = base("llama")
    if in_4_bits:
        folder = save_in_4_bits(type(model), folder, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    # The first is no name in transformers, and comes before the one that is.
    names = dict.fromkeys(("AutoModelForNothing", "AutoModelForImageTextToText"), "ours.Model")
    names["AutoConfig"] = "ours.Config"
    changed = {**config, "model_type": "ours", "architectures": ["Model"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "ours.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'ours'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    lit = converted("llama")
    folder = folder.rename(tmp_path / ("long" * 50))  # transformers' text has it three times, and what to do last
    refused(
        ValueError, r"long: .*, and pass trust_remote_code=True to run them; .*=True` to allow", folder, adapter_of(lit)
    )
    merge_folder(folder, adapter_of(lit), out, trust_remote_code=True)
    assert_same_weights(load_file(out / "model.safetensors"), merge(lit).model)
    assert (out / "ours.py").is_file()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_4_bit_base(name, base, tmp_path, out):
    lit, (_, folder) = converted(name), base(name)
    save_in_4_bits(type(toy(name)), folder, tmp_path / "bnb")
    merge_folder(tmp_path / "bnb", adapter_of(lit), out, dtype="fp32")
    assert_merged(out, lit, name)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    # Layers without an adapter are decoded too.
    few = converted(name, target_modules=["down_proj", "c_fc"][name == "gpt2" :][:1])
    merge_folder(tmp_path / "bnb", adapter_of(few), tmp_path / "out2", dtype="fp32")
    assert load(name, tmp_path / "out2").dtype == torch.float32


def shard(folder: Path, number: int) -> Path:
    return next(folder.glob(f"model-{number:05}-of-*.safetensors"))


def test_a_broken_base_is_named_in_one_line(base, adapter, monkeypatch, refused):
    model, folder = base("llama", max_shard_size="50KB")
    shard(folder, 2).unlink()
    refused(FileNotFoundError, r"model-00002-of-\d+.safetensors: this shard is missing;", folder, adapter)
    (folder / "model.safetensors.index.json").unlink()
    state = model.state_dict()
    first, other = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
    weight = state[f"{first}.weight"]
    inf = weight.index_fill(0, torch.tensor([1]), float("inf"))
    for name, value, message in (
        (f"{first}.weight", inf, f"base: {first}: weight: holds NaN or Inf"),
        (f"{other}.weight", inf, f"base: {other}: weight: holds NaN or Inf"),
        (
            f"{first}.weight",
            weight[0].clone(),
            rf"base: '{first}.weight' has shape \[64\], and a LlamaForCausalLM with",
        ),
        ("model.norm.weight", None, "no tensor for 'model.norm.weight' of a LlamaForCausalLM, and the adapter has no"),
    ):
        changed = {key: tensor for key, tensor in {**state, name: value}.items() if tensor is not None}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        refused(ValueError, message, folder, adapter)

    for kind in (ImportError, RuntimeError):
        error = Mock(side_effect=kind("install\nit"))
        monkeypatch.setattr(type(model), "from_pretrained", error)
        refused(ValueError, f"base: transformers can't load it: {kind.__name__}: install it$", folder, adapter)
    monkeypatch.undo()
    config = json.loads((folder / "config.json").read_text())
    for values, message in (
        ({"hidden_size": "64"}, "base: transformers can't read its config: .*'hidden_size' expected int, got str"),
        ({"quantization_config": [1]}, "base: transformers can't read its config: AttributeError: 'list' object"),
        ({"quantization_config": {"quant_method": ["a"]}}, r"base: is in \['a'\]\. transformers can dequantize"),
        (
            {"hidden_act": "no"},
            r"base: transformers makes no LlamaForCausalLM \(LlamaForCausalLM: KeyError: 'no'\). Lo",
        ),
        ({"architectures": [5], "hidden_act": "no"}, r"base: transformers makes no 5 \(AutoModel: KeyError"),
    ):
        (folder / "config.json").write_text(json.dumps(config | values))
        refused(ValueError, message, folder, adapter)
    folder /= "model.safetensors"
    refused(
        FileNotFoundError,
        "model.safetensors: is no folder. Pass the folder of the model, or a GGUF file.",
        folder,
        adapter,
    )


def test_another_architecture_and_a_used_output_are_refused(folder, adapter, tmp_path, refused):
    message = r"key 'base_model.model.transformer.h.0.*lora_A.weight' do"
    refused(CheckpointMismatchError, message, folder, adapter_of(converted("gpt2")))
    wider = toy("llama", intermediate_size=256)
    convert(wider, **ARGUMENTS)
    message = r"lora_A.weight' does not fit: the LlamaForCausalLM has a layer of 64 inputs and 128"
    refused(CheckpointMismatchError, message, folder, adapter_of(wider))
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        merge_folder(folder, adapter, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    experts.made(lambda: experts.qwen3_moe(num_experts=5)).save_pretrained(tmp_path / "five")
    convert(six := experts.made(experts.qwen3_moe), r=2)
    refused(
        CheckpointMismatchError,
        r"mlp\.experts\..* has 5 experts of .* lora_A \[12, ",
        tmp_path / "five",
        adapter_of(six),
    )


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_killed_merge_leaves_no_output_and_can_be_run_again(folder, out, tmp_path, monkeypatch):
    lit = converted("llama")
    save_adapter(lit, tmp_path / "adapter")
    arguments = ["merge", str(tmp_path / "adapter"), str(out), "--base_model", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(type(lit.model), "save_pretrained", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
        process.start()
        process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    merge_folder(folder, read_adapter(tmp_path / "adapter"), out)
    assert {"adapter", "base", "out"} == {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}


def test_the_default_device_has_no_effect(folder, adapter, tmp_path, out):
    merge_folder(folder, adapter, tmp_path / "expected", dtype="bf16")
    with elsewhere():
        merge_folder(folder, adapter, out, dtype="bf16")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()


def test_files_outside_of_the_folder_are_refused(base, adapter, tmp_path, out, refused):
    _, folder = base("llama", max_shard_size="50KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b.safetensors"):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], "lm_head.weight": name}}))
        refused(ValueError, r"index.json: .*'lm_head.weight' is '.*', which is not a file of this", folder, adapter)
    path.write_text(json.dumps(index))
    (folder / "extra.txt").write_text("secret")
    for name in ("tokenizer.json", shard(folder, 1).name, "config.json", "extra.txt"):
        (folder / name).rename(tmp_path / "secret")
        (folder / name).symlink_to(tmp_path / "secret")
        refused(ValueError, rf"{name}: is a symbolic link to .*secret, outside of the folder", folder, adapter)
        (tmp_path / "secret").rename(folder / name)
    assert not out.exists()


def test_weights_of_the_base_are_not_copied(tmp_path, out):
    source = tmp_path / "source"
    (source / "code").mkdir(parents=True)
    out.mkdir()
    (out / "config.json").write_text("old")
    endings = ("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "safetensors.index.json")
    for name in (*(f"model.{ending}" for ending in endings), "config.json", "ours.py", "tokenizer.json"):
        (source / name).write_text("new")
    _copy_other_files(source, out)
    copied = {"config.json": "old", "ours.py": "new", "tokenizer.json": "new"}
    assert {path.name: path.read_text() for path in out.iterdir()} == copied


def test_a_snapshot_of_a_hub_cache_consists_of_links(folder, adapter, tmp_path, out):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/abc").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / f"blobs/{number}")
        (repository / "snapshots/abc" / path.name).symlink_to(f"../../blobs/{number}")
    merge_folder(repository / "snapshots/abc", adapter, out)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_base_that_only_the_file_names_is_not_downloaded(tmp_path, monkeypatch, capsys, out):
    import huggingface_hub

    asked = []
    lit = converted("llama")

    def download(name, local_files_only=False, **_):
        asked.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    lit.model.config._name_or_path = "org/name"
    save_adapter(lit, tmp_path / "adapter")
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "adapter"), str(out)])
    assert "Or download it by its name: base_model='org/name' (--base_model org/name)." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "adapter"), str(out), "--base_model", "org/name"])
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (experts.llama4, "quantized"),
        (experts.llama4, "float"),
        (experts.gpt_oss, "quantized"),
        (experts.qwen3_moe, "float"),
        (experts.jetmoe, "quantized"),
    ],
)
def test_experts_beside_linear_layers(build, kind, tmp_path, out):
    """Llama 4: the folder names the shared experts as parameters too, and the stacks are [experts, in, out]."""
    model_class = type(experts.made(build))
    experts.made(build).save_pretrained(tmp_path / "base")
    model = model_class.from_pretrained(tmp_path / "base")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    convert(model, r=2, lora_dropout=0.0)
    save_adapter(perturb(model), tmp_path / "adapter")
    merge_folder(tmp_path / "base", read_adapter(tmp_path / "adapter"), out, base=kind)
    merged = model_class.from_pretrained(out).state_dict()
    for name, layer in adapted_layers(model).items():
        key = name if isinstance(layer, QLoRAExperts) else f"{name}.weight"
        base = layer.decode() if kind == "quantized" else weights[key]
        torch.testing.assert_close(merged[key], base + delta(layer))


def test_wrong_choices_are_named_before_anything_is_read(tmp_path, out):
    for argument in ("dtype", "base"):
        with pytest.raises(ValueError, match=f"{argument}='int8': must be one of"):
            merge_folder(tmp_path, None, out, **{argument: "int8"})
