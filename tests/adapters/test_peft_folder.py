"""An adapter folder is whole after a kill, and damaged weights are refused."""

import json
import multiprocessing
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.peft_config import CONFIG_FILE, round_alpha
from lightning_qlora.adapters.peft_folder import WEIGHTS_FILE, read_adapter, write_adapter
from tests.adapters.folders import PLAIN, assert_same_folders


def adapter(number: int, r: int = 2, **entries) -> Adapter:
    """An adapter whose values and alpha are `number`."""
    value = float(number)
    state = {"lora_A": torch.full((r, 6), value), "lora_B": torch.full((4, r), value)}
    names = {"base_model_name_or_path": f"base-{number}", "target_modules": ["proj"], "modules_to_save": ["head"]}
    return Adapter(
        config={**PLAIN, "task_type": None, "r": r, "lora_alpha": number, **names, **entries},
        layers={f"layers.{i}.proj": state for i in range(2)},
        saved={"head.weight": torch.full((3, 5), value, dtype=torch.bfloat16)},
        source="",
    )


def content(found: Adapter) -> dict:
    """Everything that decides what an adapter computes."""
    layers = {
        name: ({part: value.tolist() for part, value in state.items()}, found.rank(name), found.alpha(name))
        for name, state in found.layers.items()
    }
    return (
        layers
        | {name: value.tolist() for name, value in found.saved.items()}
        | {"base": found.config["base_model_name_or_path"]}
    )


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    for name in map(str, range(12)):
        write_adapter(adapter(3), tmp_path / name)
        assert_same_folders(tmp_path / "0", tmp_path / name)


def test_a_rank_and_an_alpha_that_are_not_in_the_file_are_pefts_defaults(tmp_path):
    write_adapter(adapter(3, r=8), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    del config["r"], config["lora_alpha"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    found, default = read_adapter(tmp_path), pytest.importorskip("peft").LoraConfig()
    name = "layers.0.proj"
    assert (found.config["r"], found.rank(name), found.alpha(name)) == (default.r, default.r, default.lora_alpha)


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("same_config", [False, True])
def test_a_kill_at_any_step_leaves_one_of_two_adapters_or_no_config(same_config, tmp_path):
    first, second = adapter(3), adapter(4)
    if same_config:
        first = replace(first, config=second.config)
    fork = multiprocessing.get_context("fork")
    outcomes = []
    contents = [None]  # without a config
    for each in (first, second):
        write_adapter(each, tmp_path / "adapter")
        contents.append(content(read_adapter(tmp_path / "adapter")))

    def killed(step):
        count = 0
        for name in ("unlink", "replace"):
            method = getattr(Path, name)

            def step_of(path, *args, method=method, **kwargs):
                nonlocal count
                if path.suffix != ".lock" and count == step:
                    os._exit(9)
                count += path.suffix != ".lock"
                return method(path, *args, **kwargs)

            setattr(Path, name, step_of)
        write_adapter(second, tmp_path / "adapter")
        os._exit(0)

    for step in range(5):
        write_adapter(first, tmp_path / "adapter")
        process = fork.Process(target=killed, args=(step,))
        process.start()
        process.join(60)
        found = None
        if (tmp_path / "adapter" / CONFIG_FILE).exists():
            found = content(read_adapter(tmp_path / "adapter"))
        outcomes.append((process.exitcode, contents.index(found)))
    codes, numbers = zip(*outcomes, strict=True)
    steps = 2 if same_config else 3  # of the config, which is removed first if it differs, and of the weights
    assert codes == (9,) * steps + (0,) * (5 - steps)
    assert set(numbers) == ({1, 2} if same_config else {1, 0, 2})


def test_no_flipped_bit_of_the_weights_changes_what_is_read(tmp_path):
    write_adapter(adapter(3), tmp_path)
    expected = read_adapter(tmp_path)
    draw = random.Random(0)
    refused = []
    good = (tmp_path / WEIGHTS_FILE).read_bytes()
    for _ in range(250):
        bit = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / WEIGHTS_FILE).write_bytes(bad)
        try:
            found = read_adapter(tmp_path)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert content(found) == content(expected), bit
    assert len(refused) > 190
    assert all(str(tmp_path) in line and "\n" not in line for line in refused)


@pytest.mark.parametrize("name", ["", "None"])
def test_a_base_without_a_name_has_none(name, tmp_path):
    """transformers' names of a model that was not loaded from a folder."""
    write_adapter(adapter(3, base_model_name_or_path=name), tmp_path)
    assert read_adapter(tmp_path).config["base_model_name_or_path"] is None


def test_an_alpha_that_was_computed_has_nine_digits():
    alphas = [round_alpha(alpha) for alpha in (8 / 2**0.5, 3 * (1 / 3 + 1e-12), 0.1 * 3, 1.5e-10)]
    assert alphas == [5.656854249, 1, 0.3, 1.5e-10] and type(alphas[1]) is int
