"""The longest sequence of a plan."""

import json

import pytest
import torch

from lightning_qlora import estimate_memory
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools import activations
from lightning_qlora.tools.activations import _flash_workspace
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_estimate import PlannedRun, bytes_on_each, usable_bytes
from tests.toys import LLAMA

transformers = pytest.importorskip("transformers")

R = {"r": 4, "lora_dropout": 0.0}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 512, "max_position_embeddings": 100_000, "num_hidden_layers": 8, "dtype": "bfloat16"}


def llama(**changes):
    return transformers.LlamaConfig(**LLAMA | SIZES | changes)


def planned(tmp_path, capsys, *arguments, **changes):
    llama(**{"num_hidden_layers": 4} | changes).save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--r", "4", "--lora_dropout", "0", "--sequence_length", "longest"]
    main([*command, *arguments])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["0.85GB", "0.9GB"])
def test_the_longest_sequence_fits_and_a_longer_one_does_not(tmp_path, capsys, memory):
    found = json.loads(planned(tmp_path, capsys, "--gpu_memory", memory, "--json"))
    assert found["available"] == usable_bytes(int(float(memory[:-2]) * 1e9))
    assert [row["gradient_checkpointing"] for row in found["longest"]] == [True, "auto", "offload"]
    assert {row["limit"] for row in found["longest"]} == {"memory of the device"}
    whole, *others = (row["tokens"] for row in found["longest"])
    assert 0 < whole <= others[0] == others[1]
    for row in found["longest"]:
        setting = row["gradient_checkpointing"]
        run = PlannedRun(str(tmp_path), "adamw", QLoRAConfig(**R, gradient_checkpointing=setting))
        for tokens in (row["tokens"], int(1.01 * row["tokens"])):
            needed = bytes_on_each(run, run.estimate(1, tokens))
            assert (needed <= found["available"]) == (tokens == row["tokens"])


@pytest.mark.slow
def test_what_limits_it(tmp_path, capsys):
    lines = planned(tmp_path, capsys, "--gpu_memory", "24GiB").splitlines()
    assert lines[0] == "The longest sequence for 23.94 GB (22.29 GiB), batch_size=1:"
    assert all(line.split()[1:7] == ["100,000", "tokens", "limit:", "positions", "of", "the"] for line in lines[1:])
    assert "on the host" not in lines[1] and lines[3].endswith(" on the host")
    sharded = planned(tmp_path, capsys, "--gpu_memory", "0.8334GB", "--devices", "2")
    assert sharded.count(" 0 tokens  limit: memory of the device") == 3


def test_longest_for_no_card_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        planned(tmp_path, capsys)
    assert "on which card? Pass gpu=RTX4090 or gpu_memory=24GiB." in capsys.readouterr().err


@pytest.mark.slow
def test_a_host_without_room_limits_it(tmp_path, capsys):
    host = planned(tmp_path, capsys, "--gpu_memory", "0.9GB", "--host_memory", "40MB", num_hidden_layers=12)
    assert host.count("limit: memory of the host") == 2


def test_the_workspace_of_flash_attention():
    """For a token of Llama 3.1 8B: 32 heads x 129 values in fp32, and two tensors of 32 heads x 128 in bf16."""
    query, key = (torch.empty(1, heads, 4096, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    assert _flash_workspace(query, key) == 4096 * (32 * 129 * 4 + 2 * 32 * 128 * 2)
    assert _flash_workspace(query, query) == 4096 * 32 * 129 * 4
    assert _flash_workspace(query.float(), key.float()) == 0


@pytest.mark.slow
def test_the_workspace_is_counted_on_a_card(monkeypatch):
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
    arguments = {**R, "gradient_checkpointing": "offload"}
    counted = estimate_memory(llama(**sizes), 1, 16_384, **arguments).total
    monkeypatch.setattr(activations, "_flash_workspace", lambda query, key: 0)
    assert counted > estimate_memory(llama(**sizes), 1, 16_384, **arguments).total


def test_inputs_on_the_host_have_as_many_tiles_as_their_gradients():
    """Also in a model so small that the planner would give an input values, as it does to attention masks."""
    estimate = estimate_memory(llama(num_hidden_layers=3), 2, 4096, **R, gradient_checkpointing="offload")
    assert estimate.counted_activations and estimate.host_bytes
