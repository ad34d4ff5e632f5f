"""The benchmark of fine-tuning: its variants train what they name, merged models are measured, a run continues."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from peft import LoraConfig, get_peft_model

from benchmarks import fine_tuning
from benchmarks.fine_tuning import Module, Variant, dense_lora
from benchmarks.tasks import TASKS
from lightning_qlora import QLoRALinear, convert
from tests.toys import chat_model


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory):
    import docstring_qa  # in examples/, which fine_tuning adds to the path

    answers = [pair.answer for pair in docstring_qa.read_pairs()]
    return chat_model(tmp_path_factory.mktemp("llama"), answers)


@pytest.fixture(scope="module")
def data(tiny_llm):
    import docstring_qa

    pairs = docstring_qa.DocstringQA(tiny_llm, batch_size=4, held_out=4)
    pairs.setup("fit")
    return pairs


def test_a_variant_has_the_settings_that_it_names():
    assert Variant.parse("calibrated,lr=1e-3,r=4,layers=attention") == Variant(
        "calibrated", fine_tuning.DEFAULTS | {"lr": 1e-3, "r": 4, "layers": "attention"}
    )
    for wrong in ("default,rank=4", "default,lr", "default,lr="):
        with pytest.raises(ValueError, match="is no setting"):
            Variant.parse(wrong)
    with pytest.raises(ValueError, match="init is a setting of 'lora' only"):
        Variant.parse("default,init=pissa")
    with pytest.raises(ValueError, match="roundings is a setting of 'lora' only"):
        Variant.parse("default,roundings=1")
    with pytest.raises(ValueError, match="settings of 'calibrated' only"):
        Variant.parse("default,frozen=8")


def test_rates_rise_and_fall(tiny_llm):
    def rates(text):
        module = Module(tiny_llm, Variant.parse(text), steps=10)
        return [module.rate(step) for step in range(10)]

    assert rates("default") == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates("default,decay=none") == [1.0] * 10
    cosine = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates("default,decay=cosine") == pytest.approx(cosine)
    warm = rates("default,warmup=0.2")
    assert warm[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert warm[2:] == sorted(warm[2:], reverse=True)


@pytest.mark.parametrize("start", ["lora", "default"])
def test_lora_b_learns_at_ratio_times_the_rate(tiny_llm, data, start):
    variant = Variant.parse(f"{start},ratio=4,layers=attention,r=2")
    module = Module(tiny_llm, variant, steps=10)
    if start == "default":
        convert(module, r=2)
    else:
        module.model = dense_lora(module.model, variant, data)
    slow, fast = module.configure_optimizers()["optimizer"].param_groups
    assert fast["initial_lr"] == 4 * slow["initial_lr"] == pytest.approx(4 * 5e-4)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all("self_attn" in name and "lora_" in name for name in trained)
    assert len(slow["params"]) == len(fast["params"]) == len(trained) // 2 == 8
    assert {id(p) for p in fast["params"]} == {
        id(p) for n, p in module.named_parameters() if n in trained and "lora_B" in n
    }


def test_lora_ga_starts_with_the_outputs_of_the_model_and_directions_of_the_gradient(tiny_llm, data):
    module = Module(tiny_llm, Variant.parse("lora"), steps=10)
    batch = next(iter(data.train_dataloader()))
    before = module.model(**batch).logits
    model = dense_lora(module.model, Variant.parse("lora,r=2,init=lora_ga"), data)
    torch.testing.assert_close(model(**batch).logits, before, rtol=2e-2, atol=2e-2)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all(p.count_nonzero() for p in adapters.values())


def results_and_gradients(roundings, dtype, change):
    """Output, dX, dA and dB of PEFT's layer for a linear layer with a bias, whose B is `change` times signs."""
    from one_rounding import one_rounding  # in examples/, which fine_tuning adds to the path

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 192).to(dtype))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    model = get_peft_model(model, one_rounding(config) if roundings == 1 else config)
    adapters = [p for p in model.parameters() if p.requires_grad]
    adapters[1].data = change * torch.randn_like(adapters[1]).sign()
    x = torch.randn(2, 64, 256).to(dtype).requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *adapters])]


def test_one_rounding_is_pefts_layer_and_lets_small_changes_arrive():
    for once, twice in zip(*(results_and_gradients(n, torch.float32, 0.1) for n in (1, 2)), strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)

    def change(roundings, dtype):
        before, after = (results_and_gradients(roundings, dtype, b)[0].float().flatten() for b in (0, 2e-4))
        return after - before

    exact = change(1, torch.float32)
    shares = [float(change(n, torch.bfloat16) @ exact / exact.square().sum()) for n in (1, 2)]
    assert shares[0] == pytest.approx(1, abs=0.1)
    assert shares[1] < 0.8


