import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file

from lightning_qlora import (
    QLoRALinear,
    QLoRAPrecision,
    convert,
    load_from_checkpoint,
    quantize,
    save_adapter,
    save_quantized,
)
from lightning_qlora.files import WeightFolder
from lightning_qlora.linear import CheckpointMismatchError
from tests.conftest import Classifier, loader
from tests.toys import NAMES, Lit, ids, logits, perturb, toy

transformers = pytest.importorskip("transformers", minversion="5")
ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture
def folder(tmp_path):
    def save(name, **arguments):
        changes = arguments.pop("changes", {})
        toy(name, **changes).save_pretrained(tmp_path / "base", **{"max_shard_size": "60KB", **arguments})
        return tmp_path / "base"

    return save


def class_of(name):
    return type(toy(name))


class InConfigureModel(LightningModule):
    """As Lightning's documentation has it for large models."""

    def __init__(self, kind, folder, **arguments):
        super().__init__()
        self.kind, self.folder, self.arguments, self.model = kind, folder, arguments, None

    def configure_model(self):
        if self.model is None:
            self.model = self.kind.from_pretrained(self.folder, **self.arguments)

    training_step, train_dataloader, configure_optimizers = (
        Lit.training_step, Lit.train_dataloader, Lit.configure_optimizers,
    )  # fmt: skip

    def predict_step(self, batch, batch_idx):
        return None

    predict_dataloader = train_dataloader


def packed(model):
    return {name: layer.packed_weight for name, layer in model.named_modules() if isinstance(layer, QLoRALinear)}


def same_bytes(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        ours, theirs = a[name].bnb_state_dict(), b[name].bnb_state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_configure_model_equals_conversion_after_loading(name, folder, trainer):
    path = folder(name)
    plugin = QLoRAPrecision(**ARGUMENTS)
    streamed = InConfigureModel(class_of(name), path)
    seen = []
    kind = class_of(name)
    original = kind.from_pretrained
    streamed.kind = type("Kind", (), {"from_pretrained": lambda f: seen.append(original(f)) or seen[0]})
    trainer(plugins=plugin).predict(streamed)
    loaded = Lit(kind.from_pretrained(path))
    report = convert(loaded, **ARGUMENTS)
    same_bytes(packed(streamed.model), packed(loaded.model))
    assert torch.equal(logits(streamed.model), logits(loaded.model))
    assert plugin.report.converted == report.converted and plugin.report.skipped == report.skipped
    assert plugin.report.trained_in_full == report.trained_in_full
    assert plugin.report.bytes_before == report.bytes_before and plugin.report.bytes_after == report.bytes_after
    frozen = {n: p.requires_grad for n, p in streamed.named_parameters()}
    assert frozen == {n: p.requires_grad for n, p in loaded.named_parameters()}
    assert not streamed.model.__dict__.keys() & {"hf_quantizer", "is_quantized"}
    streamed.to(torch.bfloat16)


def test_weights_are_quantized_before_from_pretrained_returns(folder, trainer):
    class Looking(InConfigureModel):
        def configure_model(self):
            super().configure_model()
            self.found = len(packed(self.model))

    lit = Looking(transformers.AutoModelForCausalLM, folder("llama"))
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=2).fit(lit)
    assert lit.found == 14
    assert any(bool(layer.lora_B.any()) for layer in lit.model.modules() if isinstance(layer, QLoRALinear))


def test_init_context_and_a_head_of_ones_own(folder, trainer):
    class WithHead(Lit):
        def __init__(self, path):
            super().__init__(transformers.AutoModel.from_pretrained(path))
            self.head = torch.nn.Linear(64, 64)

        def training_step(self, batch, batch_idx):
            return self.head(self.model(input_ids=ids()).last_hidden_state).square().mean()

    path, plugin = folder("llama"), QLoRAPrecision(**ARGUMENTS)
    with plugin.init():
        lit = WithHead(path)
    assert len(packed(lit)) == 14
    trainer(plugins=plugin, max_steps=1).fit(lit)
    assert len(packed(lit)) == 15 and len(plugin.report.converted) == 15
    trainer(plugins=QLoRAPrecision(), max_steps=1).fit(lit)
    assert len(packed(lit)) == 15


