"""Errors of damaged files and wrong calls are one line that helps."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAPrecision,
    convert,
    load_from_checkpoint,
    quantize,
    save_adapter,
)
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.checkpoints.saved_conversion import entry_of, text_of
from lightning_qlora.checks import DAMAGED, DIVERGED, NOT_FINITE
from lightning_qlora.files.folder_writer import atomic_files
from lightning_qlora.files.safetensors_folder import WeightFolder
from lightning_qlora.survey.records import CONVERSION
from lightning_qlora.tools.cli import main
from tests.conftest import Classifier, make_trainer, run_python


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with the adapters, one with the base as well, and an adapter folder."""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("adapter", "full"):
        trainer = make_trainer(folder, plugins=QLoRAPrecision(r=4, checkpoint=kind), max_epochs=0)
        module = Classifier()
        trainer.fit(module, [])
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
    save_adapter(module, folder / "adapter")
    return folder


@pytest.fixture
def changed(files, tmp_path):
    """Saves a checkpoint after a change of its state dict."""

    def save(change, kind="adapter"):
        content = torch.load(files / f"{kind}.ckpt", weights_only=True)
        change(content["state_dict"])
        torch.save(content, tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return save


def refused(load, *words, kind=ValueError):
    with pytest.raises(kind) as error:
        load()
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.999])
def test_a_truncated_checkpoint(share, files, tmp_path, capsys):
    content = (files / "adapter.ckpt").read_bytes()
    path = tmp_path / "x.ckpt"
    path.write_bytes(content[: int(share * len(content))])
    advice = DAMAGED if share else "Pass what the training wrote"
    refused(lambda: load_from_checkpoint(Classifier, path), path, "truncated", advice)
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(path) in line and "truncated" in line


def with_entry(name, value):
    """A change of the JSON of a conversion."""
    return lambda text: json.dumps({**json.loads(text), name: value}).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: b"\xff" + text[1:], ["is damaged", "Use another copy"]),
        (lambda text: b"[" + text[1:], ["is damaged", "Use another copy"]),
        (lambda text: b"[" * 100_000, ["is damaged", "Use another copy"]),
        (lambda text: b"[]", ["is damaged", "list"]),
        (with_entry("config", {"r": 0}), ["r=0: must be an integer >= 1"]),
        (with_entry("config", {"quant_type": "nf5"}), ["quant_type='nf5': must be one"]),
        (with_entry("base", 3), ["is damaged", "int"]),
        (with_entry("base", {"layers": {"a": {"r": 0}}}), ["r=0", "Use another copy"]),
        (with_entry("base", {"prefix": 3}), ["prefix=3: must be a str"]),
        (with_entry("base", {"trained_in_full": {}}), ["trained_in_full={}: must be a list"]),
        (with_entry("base", {"layers": [1]}), ["layers=[1]: must be a dict"]),
        (with_entry("base", {"experts": [1]}), ["experts=[1]: must be a dict"]),
        (with_entry("base", {"tokens": [1]}), ["tokens=[1]: must be a dict"]),
        (with_entry("config", {"of_2030": 1}), ["of_2030", "a newer version"]),
        (with_entry("fingerprints", {"net.0": "x"}), ["is damaged", "Use another copy"]),
    ],
)
def test_damaged_arguments_of_the_conversion(change, words, changed):
    def damage(state):
        state[CONVERSION] = torch.tensor(list(change(bytes(state[CONVERSION].tolist()))), dtype=torch.uint8)

    path = changed(damage)
    refused(lambda: load_from_checkpoint(Classifier, path), path.name, CONVERSION, *words)


def test_what_export_cant_read(changed, tmp_path):
    def without_base(state):
        text = with_entry("base", {})(bytes(state[CONVERSION].tolist()))
        state[CONVERSION] = torch.tensor(list(text), dtype=torch.uint8)

    def without_adapters(state):
        for key in [key for key in state if ".lora_" in key]:
            del state[key]

    for change, words in ((without_base, "does not name the base model"), (without_adapters, "no adapter")):
        path = changed(change)
        refused(lambda path=path: read_adapter_from_checkpoint(path), path, words)
    (tmp_path / "empty").mkdir()
    for read, words in (
        (read_adapter_from_checkpoint, "no checkpoint (no meta.pt in it)"),
        (WeightFolder, "has neither"),
    ):
        refused(lambda read=read: read(tmp_path / "empty"), tmp_path / "empty", words, kind=FileNotFoundError)
    refused(lambda: WeightFolder(tmp_path / "x"), tmp_path / "x", "no such folder", kind=FileNotFoundError)


def test_a_module_whose_layers_were_built_anew_refuses_adapters(files):
    module = Classifier()
    convert(module, r=4)
    module.net = Classifier().net
    state = torch.load(files / "adapter.ckpt", weights_only=True)["state_dict"]
    refused(lambda: module.load_state_dict(state), "Classifier has none", "its layers were built anew")


