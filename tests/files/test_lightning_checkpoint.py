"""Reading a checkpoint runs no code of its files, unless the user says weights_only=False."""

import io
import pickle
import random
import resource

import pytest
import torch
from lightning.fabric.utilities import cloud_io

from lightning_qlora import convert, load_from_checkpoint, save_adapter
from lightning_qlora.files.lightning_checkpoint import is_shards, read_checkpoint, read_index
from lightning_qlora.tools.cli import main
from tests.attack.processes import flipped
from tests.conftest import Classifier, save_shards

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


STATE = {
    "state_dict": {"w": torch.arange(12.0).view(3, 4).to(torch.bfloat16), "u": torch.ones(2, dtype=torch.uint8)},
    "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": "a"}],
}


@pytest.fixture
def shards(tmp_path):
    return lambda state=STATE, meta=None: save_shards(tmp_path / "shards.ckpt", state, meta or {"epoch": 3})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("weights_only", [True, False])
def test_shards_come_back(weights_only, shards):
    found = read_checkpoint(shards(), weights_only)
    for key, value in STATE["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value) and found["state_dict"][key].dtype == value.dtype
    assert (found["groups"], found["epoch"]) == (STATE["groups"], 3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("place", ["index", "value", "meta"])
def test_code_in_shards_runs_only_if_asked(place, shards):
    state = {**STATE, "hyper": Code()} if place == "value" else STATE
    folder = shards(state, {"hyper": Code()} if place == "meta" else None)
    if place == "index":
        index = pickle.loads((folder / ".metadata").read_bytes())
        index.planner_data["hyper"] = Code()
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"tests\.files\.test_lightning_checkpoint\.run.*weights_only=False") as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert not ran
    read_checkpoint(folder, weights_only=False)
    assert ran


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
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
            assert "PEFT adapter" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                main(["inspect", str(folder), *flag])
            assert "has neither model.safetensors nor" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="not of a checkpoint"):
        load_from_checkpoint(Classifier, folder)
    assert not ran


def test_code_in_a_checkpoint_from_the_network_is_not_run(monkeypatch):
    held = io.BytesIO()
    torch.save({"state_dict": {}, "hyper": Code()}, held)

    def download(url, map_location, weights_only):
        held.seek(0)
        return torch.load(held, map_location, weights_only=weights_only)

    monkeypatch.setattr(cloud_io.torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(ValueError, match="weights_only=False"):
        load_from_checkpoint(Classifier, "https://example.org/a.ckpt")
    assert not ran


@pytest.mark.filterwarnings("ignore")
def test_no_flipped_bit_of_shards_changes_what_is_read(shards):
    folder, draw = shards(), random.Random(1)
    good = read_checkpoint(folder)
    for file in sorted(folder.iterdir()):
        content, refused = file.read_bytes(), []
        for _ in range(60):
            file.write_bytes(flipped(content, draw))
            try:
                found = read_checkpoint(folder)
            except ValueError as error:
                refused.append(str(error))
                continue
            assert str(found) == str(good)
        file.write_bytes(content)
        assert len(refused) > 10
        assert not [line for line in refused if str(folder) not in line or "\n" in line]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_shard_is_named_with_its_entry(shards):
    shard = shards() / "__0_0.distcp"
    content = shard.read_bytes()
    place = content.index(bytes(STATE["state_dict"]["w"].view(torch.uint8).view(-1).tolist()))
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: 'state_dict\.w': its part '.*' is damaged \(CRC-32\)"):
        read_checkpoint(shard.parent)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_index_that_takes_a_value_from_another_place_is_refused(shards):
    folder = shards()
    index = pickle.loads((folder / ".metadata").read_bytes())
    one, other = list(index.storage_data.values())[:2]
    one.offset, one.length = other.offset, other.length
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="is not what the shards contain"):
        read_checkpoint(folder)


def test_a_damaged_index_takes_no_memory(tmp_path):
    """LONG_BINPUT stores an object at a number of 4 bytes, and pickle's code in C makes its list as long as that."""
    path, before = tmp_path / ".metadata", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_bytes(pickle.PROTO + b"\x04" + pickle.NONE + pickle.LONG_BINPUT + b"\x00\x00\x00\x04" + pickle.STOP)
    with pytest.raises(pickle.UnpicklingError):
        read_index(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; it was a GiB


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_truncated_index_is_one_line(shards):
    folder = shards()
    good = (folder / ".metadata").read_bytes()
    for position in range(0, len(good), 97):
        (folder / ".metadata").write_bytes(good[:position])
        with pytest.raises(ValueError, match=r"not a checkpoint, or truncated|is empty") as error:
            read_checkpoint(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", [4, 16], ids=["disk of the directory", "number of disks"])
def test_a_damaged_end_of_an_archive_is_one_line(field, tmp_path):
    file = tmp_path / "file.ckpt"
    torch.save(STATE, file)
    data = bytearray(file.read_bytes())
    at = data.rindex(b"PK\x06\x07")  # the ZIP64 locator, whose fields zipfile.is_zipfile reads as well
    data[at + field] = 7
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"file.ckpt: damaged or truncated \(.*disks"):
        read_checkpoint(file)
