"""The table of data types: items are read strictly, scored as one by one, and a stopped run continues."""

import json
import math
import statistics

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import data_types, multiple_choice, starts  # noqa: E402
from benchmarks.multiple_choice import Item  # noqa: E402
from lightning_qlora import QLoRALinear, convert  # noqa: E402
from tests.toys import perturb, toy  # noqa: E402

ITEMS = [
    Item(["The sky is"] * 3, [" blue", " blue and green", " a"], 0),  # a choice that another one begins with
    Item(["Ann met Bob and Ann", "Ann met Bob and Bob"], [" left.", " left."], 1),
    Item(["", ""], ["yes", "no"], 1),
    Item(["The end "] * 2, ["here", "there"], 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("Ġ", "l"), ("Ġ", "h")]  # the last one crosses the end of the last item's context
    vocabulary = {token: at for at, token in enumerate(["<s>", *alphabet, *map("".join, merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


@pytest.fixture(scope="module")
def model():
    return toy("llama", vocab_size=320, max_position_embeddings=512)


@pytest.fixture
def base(tokenizer, model, tmp_path):
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def alone(model, tokenizer, context, choice):
    """Log-likelihood of a choice in a row of its own."""
    whole, before = (tokenizer(text, add_special_tokens=False).input_ids for text in (context + choice, context))
    start = multiple_choice.common_length(whole, before)
    if not before:
        whole = [tokenizer.bos_token_id, *whole]
        start = 1
    logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[at - 1, whole[at]].item() for at in range(start, len(whole)))


class TestScores:
    def test_are_those_of_separate_rows(self, model, tokenizer):
        rows = [multiple_choice.encode(item, tokenizer, 512) for item in ITEMS]
        assert len(rows[0].tokens) < sum(len(c + w) for c, w in zip(ITEMS[0].contexts, ITEMS[0].choices, strict=True))
        for item, scores in zip(ITEMS, multiple_choice.log_likelihoods(model, rows), strict=True):
            expected = [alone(model, tokenizer, *pair) for pair in zip(item.contexts, item.choices, strict=True)]
            assert scores == pytest.approx(expected, rel=1e-5)

    def test_the_right_choice_has_the_largest_score_per_byte(self, model, tokenizer):
        found = multiple_choice.correct(model, tokenizer, ITEMS, tokens=40)  # more than one batch
        for item, right in zip(ITEMS, found, strict=True):
            pairs = zip(item.contexts, item.choices, strict=True)
            each = [alone(model, tokenizer, *pair) / len(pair[1].encode()) for pair in pairs]
            assert right == (each.index(max(each)) == item.gold)

    def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed(self, tokenizer):
        rows = [multiple_choice.encode(item, tokenizer, 512) for item in ITEMS * 3]
        batches = list(multiple_choice.batches(rows, 60))
        assert sorted(index for batch in batches for index in batch) == list(range(12))
        assert all(len(batch) * max(len(rows[i].tokens) for i in batch) <= 60 for batch in batches)

    def test_an_item_that_is_too_long_is_named(self, tokenizer):
        with pytest.raises(ValueError, match=r"more tokens than the model has positions \(5\): 'The sky is blue'"):
            multiple_choice.encode(ITEMS[0], tokenizer, 5)


GOOD = {"context": "a", "choices": [" b", " c"], "gold": 0}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"context": ', "is not JSON"),
        ("[1]", "is not a JSON object"),
        (json.dumps(GOOD | {"choices": [" b"]}), "two or more texts"),
        (json.dumps(GOOD | {"choices": [" b", ""]}), "none of them empty"),
        (json.dumps(GOOD | {"gold": 2}), "integer from 0 to 1"),
        (json.dumps(GOOD | {"gold": True}), "integer from 0 to 1"),
        (json.dumps(GOOD | {"gold": "0"}), "integer from 0 to 1"),
        (json.dumps(GOOD | {"contexts": ["a", "b"]}), "either context or contexts"),
        (json.dumps({"contexts": ["a"], "choices": [" b", " c"], "gold": 0}), "one text for each choice"),
        (json.dumps(GOOD | {"context": 1}), "context must be a text"),
    ],
)
def test_a_wrong_line_is_named_with_its_reason(tmp_path, line, reason):
    (tmp_path / "task.jsonl").write_text("\n".join([json.dumps(GOOD), "", line]))
    with pytest.raises(ValueError, match=rf"task\.jsonl, line 3: .*{reason}") as error:
        multiple_choice.read_tasks(tmp_path)
    assert multiple_choice.FORM in str(error.value)


def test_other_keys_blank_lines_and_a_byte_order_mark_are_no_errors(tmp_path):
    line = json.dumps(GOOD | {"context": "a\u2028b", "id": 7}, ensure_ascii=False)
    (tmp_path / "task.jsonl").write_text(f"{line}\n\n{line}\n{line}\n", encoding="utf-8-sig")
    assert multiple_choice.read_tasks(tmp_path, 2) == {"task": [Item(["a\u2028b"] * 2, [" b", " c"], 0)] * 2}


def test_a_folder_without_tasks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no TASK\.jsonl"):
        multiple_choice.read_tasks(tmp_path)


@pytest.mark.parametrize("trained", [False, True])
def test_decoding_keeps_the_function(trained):
    model = toy("llama")
    tokens = torch.arange(12)[None]
    convert(model, r=8)
    if trained:
        perturb(model)
    size = data_types.bits(model)
    layers = [layer for layer in model.modules() if isinstance(layer, QLoRALinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert size[0] == pytest.approx(8 * sum(layer.packed_weight.nbytes for layer in layers) / weights)
    adapters = 32 * sum(8 * (layer.in_features + layer.out_features) for layer in layers) / weights
    assert size[1] - size[0] == pytest.approx(adapters if trained else 0)
    with torch.no_grad():
        expected = model(tokens).logits
        logits = data_types.decode(model)(tokens).logits
    assert not any(isinstance(layer, QLoRALinear) for layer in model.modules())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_paired_differences():
    ours = [[1, 1, 0, 1], [1, 0, 0]]
    theirs = [[1, 0, 0, 0], [1, 0, 1]]
    mean, error = data_types.paired(ours, theirs)
    first = [0, 1, 0, 1]
    second = [0, 0, -1]
    assert mean == pytest.approx((0.5 - 1 / 3) / 2)
    parts = [statistics.stdev(each) / math.sqrt(len(each)) for each in (first, second)]
    assert error == pytest.approx(math.hypot(*parts) / 2)
    assert data_types.paired(ours, ours) == (0, 0)


def test_a_stopped_run_continues(base, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    output = tmp_path / "out"
    data.mkdir()
    for task in ("first", "second"):
        lines = [json.dumps({"contexts": item.contexts, "choices": item.choices, "gold": item.gold}) for item in ITEMS]
        (data / f"{task}.jsonl").write_text("\n".join(lines))
    arguments = [
        f"--data={data}",
        f"--base={base}",
        f"--output={output}",
        "--windows=1",
        "--r=2",
        "--types",
        "INT4 + DQ",
        "NF4 + DQ, calibrated",
        "--limit",
    ]
    calls = []
    compute = data_types.correct

    def stop_at_the_fourth(model, tokenizer, items):
        calls.append(len(items))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(model, tokenizer, items)

    monkeypatch.setattr(data_types, "correct", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        data_types.main([*arguments, "3"])
    values = data_types.main([*arguments, "3"])
    assert calls == [3] * (4 + 3)  # two tasks of three types, one of them stopped
    assert {len(each) for tasks in values["per_item"].values() for each in tasks.values()} == {3}
    assert list(values["per_item"]) == ["bf16", "INT4 + DQ", "NF4 + DQ, calibrated"]
    assert values == json.loads((output / "data_types.json").read_text())

    whole = data_types.main([*arguments, "4"])
    assert calls[7:] == [1] * 6
    shorter = {name: {task: v[:3] for task, v in tasks.items()} for name, tasks in whole["per_item"].items()}
    assert shorter == values["per_item"]
    fresh = data_types.main([each for each in arguments if "output" not in each] + ["4"])
    assert fresh["per_item"] == whole["per_item"]
    assert fresh["window_losses"] == whole["window_losses"]
    assert 4 < whole["bits"]["INT4 + DQ"][0] < 4.5
    assert whole["bits"]["NF4 + DQ, calibrated"][1] > whole["bits"]["INT4 + DQ"][1]

    written = (output / "data_types.md").read_text(encoding="utf-8")
    assert written.startswith("Items: first 4, second 4\n")
    assert written in capsys.readouterr().out
    assert (output / "data_types.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"is of a run with r=2"):
        data_types.main([*arguments, "3", "--r=4"])


def test_perplexity_of_each_start(base, tmp_path, capsys):
    for name in ("test", "valid"):
        (tmp_path / name).write_text(f"The {name} of a game @-@ like text , with dots . " * 120)
    arguments = [str(tmp_path / "test"), str(tmp_path / "valid"), f"--base={base}", "--windows=1", "--r=2", "--starts"]
    starts.main([*arguments, "default", "calibrated"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["float", "default", "calibrated"]
    assert all(250 < float(row[1]) < 400 for row in rows)  # a random model of 320 tokens
    with pytest.raises(ValueError, match=r"has \d+ tokens, and 99 windows need 50688"):
        starts.windows(str(tmp_path / "test"), 99, starts.load_tokenizer(base))