STATE, A = "net.0.weight.quant_state.bitsandbytes__nf4", "net.0.lora_A"


def name_another_argument(state):
    content = json.loads(text_of(state[CONVERSION]))
    content["base"]["layers"] = {"net.0": {"nonsense": 1}}
    state[CONVERSION] = entry_of(json.dumps(content))


def flip_a_bit(state):
    state[STATE] = state[STATE].clone()
    state[STATE][3] ^= 128


@pytest.mark.parametrize(
    ("kind", "change", "words", "error"),
    [
        ("full", flip_a_bit, [STATE, DAMAGED], ValueError),
        (
            "full",
            lambda state: state.update(quantize(torch.randn(64, 128)).bnb_state_dict("net.0.weight")),
            ["net.0: its weight", "[64, 128] in the checkpoint, [64, 64] here"],
            CheckpointMismatchError,
        ),
        (
            "adapter",
            lambda state: state.update({A: torch.ones(0, 64)}),
            ["net.0.lora_A: has rank 0", "The file is damaged"],
            ValueError,
        ),
        (
            "adapter",
            lambda state: state.update({A: torch.full((4, 64), torch.nan)}),
            [A, NOT_FINITE, DIVERGED],
            ValueError,
        ),
        (
            "adapter",
            name_another_argument,
            ["nonsense: there is no such argument", "are quant_type, double_quant, block_size, compute_dtype"],
            ValueError,
        ),
    ],
)
def test_a_wrong_entry_of_a_checkpoint(kind, change, words, error, changed):
    refused(lambda: load_from_checkpoint(Classifier, changed(change, kind)), *words, kind=error)


@pytest.mark.parametrize("harm", ["length", "json", "shape", "offset"])
def test_a_damaged_header_of_a_shard(harm, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4, 4)}, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length]
    bad = {
        "length": struct.pack("<Q", 1 << 60) + content[8:],
        "json": content[:8] + header.replace(b":", b";", 1) + content[8 + length :],
        "shape": content[:8] + header.replace(b"[4,4]", b"[4,5]") + content[8 + length :],
        "offset": content[:8] + header.replace(b"[0,64]", b"[9,64]") + content[8 + length :],
    }[harm]
    path.write_bytes(bad)
    refused(lambda: WeightFolder(tmp_path), path, DAMAGED)


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes")
def test_a_path_that_is_not_utf8(files, tmp_path, capsys):
    name = os.fsdecode(b"\xff")
    module = Classifier()
    convert(module, r=4)
    refused(lambda: save_adapter(module, tmp_path / name), r"\xff", "not UTF-8", "Choose another name")
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    for command in ("export", "merge"):
        with pytest.raises(SystemExit):
            main([command, str(files / "adapter.ckpt"), str(tmp_path / f"{name}out")])
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.endswith("safetensors reads no other. Choose another name.\n")


@pytest.mark.slow
def test_a_name_in_utf8_is_saved_and_loaded_in_another_locale(tmp_path):
    """There Python's own form of the name is not UTF-8."""
    folder = tmp_path / "für"
    folder.mkdir()
    code = (
        "import sys; from torch import nn; from lightning_qlora import convert, load_adapter, save_adapter\n"
        "assert not sys.argv[1].isprintable() and sys.getfilesystemencoding() == 'ascii'\n"
        "module = nn.Sequential(nn.Linear(64, 64)); convert(module, r=4)\n"
        "save_adapter(module, sys.argv[1]); load_adapter(module, sys.argv[1])"
    )
    run_python("-c", code, folder / "out", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (folder / "out" / "adapter_model.safetensors").is_file()


def test_a_full_disk_without_errno(tmp_path):
    def write():
        with atomic_files(tmp_path / "out"):
            raise OSError("disk quota exceeded, says some library")

    refused(write, kind=OSError)


@pytest.fixture(scope="module")
def layer():
    module = nn.Sequential(nn.Linear(64, 64))
    convert(module, r=4, lora_dropout=0.0)
    return module


def test_wrong_calls(layer):
    refused(lambda: layer(torch.tensor(1.0)), "0: x has no dimension, the layer takes 64.")
    refused(lambda: layer(torch.zeros(2, 512)), "0: x has 512 columns, the layer takes 64.")
    refused(lambda: layer(torch.zeros(2, 64, dtype=torch.int64)), "0: x: must be float32", kind=TypeError)


def test_a_forward_pass_on_the_meta_device_has_a_shape():
    module = nn.Sequential(nn.Linear(64, 32))
    convert(module, r=4)
    y = module.to("meta")(torch.randn(3, 5, 64, device="meta"))
    assert y.shape == (3, 5, 32) and y.is_meta
