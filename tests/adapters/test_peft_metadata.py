"""The two files of an adapter folder belong together, and damaged ones are refused."""

import json
import multiprocessing
import os
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora.adapters import peft_files, peft_reader
from lightning_qlora.adapters.adapter import Adapter, LayerAdapter
from lightning_qlora.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from lightning_qlora.adapters.peft_reader import read_adapter

posix = pytest.mark.skipif(os.name != "posix", reason="forks")


def adapter(number: int, r: int = 2) -> Adapter:
    """An adapter whose values and alpha are `number`."""
    layers = {
        f"layers.{i}.proj": LayerAdapter(torch.full((r, 6), float(number)), torch.full((4, r), float(number)), number)
        for i in range(2)
    }
    saved = {"head.weight": torch.full((3, 5), float(number), dtype=torch.bfloat16)}
    return Adapter(layers, saved=saved, modules_to_save=["head"], target_modules=["proj"], base_model=f"base-{number}")


def number_of(found: Adapter) -> int:
    """The `number` of an adapter that is whole."""
    numbers = {float(t) for layer in found.layers.values() for t in (*layer.lora_A.view(-1), *layer.lora_B.view(-1))}
    numbers |= {layer.alpha for layer in found.layers.values()}
    numbers |= set(found.saved["head.weight"].float().view(-1).tolist())
    (number,) = numbers | {float(found.base_model.removeprefix("base-"))}
    return int(number)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(peft_reader, "PATIENCE", 0.0)


def content(found: Adapter) -> dict:
    """Everything that decides what an adapter computes."""
    layers = {
        name: (layer.lora_A.tolist(), layer.lora_B.tolist(), found.scaling(name))
        for name, layer in found.layers.items()
    }
    return layers | {name: value.tolist() for name, value in found.saved.items()}


def edit(folder, **changes):
    content = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**content, **changes}))


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    made = set()
    for _ in range(12):
        write_adapter(adapter(3), tmp_path)
        made.add((tmp_path / WEIGHTS_FILE).read_bytes() + (tmp_path / CONFIG_FILE).read_bytes())
    assert len(made) == 1


@pytest.mark.parametrize("changes", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"proj": 2}}], ids=str)
def test_a_config_of_another_adapter_is_refused(changes, tmp_path):
    write_adapter(adapter(3), tmp_path)
    edit(tmp_path, **changes)
    (key,) = changes
    with pytest.raises(ValueError, match=rf"adapter_config.json: has {key}=.*were saved with {key}=") as error:
        read_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_what_does_not_change_the_function_may_be_edited(tmp_path):
    write_adapter(adapter(3), tmp_path)
    edit(tmp_path, base_model_name_or_path="base-5", revision=None, target_modules=["proj"], rank_pattern=None)
    found = read_adapter(tmp_path)
    assert found.base_model == "base-5" and found.layers["layers.0.proj"].alpha == 3


def test_folders_without_our_metadata_are_read_as_they_are(tmp_path):
    write_adapter(adapter(3), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})  # as PEFT
    edit(tmp_path, lora_alpha=7)
    assert read_adapter(tmp_path).layers["layers.0.proj"].alpha == 7


