"""Classification heads, and layers that a load reported as newly initialized, train in full."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRALinear, QLoRAPrecision, convert, load_from_checkpoint, merge, save_adapter
from lightning_qlora.conversion.notes import LARGE
from tests.conftest import make_trainer
from tests.toys import BERT, LLAMA, Lit, ids, toy

transformers = pytest.importorskip("transformers")
LABELS = 40  # so many that a head of rank 2 would be smaller than the layer


def classifier(name="llama"):
    torch.manual_seed(0)
    if name == "bert":
        return transformers.BertForTokenClassification(transformers.BertConfig(**{**BERT, "num_labels": LABELS}))
    config = transformers.LlamaConfig(**LLAMA, num_labels=LABELS, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("head", "frozen", "arguments", "becomes"),
    [
        ("score", None, {}, "new"),
        ("score", None, {"target_modules": ["q_proj"]}, "new"),
        ("classifier", None, {"target_modules": ["query"]}, "new"),
        ("score", None, {"target_modules": ["q_proj", "score"]}, "4 bits"),
        ("score", None, {"exclude_modules": ["score"]}, "in exclude_modules"),
        ("score", "score", {}, "frozen by the module"),
        ("score", "", {}, "4 bits"),  # the preparation of a run
    ],
)
def test_a_classification_head_trains_in_full_or_is_as_the_user_says(head, frozen, arguments, becomes):
    model = classifier("bert" if head == "classifier" else "llama")
    if frozen is not None:
        model.get_submodule(frozen).requires_grad_(False)
    report = convert(model, r=2, **arguments)
    trained = {head: f"new: classification head of the {type(model).__name__}"} if becomes == "new" else {}
    layer = model.get_submodule(head)
    assert report.trained_in_full == trained
    assert (head in report.converted) is isinstance(layer, QLoRALinear) is (becomes == "4 bits")
    if becomes != "4 bits":
        assert report.skipped.get(head, "new") == becomes
        assert {p.requires_grad for p in layer.parameters()} == {bool(trained)}


def test_the_parts_of_a_larger_head_train_and_peft_trains_the_same():
    peft = pytest.importorskip("peft")
    config = transformers.RobertaConfig(**{**BERT, "num_labels": LABELS})
    model = transformers.RobertaForSequenceClassification(config)
    report = convert(model, r=2)
    assert set(report.trained_in_full) == {"classifier.dense", "classifier.out_proj"}
    theirs = peft.get_peft_model(
        transformers.RobertaForSequenceClassification(config),
        peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]),
    )
    trained = {n.split("model.", 1)[1] for n, p in theirs.named_parameters() if p.requires_grad and "lora" not in n}
    ours = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert {n.replace(".modules_to_save.default", "").removeprefix("model.") for n in trained} == ours


@pytest.mark.parametrize("streamed", [False, True])
def test_layers_that_the_load_reported_as_new_train_in_full(tmp_path, streamed):
    toy("llama").save_pretrained(tmp_path / "llama")
    wider = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 3})  # the third layer is not in the files

    def load():
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", config=wider)

    plugin = QLoRAPrecision(r=2)
    with plugin.init() if streamed else nullcontext():
        model = Lit(load())
    plugin.convert_module(model)
    full = plugin.report.trained_in_full
    assert len(plugin.report.converted) == 14 and len(full) == 9
    assert set(full.values()) == {"new: initialized when the model was loaded"}
    assert all(name.startswith("model.model.layers.2.") for name in full)
    assert "output embedding" in plugin.report.skipped["model.lm_head"]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "vit"])  # a part of a ViT has parameters beside its modules
def test_merged_layers_of_a_loaded_model_are_not_new(tmp_path, kind):
    from tests.architectures.models import build

    model = build(kind)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    first = convert(model, r=2)
    second = convert(merge(model), r=2)
    assert second.converted == first.converted and second.trained_in_full == first.trained_in_full == {}


def test_layers_of_other_modules_are_not_heads():
    model = nn.ModuleDict({"score": nn.Linear(64, 64), "classifier": nn.Linear(64, 64)})
    assert convert(model, r=2).converted == ["score", "classifier"]


class WithNewParts(Lit):
    """A loaded encoder and new parts of all kinds, as classifiers of real projects have them."""

    def __init__(self, folder, copied=False):
        super().__init__(None)
        self.save_hyperparameters()
        self.model = transformers.BertModel.from_pretrained(folder)
        if copied:
            self.model = copy.deepcopy(self.model)  # which loses the marks of loaded tensors
        width = self.model.config.hidden_size
        torch.manual_seed(1)
        self.proj = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.LayerNorm(4 * width), nn.Linear(4 * width, 8)
        )
        self.conv = nn.Conv1d(width, 4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, tokens):
        hidden = self.model(input_ids=tokens).last_hidden_state
        return self.proj(hidden).mean() + self.conv(hidden.mT).mean() * self.scale.sum()

    def training_step(self, batch, batch_idx):
        return self(ids())


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


NEW = {"scale", "proj.0", "proj.2", "proj.3", "conv"}


@pytest.mark.parametrize("copied", [False, True])
def test_what_stands_outside_of_a_loaded_model_trains_in_full(bert, copied, tmp_path):
    module = WithNewParts(bert, copied)
    report = convert(module, r=2)
    assert set(report.notes[LARGE]) == NEW
    assert report.trained_in_full == dict.fromkeys(report.trained_in_full, "new: outside of the loaded BertModel")
    assert set(report.trained_in_full) == NEW
    assert all(name.startswith("model.") for name in report.converted) and len(report.converted) == 13
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0] or name for name in trains if "lora_" not in name} == NEW
    norms = {n for n, part in module.model.named_modules() if isinstance(part, (nn.LayerNorm, nn.Embedding))}
    assert set(report.frozen) == {f"model.{name}" for name in norms}
    assert "in adapters and" in str(report)
    with pytest.warns(
        UserWarning, match=r"adapters of 'model', a BertModel, and not .* proj\.0, proj\.2, proj\.3, conv"
    ):
        save_adapter(module, tmp_path / "folder")


def test_new_parts_that_are_smaller_than_the_adapters_have_no_mark(bert):
    report = convert(WithNewParts(bert), r=16, modules_to_save=["word_embeddings", "position_embeddings"])
    in_full = report.trainable_parameters - report.adapter_parameters
    assert in_full > report.adapter_parameters and LARGE not in report.notes and set(report.trained_in_full) > NEW


def test_new_layers_that_are_named_are_converted_and_a_checkpoint_keeps_all(bert, tmp_path):
    module = WithNewParts(bert)
    trainer = make_trainer(tmp_path, plugins=QLoRAPrecision(r=2, target_modules=["query", "proj.0"]))
    trainer.fit(module, [0] * 3)
    assert isinstance(module.proj[0], QLoRALinear) and type(module.proj[3]) is nn.Linear
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    loaded = load_from_checkpoint(WithNewParts, tmp_path / "c.ckpt")
    assert torch.equal(loaded.eval()(ids()), module.eval()(ids()))


def test_a_model_without_weights_of_files_is_converted_as_a_whole():
    module = nn.ModuleDict({"model": classifier("bert"), "proj": nn.Linear(64, 64)})
    report = convert(module, r=2)
    assert len(report.converted) == 12 and set(report.trained_in_full) == {"model.classifier", "proj"}


@pytest.mark.parametrize("frozen", ["teacher", "teacher.0.weight", ""])
def test_what_the_module_froze_stays_as_it_is_while_something_else_trains(frozen):
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for name in ("student", "teacher")}
    )
    (module.get_parameter if "weight" in frozen else module.get_submodule)(frozen).requires_grad_(False)
    x = torch.randn(4, 64)
    expected = module["teacher"](x)
    report = convert(module, r=2)
    if not frozen:
        assert report.converted == ["student.0", "teacher.0"] and report.frozen == []
        return
    assert report.converted == ["student.0"] and report.skipped == {"teacher.0": "frozen by the module"}
    assert torch.equal(module["teacher"](x), expected)
    assert not any(p.requires_grad for p in module["teacher"].parameters())


def test_a_frozen_model_that_was_quantized_while_loading_is_refused_with_the_remedy(bert):
    plugin = QLoRAPrecision(r=2)
    with plugin.init():
        module = WithNewParts(bert)
    module.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"quantized while its model loaded.*frozen by the module.*exclude_modules"):
        plugin.convert_module(module)


def test_a_frozen_encoder_and_a_new_head(bert):
    module = WithNewParts(bert)
    module.model.requires_grad_(False)
    report = convert(module, r=2)
    assert any(re.search("no layer is in 4 bits.*target_modules converts frozen layers", text) for text in report.notes)
    assert set(report.trained_in_full) == NEW and report.converted == []


def test_a_new_head_in_fp32_trains_beside_a_model_in_bf16(tmp_path, bert):
    module = WithNewParts(bert)
    module.model.to(torch.bfloat16)
    make_trainer(tmp_path, plugins=QLoRAPrecision(r=2)).fit(module, [0] * 3)
    assert module.proj[0].weight.dtype is torch.float32 and module.proj[0].weight.grad is not None
