"""Lightning's summary and transformers' num_parameters count weights, as the conversion report does."""

import copy
import logging
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary, rich_model_summary
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count

from lightning_qlora import QLoRAPrecision, convert
from tests.conftest import Classifier
from tests.toys import toy

ARGUMENTS = {"r": 8, "target_modules": ["0"]}


def summary_of(trainer, callback, caplog, capsys):
    """What the Trainer prints for a classifier of 256 x 256 weights, and the report of its conversion."""
    plugin = QLoRAPrecision(**ARGUMENTS)
    run = trainer(plugins=plugin, callbacks=[callback], enable_model_summary=True, max_steps=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.callbacks.model_summary"):
        run.fit(Classifier(width=256), loader_of_width(256))
    return caplog.text + capsys.readouterr().out, plugin.report


def loader_of_width(width):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, width), torch.zeros(8, dtype=torch.long)), batch_size=8
    )


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_both_summaries_of_a_run_show_the_same_numbers(trainer, caplog, capsys, kind):
    text, report = summary_of(trainer, kind(max_depth=2), caplog, capsys)
    adapter = 8 * (256 + 256)
    dense = 256 * 256 + 256 + 2 * 256 + 8 * 256 + 8
    assert report.total_parameters == dense + adapter
    total, trainable = (
        get_human_readable_count(n).strip() for n in (report.total_parameters, report.trainable_parameters)
    )
    assert re.search(rf"{total}\W+Total params|Total params\W+{total}", text)
    assert re.search(rf"{trainable}\W+Trainable params|Trainable params\W+{trainable}", text)
    whole = kind is RichModelSummary and not hasattr(rich_model_summary, "get_formatted_model_size")  # Lightning 2.6.1
    size = f"{report.bytes_after / 1e6:.{0 if whole else 3}f}"
    assert re.search(rf"{size}\W+Total estimated|Total estimated.*{size}", text)
    layer = get_human_readable_count(256 * 256 + 256 + adapter).strip()
    assert re.search(rf"net\.0\W+QLoRALinear\W+{layer}", text)


def test_a_dense_module_has_lightnings_own_numbers():
    module = Classifier()
    summary = summarize(module)
    assert summary.total_parameters == sum(p.numel() for p in module.parameters())
    assert summary.model_size == pytest.approx(4e-6 * summary.total_parameters)


def test_no_parameters_are_left_over_in_the_table():
    module = Classifier()
    convert(module, r=4)
    summary = summarize(module, max_depth=-1)
    assert summary.total_parameters == summary.param_nums[0]  # of `net`
    assert "other params" not in str(summary)


def test_num_parameters_of_a_transformers_model():
    pytest.importorskip("transformers")
    model = toy("llama")
    dense = copy.deepcopy(model)
    convert(model, r=4)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    embedding = dense.get_input_embeddings().weight.numel()
    assert model.num_parameters() == dense.num_parameters() + adapters
    assert model.num_parameters(only_trainable=True) == adapters
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters() + adapters - embedding
    assert dense.num_parameters() == sum(p.numel() for p in dense.parameters())