def test_a_missing_config_is_read_from_its_copy(tmp_path):
    write_adapter(adapter(3), tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.warns(UserWarning, match="adapter_config.json: is missing, as after a save that was interrupted"):
        assert number_of(read_adapter(tmp_path)) == 3


@pytest.mark.parametrize("rank", [2, 3])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(rank, tmp_path, monkeypatch):
    """safetensors opens it twice: the header was that of one adapter, and the values those of another."""
    write_adapter(adapter(3), tmp_path)
    monkeypatch.setattr(peft_reader, "PATIENCE", 60.0)
    real, opened = peft_reader.open_safetensors, []

    @contextmanager
    def replaced(path):
        opened.append(path)
        with real(path) as file:
            if len(opened) == 1:
                write_adapter(adapter(4, rank), tmp_path)
            yield file

    monkeypatch.setattr(peft_reader, "open_safetensors", replaced)
    found = read_adapter(tmp_path)
    assert number_of(found) == 4 and found.r == rank and len(opened) > 1


@posix
def test_a_new_config_never_has_the_inode_number_of_the_one_that_was_read(tmp_path, monkeypatch):
    """While a reader has the config of 3 and the weights of 4, a writer saves 3 again.

    A file system can give the new config the inode number of the first one, and its clock has steps of milliseconds,
    so the config seemed to be the same and to belong to the weights of 4 (1 of 10,000 reads beside two writers).
    """
    write_adapter(adapter(3), tmp_path / "read")
    path, (real_json, real_weights) = (
        tmp_path / "read" / CONFIG_FILE,
        (peft_reader.read_json, peft_reader._read_weights),
    )
    first, steps = path.stat(), ["save 4 after the config is read", "save 3 after the weights are read"]

    def read_json(*arguments):
        config = real_json(*arguments)
        if len(steps) == 2:
            steps.pop()
            write_adapter(adapter(4), tmp_path / "read")
        return config

    def read_weights(*arguments):
        found = real_weights(*arguments)
        if len(steps) == 1:
            steps.pop()
            write_adapter(adapter(3), tmp_path / "read")
            text = path.read_text()
            path.unlink()
            copies = [tmp_path / "read" / str(number) for number in range(200)]
            for copy in copies:
                copy.write_text(text)
            min(copies, key=lambda copy: copy.stat().st_ino != first.st_ino).rename(path)
            os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns))
        return found

    monkeypatch.setattr(peft_reader, "PATIENCE", 60.0)
    monkeypatch.setattr(peft_reader, "read_json", read_json)
    monkeypatch.setattr(peft_reader, "_read_weights", read_weights)
    assert number_of(read_adapter(tmp_path / "read")) == 3


@posix
@pytest.mark.filterwarnings("ignore:.*is missing, as after a save that was interrupted")
@pytest.mark.parametrize("same_config", [False, True])
def test_a_kill_at_any_step_leaves_the_old_adapter_or_the_new_one(same_config, tmp_path, monkeypatch):
    """The process ends before each of its changes to the folder; PEFT finds one of the two, or no config."""
    second = adapter(4)
    if same_config:
        first, shared = adapter(3), peft_files.peft_config(second)
        monkeypatch.setattr(peft_files, "peft_config", lambda _: shared)
    else:
        first = adapter(3)
    fork, outcomes = multiprocessing.get_context("fork"), []

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
        found = read_adapter(tmp_path / "adapter")
        number = int(found.layers["layers.0.proj"].lora_A[0, 0]) if same_config else number_of(found)
        outcomes.append((process.exitcode, number))
        config = tmp_path / "adapter" / CONFIG_FILE
        if config.exists():  # what PEFT, which checks nothing, reads
            values = {float(value.view(-1)[0]) for value in load_file(tmp_path / "adapter" / WEIGHTS_FILE).values()}
            assert same_config or values == {json.loads(config.read_text())["lora_alpha"]}
    codes, numbers = zip(*outcomes, strict=True)
    steps = 2 if same_config else 3  # of the config, which is removed first if it differs, and of the weights
    assert codes == (9,) * steps + (0,) * (5 - steps)
    assert set(numbers) == {3, 4}


@pytest.mark.filterwarnings("ignore:.*is missing, as after a save that was interrupted")
def test_no_flipped_bit_changes_what_is_read(tmp_path):
    write_adapter(adapter(3), tmp_path)
    expected, draw = read_adapter(tmp_path), random.Random(0)
    refused = []
    for name, count in ((WEIGHTS_FILE, 400), (CONFIG_FILE, 200)):
        good = (tmp_path / name).read_bytes()
        for _ in range(count):
            bit = draw.randrange(8 * len(good))
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            (tmp_path / name).write_bytes(bad)
            try:
                found = read_adapter(tmp_path)
            except ValueError as error:
                refused.append(str(error))
                continue
            assert content(found) == content(expected), (name, bit)
        (tmp_path / name).write_bytes(good)
    assert len(refused) > 400
    assert all(str(tmp_path) in line and "\n" not in line for line in refused)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    broken = adapter(3)
    broken.layers["layers.1.proj"].lora_B[1, 1] = value
    write_adapter(broken, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: key '.*1.proj.lora_B.weight' holds NaN or Inf"):
        read_adapter(tmp_path)