def test_outside_of_the_context_nothing_changes(folder):
    path, plugin = folder("llama"), QLoRAPrecision(**ARGUMENTS)
    with plugin.init():
        pass
    assert not packed(transformers.AutoModelForCausalLM.from_pretrained(path))


def test_names_apply_and_may_fit_another_part(folder):
    path = folder("llama")
    excluded = ["layers.0.self_attn.q_proj"]
    with QLoRAPrecision(**ARGUMENTS, target_modules=["q_proj", "query"], exclude_modules=excluded).init():
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert list(packed(model)) == ["model.layers.1.self_attn.q_proj"]


def test_tied_weights_stay_tied(folder):
    path = folder("llama", changes={"tie_word_embeddings": True})
    with QLoRAPrecision(**ARGUMENTS, target_modules=["q_proj", "lm_head"]).init():
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(packed(model)) == 2


def test_a_class_without_the_head_and_one_with_a_new_head(folder):
    path = folder("llama")
    with QLoRAPrecision(**ARGUMENTS).init():
        body = transformers.AutoModel.from_pretrained(path)
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    assert len(packed(body)) == len(packed(judge)) == 14
    assert not judge.score.weight.is_meta and judge.score.weight.std() > 0


def test_a_checkpoint_of_a_streamed_model_comes_back(folder, trainer, tmp_path):
    path = folder("llama")

    class Ours(InConfigureModel):
        def __init__(self):
            super().__init__(transformers.LlamaForCausalLM, path)

    lit = Ours()
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=2)
    run.fit(lit)
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = load_from_checkpoint(Ours, tmp_path / "x.ckpt")
    assert torch.equal(logits(again.model), logits(lit.model))
    resumed = Ours()
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=2).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(logits(resumed.model), logits(lit.model))


def test_with_an_adapter(folder, trainer, tmp_path):
    path = folder("llama")
    lit = Lit(transformers.LlamaForCausalLM.from_pretrained(path))
    convert(lit, **ARGUMENTS, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    save_adapter(perturb(lit), tmp_path / "adapter")
    streamed = InConfigureModel(transformers.LlamaForCausalLM, path)
    trainer(plugins=QLoRAPrecision(adapter=str(tmp_path / "adapter"))).predict(streamed)
    assert len(packed(streamed)) == 4
    assert torch.equal(logits(streamed.model), logits(lit.model))


# ---- bitsandbytes' folders


def bnb_config(**changes):
    pytest.importorskip("bitsandbytes")
    defaults = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    defaults["llm_int8_skip_modules"] = ["lm_head", "classifier"]
    return transformers.BitsAndBytesConfig(**{**defaults, **changes})


@pytest.fixture
def bnb_folder(folder, tmp_path):
    """A folder as transformers and bitsandbytes write it."""

    def save(name, **changes):
        config = bnb_config(**changes)
        model = class_of(name).from_pretrained(folder(name), quantization_config=config, device_map="cpu")
        model.save_pretrained(tmp_path / "bnb")
        return tmp_path / "bnb"

    return save


def tensors(folder):
    found = WeightFolder(folder)
    return found.tensors(list(found.entries))


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": False},
        {"llm_int8_skip_modules": None},  # transformers' own choice: BERT's head is in 4 bits
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bnb_folder_to_ours_to_folder_bytes_equal(name, changes, bnb_folder, tmp_path):
    path = bnb_folder(name, **changes)
    with QLoRAPrecision(**ARGUMENTS).init():
        model = class_of(name).from_pretrained(path)
    convert(model, **ARGUMENTS)
    assert packed(model)
    save_quantized(Lit(model), tmp_path / "ours")
    same_tensors(tensors(path), tensors(tmp_path / "ours"))
    theirs = class_of(name).from_pretrained(tmp_path / "ours", device_map="cpu")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bnb_layers_in_init_are_taken_over(name, bnb_folder, trainer, tmp_path):
    """A user's own BitsAndBytesConfig, or a 4-bit folder loaded in __init__: bitsandbytes' layers reach conversion."""
    path = bnb_folder(name)
    lit = Lit(class_of(name).from_pretrained(path, device_map="cpu"))
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(lit)
    assert packed(lit) and "Linear4bit" not in repr(lit)
    assert not (name == "t5" and any("wo" in layer for layer in packed(lit)))  # dense in the folder, dense here
    save_quantized(lit, tmp_path / "ours")
    frozen = {key: value for key, value in tensors(path).items() if not key.startswith("classifier")}
    ours = tensors(tmp_path / "ours")
    same_tensors(frozen, {key: ours[key] for key in frozen})


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("init", [True, False])
def test_layers_left_alone_go_out_in_the_4_bits_they_came_in(name, init, bnb_folder, tmp_path):
    """An output embedding and a head in 4 bits, taken over by us or loaded by bitsandbytes; trained, they go dense."""
    path = bnb_folder(name, llm_int8_skip_modules=[])
    kind, head = class_of(name), {"llama": "lm_head", "bert": "classifier"}[name]
    if init:
        with QLoRAPrecision(**ARGUMENTS).init():
            model = kind.from_pretrained(path)
    else:
        model = kind.from_pretrained(path, device_map="cpu")
    convert(model, **ARGUMENTS)
    assert type(model.get_submodule(head)) is torch.nn.Linear
    save_quantized(model, tmp_path / "ours")
    same_tensors(tensors(path), tensors(tmp_path / "ours"))
    with torch.no_grad():
        model.get_submodule(head).weight += 1
    save_quantized(model, tmp_path / "trained")
    assert tensors(tmp_path / "trained")[f"{head}.weight"].dtype == torch.float32
    theirs = kind.from_pretrained(tmp_path / "trained", device_map="cpu")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=0)


