"""What commands and loading do with files that somebody changed: one error, and nothing else is read or printed."""

import json
import os
import re
import socket
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_qlora import convert, estimate_memory, load_from_checkpoint, save_adapter
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.checkpoints.saved_conversion import entry_of
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from lightning_qlora.huggingface.base_folder import gguf_of
from lightning_qlora.survey.records import CONVERSION
from lightning_qlora.tools.cli import main
from tests.conftest import Classifier, raises_in_one_line
from tests.files.test_lightning_checkpoint import STATE, save_shards
from tests.toys import assert_equal, toy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TYPES = {
    "meta": lambda value: torch.empty_like(value, device="meta"),
    "sparse": lambda value: value.to_sparse(),
    "csr": lambda value: value.view(len(value), -1).to_sparse_csr(),
    "quantized": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8),
    "expanded": lambda value: torch.zeros((), dtype=value.dtype).expand(10**12, 10**6),
}


@pytest.fixture
def write(tmp_path):
    """A checkpoint of a converted module with a part that trains in full, with changes of its state."""

    def save(change=lambda state: None, text=lambda content: None):
        module = Classifier()
        convert(module, r=4, checkpoint="full", modules_to_save=["4"])
        state = module.state_dict()
        content = json.loads(bytes(state[CONVERSION].tolist()))
        text(content)
        state[CONVERSION] = entry_of(json.dumps(content))
        change(state)
        path = tmp_path / "x.ckpt"
        saved = {"state_dict": state, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.0", "loops": {}}
        torch.save(saved, path)
        return module, path

    return save


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("key", ["net.0.weight", "net.0.weight.absmax", "net.0.lora_A", "net.4.weight", CONVERSION])
def test_tensors_of_strange_kinds_are_refused(key, kind, write):
    def change(state):
        state[key] = TYPES[kind](state[key])

    _, path = write(change)
    for read in (read_adapter_from_checkpoint, lambda path: main(["export", str(path), "out"])):
        with pytest.raises((ValueError, SystemExit)) as raised:
            read(str(path))
        assert isinstance(raised.value, SystemExit) or re.match(rf".*x\.ckpt.*{re.escape(key)}", str(raised.value))
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    "stack",
    [
        [2, 2 * 10**9, False, False, False], [2 * 10**9, 10**9, False, False, False], [0, 0, False, False, False],
        [2, -1, False, False, False], [True, 0, False, False, False], [2, 0, 0, False, False], [2.0, 0, 1, 1, 1],
        [2, 0], [2, 0, False, False, False, False], None, "ab",
    ],
    ids=str,
)  # fmt: skip
def test_experts_that_no_model_has_are_refused(stack, write):
    _, path = write(text=lambda content: content["base"].update(experts={"net.0.weight": stack}))
    with raises_in_one_line(ValueError, f"x.ckpt: .*{CONVERSION}: is damaged"):
        read_adapter_from_checkpoint(path)


@pytest.mark.parametrize(("name", "value"), [("double_quant", 1), ("block_size", 64.0)])
def test_an_equal_value_of_another_type_is_refused(name, value, write):
    module, path = write(text=lambda content: content["base"]["quantization"].update({name: value}))
    with raises_in_one_line(ValueError, f"x.ckpt: .*{CONVERSION}: is damaged.*{name}={value}: must be"):
        read_adapter_from_checkpoint(path)
    with pytest.raises(ValueError, match=f"{CONVERSION}: is damaged.*{name}={value}: must be"):
        module.load_state_dict(read_checkpoint(path)["state_dict"])


def test_a_base_of_another_format_is_an_error_that_names_the_file(write):
    def change(state):
        state["net.0.weight.nested_quant_map"] = state["net.0.weight.nested_quant_map"] + 1

    _, path = write(change)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: net\.0.*is not the table of levels"):
        read_adapter_from_checkpoint(path)


def test_an_argument_of_layers_that_was_removed_is_left_out(write, tmp_path):
    """It is accepted on loading; reading the file without the module failed with a KeyError."""
    module, path = write(text=lambda content: content["base"]["layers"].update({"0": {"loftq_config": {}}}))
    assert read_adapter_from_checkpoint(path)
    main(["export", str(path), str(tmp_path / "adapter")])
    module.load_state_dict(read_checkpoint(path)["state_dict"])


def test_an_adapter_that_a_checkpoint_names_is_not_read(write, tmp_path, monkeypatch):
    """On Windows the user's credentials would be sent to a computer that it names."""
    module, path = write()
    save_adapter(module, tmp_path / "private")
    asked = []
    for name in ("exists", "isfile", "isdir", "stat"):
        original = getattr(os, name, None) or getattr(os.path, name)
        owner = os if name == "stat" else os.path
        monkeypatch.setattr(
            owner, name, lambda path, *a, _f=original, **k: asked.append(str(path)) or _f(path, *a, **k)
        )
    for folder in (str(tmp_path / "private"), str(tmp_path / "nowhere"), r"\\host\private", 3):
        write(text=lambda content, folder=folder: content["config"].update(adapter=folder))
        assert read_adapter_from_checkpoint(path)
        assert_equal(load_from_checkpoint(Classifier, path).state_dict(), module.state_dict())
    assert asked and not [path for path in asked if "private" in path or "nowhere" in path]


# ---------------------------------------------------------------- what reaches the terminal

