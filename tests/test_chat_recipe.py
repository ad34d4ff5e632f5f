"""examples/chat: which tokens have labels, packs, the loss of a step, and a run with its files."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "chat")]

import conversations  # noqa: E402
import finetune  # noqa: E402
from chat_model import Chat  # noqa: E402

from lightning_qlora import PagedAdamW, QLoRALinear, convert, load_from_checkpoint, save_adapter  # noqa: E402
from tests.conftest import make_trainer  # noqa: E402
from tests.toys import chat_model  # noqa: E402

TEXTS = [
    "What is a list?",
    "A mutable sequence.  ",
    "And a tuple?",
    "Immutable.\n\nUse it as a key.",
    "Thanks",
    "Welcome!",
]
TALKS = [
    [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, TEXTS[:count], strict=False)]
    for count in (2, 4, 6)
]
TALKS.append([{"role": "system", "content": "Be short."}, *TALKS[1]])
# {G} and {E} are where transformers' generation markers go, for its own mask.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{G}{{ m.content }}<|im_end|>{E}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 2": (  # no header before an answer, and a space at its beginning
        "{% for m in messages %}{% if m.role == 'assistant' %}{G} {{ m.content | trim }} <|im_end|>{E}"
        "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture
def tokenizer(base):
    return transformers.AutoTokenizer.from_pretrained(base)


def answers(example, tokenizer):
    """The pieces of the labels, as text."""
    pieces = []
    before = conversations.IGNORE
    for label in example["labels"]:
        if label != conversations.IGNORE:
            pieces += [[]] if before == conversations.IGNORE else []
            pieces[-1].append(label)
        before = label
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_those_of_transformers_generation_markers(tokenizer, name):
    for talk in TALKS:
        marked = TEMPLATES[name].replace("{G}", "{% generation %}").replace("{E}", "{% endgeneration %}")
        expected = tokenizer.apply_chat_template(
            talk, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        tokenizer.chat_template = TEMPLATES[name].replace("{G}", "").replace("{E}", "")
        (example,) = conversations.encode(talk, tokenizer)
        assert example["input_ids"] == expected["input_ids"]
        pairs = zip(example["input_ids"], expected["assistant_masks"], strict=True)
        assert example["labels"] == [token if mask else conversations.IGNORE for token, mask in pairs]
        assert len(answers(example, tokenizer)) == sum(message["role"] == "assistant" for message in talk)


def test_a_template_that_rewrites_earlier_answers_gives_one_example_for_each(tokenizer):
    tokenizer.chat_template = (  # as Qwen3's: the last answer has thoughts
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    first, second = conversations.encode(TALKS[1], tokenizer)
    assert answers(first, tokenizer) == ["<think></think>A mutable sequence.  <|im_end|>"]
    assert answers(second, tokenizer) == ["<think></think>Immutable.\n\nUse it as a key.<|im_end|>"]
    assert "<think></think>A mutable" not in tokenizer.decode(second["input_ids"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        list(conversations.encode(TALKS[0], tokenizer))


def test_four_forms_are_read(tmp_path, monkeypatch):
    file = tmp_path / "talks.jsonl"
    alpaca = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    as_messages = [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}]
    shared = {"conversations": [{"from": "human", "value": "Add.\n\n1, 2"}, {"from": "gpt", "value": "3"}]}
    rows = [{"messages": TALKS[0]}, alpaca, {**alpaca, "input": ""}, shared]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    read = list(conversations.read(str(file)))
    assert read[:2] == [TALKS[0], as_messages]
    assert read[2][0]["content"] == "Add." and read[3] == as_messages
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"me/talks: no such file\..*pip install datasets"):
        list(conversations.read("me/talks"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))
    assert list(conversations.read("me/talks")) == read
    file.write_text('{"text": "x"}')
    with pytest.raises(ValueError, match="a row has text; expected `messages`"):
        list(conversations.read(str(file)))


@pytest.mark.parametrize("turn", [{"from": "function_call", "value": "{}"}, {"from": "gpt"}, {"role": "user"}])
def test_a_turn_that_sharegpts_form_has_no_place_for_is_named(turn, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"conversations": [{"from": "human", "value": "Add."}, turn]}))
    with pytest.raises(ValueError, match=r"a turn of `conversations` has \{.*expected `from`, one of system, human"):
        list(conversations.read(str(file)))


def test_without_a_path_the_docstrings_of_this_python_are_read():
    assert [message["role"] for message in next(conversations.read(None))] == ["user", "assistant"]


def module_and_data(base, tmp_path, **arguments):
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in TALKS))
    data = conversations.Conversations(str(file), base, **{"held_out": 0, **arguments})
    data.setup("fit")
    module = Chat(base, prompts=["What is a list?"], max_new_tokens=4)
    module.configure_model()
    module.model.float()
    return module, data


class Reads(pl.LightningModule):
    """Takes steps, and keeps what it got."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": None, "max_steps": 9}])
def test_a_resumed_run_reads_what_the_uninterrupted_one_does(base, tmp_path, length, pack):
    file = tmp_path / "talks.jsonl"
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!" * n}] for n in range(1, 13)]
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))

    def fit(ckpt_path=None, **arguments):
        data = conversations.Conversations(str(file), base, held_out=0, pack=pack, max_length=20 if pack else 512)
        module = Reads()
        trainer = make_trainer(tmp_path, **length | arguments)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module.seen

    save = {"dirpath": tmp_path / "files", "save_top_k": -1}
    steps = pl.callbacks.ModelCheckpoint(**save, filename="{step}", every_n_train_steps=1)
    callbacks = [steps]
    if length["max_epochs"]:  # else Lightning trains one more batch there, whatever the loader
        callbacks.append(pl.callbacks.ModelCheckpoint(**save, filename="{step} of an epoch", every_n_epochs=1))
    whole = fit(callbacks=callbacks)
    per_epoch = len(whole) // 3
    assert per_epoch > 2 and whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]
    for path in sorted((tmp_path / "files").iterdir()):
        step = int(re.search(r"step=(\d+)", path.name)[1])
        assert fit(path, enable_checkpointing=False) == whole[step:], path.name


