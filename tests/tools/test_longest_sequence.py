"""The longest sequence of a plan, and blocks that are skipped in it because they are like others."""

import json

import pytest
import torch
from torch import nn

from lightning_qlora import estimate_memory
from lightning_qlora.activations.activation_budget import MARGIN
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools import activations, repeated_blocks
from lightning_qlora.tools.activations import _flash_workspace
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_estimate import PlannedRun, bytes_on_each, usable_bytes
from tests.toys import LLAMA

transformers = pytest.importorskip("transformers", minversion="5")

R = {"r": 4, "lora_dropout": 0.0}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 512, "max_position_embeddings": 100_000, "num_hidden_layers": 8, "dtype": "bfloat16"}


def llama(**changes):
    return transformers.LlamaConfig(**LLAMA | SIZES | changes)


def two_kinds():
    """Layers with a sliding window, of another kind than every third one."""
    kinds = ["full_attention" if number % 3 == 2 else "sliding_attention" for number in range(8)]
    return transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, layer_types=kinds)


def encoder_and_decoder():
    return transformers.T5Config(d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=6, decoder_start_token_id=0)


OTHERS = [(config, "offload") for config in (llama, two_kinds, encoder_and_decoder)]


@pytest.mark.parametrize(
    ("config", "setting"), [(llama, True), *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_a_count_without_the_blocks_between_is_that_of_all(config, setting, monkeypatch):
    computed = []
    compute = repeated_blocks._RepeatedForward.original
    monkeypatch.setattr(
        repeated_blocks._RepeatedForward,
        "original",
        lambda self, *a, **k: (computed.append(self), compute(self, *a, **k))[1],
    )
    few = estimate_memory(config(), 2, 1500, **R, gradient_checkpointing=setting)
    monkeypatch.setattr(repeated_blocks, "_kinds", lambda blocks: [])
    full = estimate_memory(config(), 2, 1500, **R, gradient_checkpointing=setting)
    assert few.total == pytest.approx(full.total, rel=1e-4)
    assert few.host_bytes == full.host_bytes
    assert {**few.parts, "activations": 0} == {**full.parts, "activations": 0}


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for config, _ in OTHERS])
def test_a_count_with_a_limit_is_that_of_all_blocks(config, monkeypatch):
    """For limits in which none, some and all blocks keep their activations."""
    arguments = {**R, "batch_size": 2, "sequence_length": 300}
    least, most = (estimate_memory(config(), **arguments, gradient_checkpointing=how) for how in (True, 2**45))
    kinds = repeated_blocks._kinds
    kept = []
    for share in (-0.1, 0.4, 0.8, 1.2):
        limit = int((least.device + share * most.kept_bytes) / (1 - MARGIN))
        monkeypatch.setattr(repeated_blocks, "_kinds", kinds)
        few = estimate_memory(config(), **arguments, gradient_checkpointing=limit)
        monkeypatch.setattr(repeated_blocks, "_kinds", lambda blocks: [])
        full = estimate_memory(config(), **arguments, gradient_checkpointing=limit)
        assert few.total == pytest.approx(full.total, rel=0.01)
        assert (few.blocks, few.kept_blocks, few.kept_bytes) == (full.blocks, full.kept_blocks, full.kept_bytes)
        kept.append(few.kept_blocks)
    assert kept[0] == 0 < kept[1] <= kept[2] <= kept[3]


class _Value:
    def __init__(self, x):
        self.x = x


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, value):
        return _Value(value.x + self.down(self.up(value.x).relu()))


class _Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(4))

    def forward(self, x):
        value = _Value(x)
        for block in self.blocks:
            value = block(value)
        return value.x


def test_blocks_that_take_their_tensors_in_an_object_all_compute(monkeypatch):
    def estimate():
        return estimate_memory(_Blocks(), example=torch.zeros(32, 64), **R, gradient_checkpointing=True)

    few = estimate()
    monkeypatch.setattr(repeated_blocks, "_kinds", lambda blocks: [])
    assert few == estimate() and few.counted_activations


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
