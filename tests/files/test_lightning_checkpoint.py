"""Reading a checkpoint runs no code of its files, unless the user says weights_only=False."""

import io
import pickle
import re
import sys
from types import ModuleType

import pytest
import torch
from lightning.fabric.utilities import cloud_io

from lightning_qlora import convert, load_from_checkpoint, save_adapter
from lightning_qlora.files.lightning_checkpoint import is_shards, read_checkpoint
from lightning_qlora.tools.cli import main
from tests.conftest import Classifier, raises_in_one_line
from tests.toys import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ran = []


def run(what):
    ran.append(what)


class Code:
    """A pickle that calls `run`."""

    def __reduce__(self):
        return run, ("code",)


@pytest.fixture(autouse=True)
def _nothing_ran():
    ran.clear()


def save_shards(folder, values, rest):
    """A checkpoint in shards, as ModelParallelStrategy writes it, of one process."""
    torch.distributed.checkpoint.save(values, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")
    return folder


STATE = {
    "state_dict": {"w": torch.arange(12.0).view(3, 4).to(torch.bfloat16), "u": torch.ones(2, dtype=torch.uint8)},
    "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": "a"}],
}


@pytest.fixture
def shards(tmp_path):
    return lambda state=STATE, meta=None: save_shards(tmp_path / "shards.ckpt", state, meta or {"epoch": 3})


@pytest.mark.parametrize("weights_only", [True, False])
def test_shards_come_back(weights_only, shards):
    content = read_checkpoint(shards(), weights_only)
    assert_equal(content["state_dict"], STATE["state_dict"])
    assert (content["groups"], content["epoch"]) == (STATE["groups"], 3)


def test_shards_of_another_system_come_back(shards):
    folder = shards()
    index = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=2)
    for path in (b"cpathlib\nWindowsPath", b"cpathlib._local\nPosixPath"):
        changed = re.sub(rb"cpathlib\S*\n\w+", path, index)
        assert path in changed
        (folder / ".metadata").write_bytes(changed)
        assert read_checkpoint(folder)["epoch"] == 3


def test_a_folder_with_files_of_a_model_or_an_adapter_is_no_checkpoint(shards):
    folder = shards()
    assert is_shards(folder)
    for name in ("adapter_config.json", "config.json", "model.safetensors", "model.safetensors.index.json"):
        (folder / name).touch()
        assert not is_shards(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("place", ["index", "value", "meta"])
def test_code_in_shards_runs_only_if_asked(place, shards):
    state = {**STATE, "hyper": Code()} if place == "value" else STATE
    folder = shards(state, {"hyper": Code()} if place == "meta" else None)
    if place == "index":
        index = pickle.loads((folder / ".metadata").read_bytes())
        index.storage_meta = Code()
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    with raises_in_one_line(ValueError, r"tests\.files\.test_lightning_checkpoint\.run.*weights_only=False"):
        read_checkpoint(folder)
    assert not ran
    read_checkpoint(folder, weights_only=False)
    assert ran


@pytest.mark.parametrize("name", ["../a.distcp", "/a.distcp", "b/a.distcp", ".."])
def test_a_shard_outside_of_the_folder_is_refused(name, shards):
    folder = shards()
    index = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="not a file of this folder"):
        read_checkpoint(folder)


@pytest.mark.parametrize("planted", [".metadata", "meta.pt"])
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_planted_file_beside_an_adapter_or_a_model_is_not_read(kind, planted, tmp_path, capsys):
    folder = tmp_path / "folder"
    if kind == "adapter":
        module = Classifier()
        convert(module, r=4)
        save_adapter(module, folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    if planted == "meta.pt":
        torch.save({"a": Code()}, folder / planted)
    else:
        (folder / planted).write_bytes(pickle.dumps(Code()))
    assert not is_shards(folder)
    for flag in ([], ["--weights_only", "false"]):
        if kind == "adapter":
            main(["inspect", str(folder), *flag])
            assert "trained on" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                main(["inspect", str(folder), *flag])
            assert "adapter_config.json: no such file" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="not of a checkpoint"):
        load_from_checkpoint(Classifier, folder)
    assert not ran


def test_code_in_a_checkpoint_from_the_network_is_not_run(monkeypatch):
    file = io.BytesIO()
    torch.save({"state_dict": {}, "hyper": Code()}, file)

    def download(url, map_location, weights_only):
        file.seek(0)
        return torch.load(file, map_location, weights_only=weights_only)

    monkeypatch.setattr(cloud_io.torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(ValueError, match="weights_only=False"):
        load_from_checkpoint(Classifier, "https://example.org/a.ckpt")
    assert not ran


def test_a_truncated_index_is_one_line(shards):
    folder = shards()
    good = (folder / ".metadata").read_bytes()
    for position in range(0, len(good), 197):
        (folder / ".metadata").write_bytes(good[:position])
        with raises_in_one_line(ValueError, rf"{re.escape(str(folder))}.*not a checkpoint, or truncated"):
            read_checkpoint(folder)


def test_a_class_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "was_here", ModuleType("was_here"))
    sys.modules["was_here"].Kind = type("Kind", (), {"__module__": "was_here"})
    torch.save({"hyper_parameters": sys.modules["was_here"].Kind()}, tmp_path / "x.ckpt")
    monkeypatch.delitem(sys.modules, "was_here")
    with pytest.raises(ValueError, match=r"x.ckpt: holds an object whose class cannot be imported \(No module named"):
        read_checkpoint(tmp_path / "x.ckpt", weights_only=False)