def test_another_storage_type_holds_the_same_bytes(bnb_folder, tmp_path):
    path = bnb_folder("llama", bnb_4bit_quant_storage="bfloat16")
    with QLoRAPrecision(**ARGUMENTS).init():
        model = transformers.LlamaForCausalLM.from_pretrained(path)
    convert(model, **ARGUMENTS)
    save_quantized(model, tmp_path / "ours")
    theirs, ours = tensors(path), tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = value.dtype == ours[key].dtype
        assert torch.equal(value if same else value.view(torch.uint8).view(-1, 1), ours[key]), key


def distilbert():
    config = transformers.DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=128, num_labels=3)
    return transformers.DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize(("make", "dense"), [(lambda: toy("t5"), ".wo"), (distilbert, "")])
def test_what_transformers_must_be_told_to_leave_dense(make, dense, tmp_path):
    """T5's `wo`, which transformers never takes in 4 bits; and a dense "classifier" beside a 4-bit "pre_classifier"."""
    pytest.importorskip("bitsandbytes")
    model = make()
    convert(model, **ARGUMENTS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_quantized(model, tmp_path / "ours")
    told = [str(warning.message) for warning in said if "transformers keeps" in str(warning.message)]
    assert len(told) == bool(dense) and all("4 of the 4-bit layers dense" in message for message in told)
    theirs = type(model).from_pretrained(tmp_path / "ours", device_map="cpu").eval()
    in_4_bits = {name for name, layer in theirs.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert in_4_bits == {name for name in packed(model) if not dense or not name.endswith(dense)}
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


def test_ours_is_what_bitsandbytes_writes(folder, bnb_folder, tmp_path):
    path = bnb_folder("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    convert(model, **ARGUMENTS)
    save_quantized(model, tmp_path / "ours")
    same_tensors(tensors(path), tensors(tmp_path / "ours"))
    assert not hasattr(model.config, "quantization_config")


def test_layers_that_are_not_chosen_are_decoded(bnb_folder):
    path = bnb_folder("gpt2")
    with QLoRAPrecision(**ARGUMENTS, target_modules=["c_attn"]).init():
        model = transformers.GPT2LMHeadModel.from_pretrained(path)
    assert len(packed(model)) == 2
    for name in ("mlp.c_fc", "attn.c_proj"):  # the second is square
        dense = toy("gpt2").transformer.h[0].get_submodule(name).weight
        expected = quantize(dense.T.contiguous()).dequantize().T
        assert torch.equal(model.transformer.h[0].get_submodule(name).weight, expected)


def test_starts_that_need_the_float_weight_are_refused(bnb_folder):
    path = bnb_folder("llama")
    message = r"layers.0.*: init_lora_weights='pissa' starts from the float weight"
    with pytest.raises(ValueError, match=message):
        convert(
            transformers.LlamaForCausalLM.from_pretrained(path, device_map="cpu"),
            **ARGUMENTS,
            init_lora_weights="pissa",
        )
    with pytest.raises(ValueError, match=message), QLoRAPrecision(**ARGUMENTS, init_lora_weights="pissa").init():
        transformers.LlamaForCausalLM.from_pretrained(path)


def test_nan_in_a_weight_is_named(tmp_path):
    model = toy("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: weight: holds NaN"),
        QLoRAPrecision(**ARGUMENTS).init(),
    ):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_int4_cannot_be_saved_for_bitsandbytes(tmp_path):
    model = toy("llama")
    convert(model, **ARGUMENTS, quant_type="int4")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: quant_type 'int4' is none of"):
        save_quantized(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="holds no converted transformers model"):
        save_quantized(toy("llama"), tmp_path / "x")


def shard(folder, number=2):
    return next(folder.glob(f"model-{number:05}-of-*.safetensors"))


def foreign_quant_type(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    key = next(key for key in state if "bitsandbytes__nf4" in key)
    meta = json.loads(bytes(state[key].tolist()))
    state[key] = torch.tensor(list(json.dumps({**meta, "quant_type": "af4"}).encode()), dtype=torch.uint8)

    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: shard(f).unlink(), r"model-00002-of-\d+.safetensors: this shard is missing; .* holds 'model.layers"),
        (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), r"model-00002-of-\d+.safetensors: truncated: 'mo"),
    ],
)
def test_a_broken_folder_is_named(harm, message, folder, trainer):
    path = folder("llama")
    harm(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(
            InConfigureModel(transformers.LlamaForCausalLM, path)
        )
    assert "\n" not in str(error.value)


def test_a_foreign_quant_type_is_named(bnb_folder, trainer):
    path = bnb_folder("llama")
    foreign_quant_type(path)
    with pytest.raises(ValueError, match=r"safetensors: 'model.layers.*: quant_type='af4'") as error:
        trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(
            InConfigureModel(transformers.LlamaForCausalLM, path)
        )
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_architecture(folder, trainer, tmp_path):
    lit = Lit(toy("gpt2"))
    convert(lit, **ARGUMENTS)
    save_adapter(lit, tmp_path / "adapter")
    with pytest.raises(CheckpointMismatchError, match=r"adapter_model.safetensors: key .* has no such layer"):
        trainer(plugins=QLoRAPrecision(adapter=str(tmp_path / "adapter")), max_steps=1).fit(
            InConfigureModel(transformers.LlamaForCausalLM, folder("llama"))
        )


def test_200_mb_in_shards_never_stand_in_memory(tmp_path):
    """Peak of anonymous memory above the start: at most 0.40 of the 16-bit size, adapters included."""
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=8000,
        num_key_value_heads=12, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    del model
    script = Path(__file__).with_name("memory_of_loading.py")
    for r, share in ((8, 0.32), (64, 0.40)):
        run = subprocess.run(
            [sys.executable, script, tmp_path, str(r)], check=True, capture_output=True, text=True,
            cwd=script.parents[1], env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
        layers, peak = re.search(r"(\d+) layers, peak ([\d.]+) MB", run.stdout).groups()
        assert int(layers) == 84
        assert float(peak) * 2**20 <= share * size, f"r={r}"


def test_a_meta_module_loaded_later_is_quantized_and_one_never_loaded_is_refused(tmp_path, trainer):

    save_file(Classifier().net.state_dict(), tmp_path / "net.safetensors")

    class Later(Classifier):
        """torch's own way: memory-mapped tensors take the place of the meta ones; conversion lets each go."""

        def __init__(self, load=True):
            with torch.device("meta"):
                super().__init__()
            self.load, self.made = load, False

        def configure_model(self):
            if self.load and not self.made:
                self.net.load_state_dict(load_file(tmp_path / "net.safetensors"), assign=True)
                self.made = True

    lit, expected = Later(), Classifier()
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(lit, loader())
    convert(expected, **ARGUMENTS)
    same_bytes(packed(lit), packed(expected))
    with pytest.raises(ValueError, match=r"net.0: its weight is on the meta device"):
        trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(Later(load=False), loader())