def test_few_conversations_are_enough_and_none_is_an_error(base, tmp_path):
    _, data = module_and_data(base, tmp_path, held_out=256)
    assert len(data.train) >= len(TALKS) - len(TALKS) // 10
    with pytest.raises(ValueError, match=r"none has an answer in its first 1\s+tokens\. Set data\.max_length"):
        module_and_data(base, tmp_path, max_length=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_padded_losses_are_equal(base, tmp_path, attention):
    """In each attention that runs on a CPU; flash_attention_2 reads the same position_ids."""
    module, data = module_and_data(base, tmp_path, pack=True)
    module.model.set_attn_implementation(attention)
    (packed,) = data.train_dataloader()
    data.pack = False
    (padded,) = data.train_dataloader()
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum())) and not padded["attention_mask"].all()
    one = module.loss(packed)
    other = module.loss(padded)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    without = module.loss({key: value for key, value in packed.items() if key != "position_ids"})[0]
    assert abs(without - other[0]) > 1e-2  # the check can fail: here documents see those before them
    convert(module, r=4, deferred_logits=True)
    torch.testing.assert_close(module.loss(packed)[0], module.loss(padded)[0], rtol=1e-5, atol=1e-4)


def test_packs_hold_every_example_once_in_at_most_so_many_tokens():
    examples = [{"input_ids": [0] * size} for size in (3, 4, 9, 1, 2, 8)]
    packs = conversations.packs(examples, 8)
    assert [[len(example["input_ids"]) for example in pack] for pack in packs] == [[3, 4], [9], [1, 2], [8]]


@pytest.mark.parametrize(
    ("arguments", "accumulate"), [({"batch_size": 4}, 1), ({"batch_size": 1}, 4), ({"batch_size": 1, "pack": True}, 4)]
)
def test_a_step_is_the_mean_over_answer_tokens_however_they_are_divided(base, tmp_path, arguments, accumulate):
    module, data = module_and_data(base, tmp_path, max_length=64, **arguments)
    module.optimizer = partial(torch.optim.SGD, lr=0.1)
    expected = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    module.model(**data.pad(data.train)).loss.backward()  # of transformers: the mean
    for name, parameter in module.model.named_parameters():
        expected[name] -= 0.1 * parameter.grad
    module.zero_grad()
    arguments = {"max_steps": 1, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    trainer = make_trainer(tmp_path, enable_checkpointing=False, **arguments)
    trainer.fit(module, data)
    torch.testing.assert_close(dict(module.model.named_parameters()), expected, rtol=1e-4, atol=1e-5)
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == accumulate


def test_a_run_prints_samples_and_saves_the_adapter(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [f"--config={EXAMPLES / 'chat' / name}" for name in ("paper.yaml", "smollm2.yaml")]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in TALKS * 3))
    data = ["--data.path=talks.jsonl", "--data.pack=true"]
    model = [f"--model.base={base}", "--trainer.plugins.r=4", "--trainer.enable_progress_bar=false"]
    run = finetune.main(["fit", *files, *data, *model, "--fast"])
    assert run.trainer.global_step == 2
    printed = capsys.readouterr().out
    assert all(f"step {step} > What does `shutil.move` do?" in printed for step in (1, 2))
    assert sum(isinstance(layer, QLoRALinear) for layer in run.model.modules()) == 14
    run.trainer.save_checkpoint("end.ckpt")
    adapters = tmp_path / "outputs/chat/adapters"
    assert (adapters / "newest").read_text() == "step-2\n"
    save_adapter(run.model, tmp_path / "now")
    weights = "adapter_model.safetensors"
    assert (adapters / "step-2" / weights).read_bytes() == (tmp_path / "now" / weights).read_bytes()
    loaded, trained = (module.state_dict() for module in (load_from_checkpoint(Chat, "end.ckpt"), run.model))
    assert any(name.endswith("lora_B") and value.any() for name, value in loaded.items())
    assert all(torch.equal(value, trained[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("size", "dropout", "rate", "batch"),
    [("7b", 0.1, 2e-4, 4), ("13b", 0.1, 2e-4, 4), ("33b", 0.05, 1e-4, 1), ("65b", 0.05, 1e-4, 1)],
)
def test_the_files_have_the_settings_of_the_paper(tmp_path, monkeypatch, size, dropout, rate, batch):
    monkeypatch.chdir(tmp_path)
    files = [f"--config={EXAMPLES / 'chat' / name}" for name in ("paper.yaml", f"{size}.yaml")]
    run = finetune.main(files, run=False)
    config = run.trainer.precision_plugin.config
    trainer = run.trainer
    assert (config.r, config.lora_alpha, config.lora_dropout, config.quant_type) == (64, 16, dropout, "nf4")
    assert config.double_quant and config.target_modules == "all-linear"
    assert (trainer.gradient_clip_val, trainer.max_steps) == (0.3, 1875)
    assert trainer.accumulate_grad_batches * run.datamodule.batch_size == 16
    assert run.datamodule.batch_size == batch and run.datamodule.base == run.model.hparams.base
    optimizer = run.config["model"]["optimizer"]
    assert optimizer.class_path.endswith(PagedAdamW.__name__)
    assert (optimizer.init_args.lr, list(optimizer.init_args.betas)) == (rate, [0.9, 0.999])