@pytest.mark.slow
def test_a_run_trains_measures_merged_models_and_continues(tiny_llm, tmp_path, monkeypatch):
    arguments = [f"--base={tiny_llm}", f"--output={tmp_path}", "--steps=10", "--held_out=8"]
    arguments += ["--merge", "--windows=1", "--seeds", "0"]
    names = ["lora,lr=5e-3,r=4", "calibrated,lr=5e-3,r=4"]
    results = fine_tuning.main([*names, *arguments])
    for run in results:
        losses = run["losses"]
        assert list(losses) == ["0", "2", "5", "8", "10"]
        assert losses["10"] < losses["0"]
        assert run["merged"]["adapter on its base"][0] == pytest.approx(losses["10"], rel=1e-6)
        assert run["merged"]["merged, 16 bits"][0] == pytest.approx(losses["10"], rel=2e-3)
    on_float = results[1]["merged"]["adapter on the 16-bit model"]
    assert on_float[0] == pytest.approx(results[1]["losses"]["10"], rel=2e-2)
    assert on_float != results[1]["merged"]["adapter on its base"]
    written = (tmp_path / "fine_tuning.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in written for name in names)
    assert (tmp_path / "fine_tuning.png").read_bytes().startswith(b"\x89PNG")

    calls = []
    compute = fine_tuning.train
    monkeypatch.setattr(
        fine_tuning, "train", lambda v, seed, *rest: calls.append((v.start, seed)) or compute(v, seed, *rest)
    )
    again = fine_tuning.main([*names, *arguments, "1"])
    assert calls == [("lora", 1), ("calibrated", 1)]
    assert [run for run in again if run["seed"] == 0] == results
    assert len(json.loads((tmp_path / "fine_tuning.json").read_text())) == 4


def test_batches_of_reviews_have_each_sentence_once_beside_others_of_its_length(tiny_llm, monkeypatch):
    rows = [("word " * (1 + place % 20), place % 2) for place in range(70)]
    monkeypatch.setattr("encoder.reviews", lambda: (rows, rows[:30]))
    data = TASKS["reviews"].data(tiny_llm, batch_size=4, held_out=20, seed=1)
    data.setup("fit")
    batches = list(data.train_dataloader())
    lengths = [int(mask.sum()) for batch in batches for mask in batch["attention_mask"]]
    seen = zip(lengths, [int(label) for batch in batches for label in batch["labels"]], strict=True)
    assert sorted(seen) == sorted((len(row["input_ids"]), row["labels"]) for row in data.train)
    assert len(data.train) == 70
    assert sum(lengths) > 0.9 * sum(batch["input_ids"].numel() for batch in batches)
    assert [b["labels"].tolist() for b in data.train_dataloader()] == [b["labels"].tolist() for b in batches]
    assert sum(len(b["labels"]) for b in data.val_dataloader()) == 20


@pytest.mark.slow
def test_the_error_added_back_gives_the_loss_of_16_bits_and_equal_settings_have_equal_bytes(tiny_llm, tmp_path):
    starts = ["lora,r=4", "calibrated,r=4,float=1e3", "calibrated,r=4,frozen=1e3", "default,r=4"]
    sizes = ["calibrated,r=6", "calibrated,r=4,frozen=2", "calibrated,r=4,float=2", "calibrated,r=4,codes=100"]
    arguments = [f"--base={tiny_llm}", f"--output={tmp_path}", "--steps=1", "--held_out=4", "--points=0", "--seeds=0"]
    dense, kept, corrected, default, *runs = fine_tuning.main([*starts, *sizes, *arguments])
    loss = {run["variant"]: run["losses"]["0"] for run in (dense, kept, corrected, default)}
    gap = abs(loss["default,r=4"] - loss["lora,r=4"])
    for name in ("calibrated,r=4,float=1e3", "calibrated,r=4,frozen=1e3"):
        assert abs(loss[name] - loss["lora,r=4"]) < gap / 5, loss
    more, frozen, some, codes = (run["MB"] for run in runs)
    assert more == pytest.approx(frozen, rel=1e-6)
    assert codes < some <= more
    assert codes == pytest.approx(default["MB"])


def test_attention_alone_trains_attention_alone(tiny_llm, tmp_path, monkeypatch):
    trained = []

    class Recorded(fine_tuning.HeldOutLoss):
        def on_train_end(self, trainer, module):
            trained.append(
                {n: layer.lora_B.any().item() for n, layer in module.named_modules() if isinstance(layer, QLoRALinear)}
            )
            super().on_train_end(trainer, module)

    monkeypatch.setattr(fine_tuning, "HeldOutLoss", Recorded)
    fine_tuning.main(
        [
            "default,layers=attention,r=2",
            f"--base={tiny_llm}",
            f"--output={tmp_path}",
            "--steps=2",
            "--held_out=4",
            "--seeds",
            "0",
        ]
    )
    assert len(trained[0]) == 14
    assert {n for n, changed in trained[0].items() if changed} == {n for n in trained[0] if "self_attn" in n}
