"""lm-evaluation-harness scores a converted model, with the recipe of docs/results.md."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="pip install lm-eval")

from benchmarks import multiple_choice  # noqa: E402
from lightning_qlora import QLoRALinear, convert, merge  # noqa: E402
from tests.toys import chat_model  # noqa: E402

pytestmark = pytest.mark.slow

TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ITEMS = [
    {"context": "The sky is", "choices": [" blue", " a kind of green", " wet"], "gold": 0},
    {"context": "Return the", "choices": [" directory tree.", " left"], "gold": 1},
    {"context": "Copy a file to", "choices": [" the destination", " nothing", " a", " another one"], "gold": 2},
] * 3


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder with the task above; datasets keeps its cache there too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "local_choices.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "local_choices.yaml").write_text(TASK.format(data=data))
    return tmp_path


@pytest.mark.parametrize("deferred_logits", [True, False])
def test_scores_of_a_converted_model(tmp_path, task, deferred_logits):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = chat_model(tmp_path / "model", [" ".join(item["choices"]) for item in ITEMS] * 20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    convert(model, r=4, deferred_logits=deferred_logits)
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.5)

    def evaluate(model):
        lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=2)
        found = lm_eval.simple_evaluate(
            lm, tasks=["local_choices"], task_manager=TaskManager(include_path=str(task)), bootstrap_iters=0
        )
        samples = sorted(found["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
        return found["results"]["local_choices"], [[float(r[0]) for r in s["filtered_resps"]] for s in samples]

    results, scores = evaluate(model)
    items = [multiple_choice.parse(json.dumps(item)) for item in ITEMS]
    rows = [multiple_choice.encode(item, tokenizer, 512) for item in items]
    expected = multiple_choice.log_likelihoods(model, rows)
    for found, each in zip(scores, expected, strict=True):
        assert found == pytest.approx(each, rel=1e-4)
    right = [each.index(max(each)) == item.gold for each, item in zip(expected, items, strict=True)]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))

    merged_results, merged = evaluate(merge(model, dtype="fp32"))
    assert merged_results["acc,none"] == results["acc,none"]
    for found, each in zip(merged, scores, strict=True):
        assert found == pytest.approx(each, rel=1e-4)