HIDDEN = "\x1b]52;c;Y3VybCBldmlsfHNo\x07\nquantization                   forged\r\x1b[8m\x9b2J\u202e"


@pytest.fixture
def printed(capsys):
    """What a command prints, which has no character but those of lines of text."""

    def run(*arguments):
        capsys.readouterr()
        with suppress(SystemExit):
            main(list(map(str, arguments)))
        both = capsys.readouterr()
        lines = (both.out + both.err).splitlines()
        assert all(line.isprintable() for line in lines), both
        assert not any(line.startswith("quantization                   forged") for line in lines)
        return both

    return run


def test_texts_of_a_file_do_not_move_the_cursor_or_make_lines(write, tmp_path, printed):
    _, path = write(text=lambda content: content["base"].update(base_model=HIDDEN, target_modules=HIDDEN))
    for arguments in (["inspect", path], ["inspect", path, "--json"], ["export", path, tmp_path / "adapter"]):
        assert "52;c;" in printed(*arguments).out
    adapter = tmp_path / "adapter"
    for arguments in (["inspect", adapter], ["merge", adapter, tmp_path / "out"]):
        assert "52;c;" in "".join(printed(*arguments))
    weights = adapter / "adapter_model.safetensors"
    without_line = HIDDEN.replace("\n", "")
    tensors = {key.replace(".0.", f".{without_line}."): value for key, value in load_file(weights).items()}
    save_file(tensors, weights)
    assert "52;c;" in printed("inspect", adapter).out
    save_file({key: value * torch.nan if "lora" in key else value for key, value in tensors.items()}, weights)
    assert "52;c;" in printed("inspect", adapter).err


def test_errors_of_checkpoints_and_models_are_lines_of_text(write, tmp_path, printed):
    pytest.importorskip("transformers")
    _, path = write(lambda state: state.update({f"net.{HIDDEN}.lora_A": torch.ones(3)}))
    assert "52;c;" in printed("inspect", path).err
    _, path = write(text=lambda content: content["config"].update(quant_type=HIDDEN))
    assert "52;c;" in printed("inspect", path).err
    toy("llama").config.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for name in ("model_type", "architectures", "attn_implementation", "quantization_config"):
        value = {"architectures": [HIDDEN], "quantization_config": {"quant_method": HIDDEN}}.get(name, f"a/{HIDDEN}")
        (tmp_path / "model/config.json").write_text(json.dumps({**config, name: value}))
        printed("plan", tmp_path / "model", "--sequence_length=8", "--r=4")
    folder = save_shards(tmp_path / "shards.ckpt", {HIDDEN: torch.ones(2)}, {})
    assert "holds no" in printed("inspect", folder).err


# ---------------------------------------------------------------- files that are none


@pytest.fixture
def pipe(monkeypatch):
    """Puts a pipe or a socket in the place of a file; reading a pipe has no end."""

    def put(path, kind="pipe"):
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            with socket.socket(socket.AF_UNIX) as server, monkeypatch.context() as here:
                here.chdir(path.parent)  # the address of a socket has 107 bytes at most
                server.bind(path.name)

    return put


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")


@needs_pipes
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_in_place_of_files_are_refused(kind, pipe, tmp_path):
    for name in (".metadata", "meta.pt", "__0_0.distcp"):
        folder = save_shards(tmp_path / f"{name[-3:]}.ckpt", STATE, {"epoch": 3})
        pipe(folder / name, kind)
        with raises_in_one_line(ValueError, rf"{name}: is a pipe, a socket or a device"):
            read_checkpoint(folder)
    module = nn.Sequential(nn.Linear(64, 64))
    convert(module, r=4)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        save_adapter(module, tmp_path / name[-4:])
        pipe(tmp_path / name[-4:] / name, kind)
        with raises_in_one_line(ValueError, rf"{name}: is a pipe, a socket or a device"):
            read_adapter(tmp_path / name[-4:])


@needs_pipes
@pytest.mark.timeout(60)
def test_pipes_in_a_model_are_refused(pipe, tmp_path, printed):
    pytest.importorskip("transformers")
    model = toy("llama")
    module = toy("llama")
    convert(module, r=4)
    save_adapter(module, tmp_path / "adapter")
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        model.save_pretrained(tmp_path / "base")
        pipe(tmp_path / "base" / name)
        out = printed("merge", tmp_path / "adapter", tmp_path / "out", f"--base_model={tmp_path / 'base'}")
        assert "is a pipe, a socket or a device" in out.err or "has no config.json" in out.err
        if name == "config.json":
            with raises_in_one_line((ValueError, FileNotFoundError), "config.json"):
                estimate_memory(str(tmp_path / "base"))
        (tmp_path / "base" / name).unlink()
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_that_a_folder_links_to_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "private.gguf").touch()
    (folder / "model.gguf").symlink_to("../private.gguf")
    with raises_in_one_line(ValueError, "model.gguf: is a symbolic link to .*private.gguf, outside of the folder"):
        gguf_of(folder)
    assert gguf_of(folder / "model.gguf") == folder / "model.gguf"  # the user named it
    snapshot = tmp_path / "models--a--b/snapshots/c"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/d").touch()
    (snapshot / "model.gguf").symlink_to("../../blobs/d")
    assert gguf_of(snapshot) == snapshot / "model.gguf"
