"""Damaged checkpoints are refused: by the checksum of each entry, and by the CRC-32 of each part of the file."""

import io
import random
import warnings
import zipfile

import pytest
import torch
from lightning.fabric import Fabric

from lightning_qlora import QLoRAPrecision, convert, load_from_checkpoint
from lightning_qlora.adapters.checksums import CHECKSUMS_KEY
from lightning_qlora.adapters.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from lightning_qlora.layers.fingerprint import checksum
from tests.conftest import Classifier, loader, save_shards
from tests.toys import perturb


def converted(**arguments):
    module = Classifier()
    convert(module, r=4, **arguments)
    return module


@pytest.fixture(params=["adapter", "full"])
def checkpoint(request, trainer, tmp_path):
    run = trainer(plugins=QLoRAPrecision(r=4, checkpoint=request.param), max_steps=2)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


@pytest.mark.parametrize("arguments", [{}, {"checkpoint": "full"}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_changed_value_of_any_entry_is_refused_by_its_name(arguments):
    state = perturb(converted(**arguments)).state_dict()
    for key, value in state.items():
        damaged = value.clone()
        damaged.view(-1).view(torch.uint8)[0] ^= 4
        with pytest.raises(ValueError, match=f"'?{key}'? is (not what was saved|damaged)") as error:
            converted(**arguments).load_state_dict({**state, key: damaged})
        assert "\n" not in str(error.value)
    converted(**arguments).load_state_dict(state)


def test_a_module_inside_another_has_its_own_checksums():
    outer = torch.nn.Sequential(perturb(converted()), torch.nn.Linear(8, 8))
    state = outer.state_dict()
    assert f"0.{CHECKSUMS_KEY}" in state
    other = torch.nn.Sequential(converted(), torch.nn.Linear(8, 8))
    other.load_state_dict(state)
    state["0.net.0.lora_B"][0, 0] += 1
    with pytest.raises(ValueError, match=r"0\.net\.0\.lora_B"):
        other.load_state_dict(state)


def test_a_checkpoint_without_checksums_is_read_as_it_is(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"][CHECKSUMS_KEY]
    content["state_dict"]["net.0.lora_B"][0, 0] = 3.0
    torch.save(content, checkpoint)
    assert load_from_checkpoint(Classifier, checkpoint).net[0].lora_B[0, 0] == 3.0


def test_a_part_of_a_state_is_loaded_if_that_is_asked_for():
    state = perturb(converted()).state_dict()
    part = {key: value for key, value in state.items() if "lora" in key}
    target = converted()
    target.load_state_dict(part, strict=False)
    assert torch.equal(target.net[0].lora_B, state["net.0.lora_B"])
    target.load_state_dict({**part, CHECKSUMS_KEY: state[CHECKSUMS_KEY]}, strict=False)


def test_a_deleted_fingerprint_is_a_missing_key():
    state = perturb(converted()).state_dict()
    for key in [key for key in state if key.endswith(".fingerprint")]:
        with pytest.raises(RuntimeError, match=rf"Missing key.*{key.removesuffix('.fingerprint')}"):
            converted().load_state_dict({name: value for name, value in state.items() if name != key})


@pytest.mark.parametrize("key", ["net.0.lora_A", "net.4.lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_that_is_not_finite_is_refused(key, value):
    module = converted()
    with torch.no_grad():
        module.get_parameter(key)[1, 1] = value
    with pytest.raises(ValueError, match=f"{key}: holds NaN or Inf"):
        converted().load_state_dict(module.state_dict())


def test_fabric_checks_too(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(r=4))
    module = fabric.setup(Classifier())
    fabric.save(tmp_path / "x.ckpt", {"model": module})
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["model"]["net.0.lora_A"][0, 0] += 1
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"'net.0.lora_A' is not what was saved"):
        fabric.load(tmp_path / "x.ckpt", {"model": module})
    with pytest.raises(ValueError, match=r"x.ckpt: 'net.0.lora_A' is not what was saved"):
        read_adapter_from_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("in_shards", [False, True])
def test_fabric_checks_the_crc_of_every_part_of_the_file(in_shards, tmp_path):
    """Of the optimizer's state, for example, which has no checksum of its own."""
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(r=4))
    module, marked = fabric.setup(Classifier()), torch.arange(1000.0, 1016.0)
    state = {"model": module, "moments": marked}
    if in_shards:
        path = save_shards(tmp_path / "x.ckpt", {**state, "model": module.state_dict()}, {}) / "__0_0.distcp"
    else:
        fabric.save(path := tmp_path / "x.ckpt", state)
        assert torch.equal(fabric.load(path)["moments"], marked)
    content = path.read_bytes()
    place = content.index(bytes(marked.view(torch.uint8).tolist()))
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    for load in (lambda: fabric.load(tmp_path / "x.ckpt", state), lambda: fabric.load_raw(tmp_path / "x.ckpt", module)):
        with pytest.raises(ValueError, match=r"x\.ckpt.*: its part '.*' is damaged \(CRC-32\)"):
            load()


def test_a_part_of_the_file_that_is_no_weight_is_checked_by_its_crc(checkpoint, trainer):
    """The optimizer's state, which has no checksum of its own."""
    content = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    moment = next(iter(state.values()))["exp_avg"]
    place = content.index(bytes(moment.contiguous().view(-1).view(torch.uint8).tolist()))
    checkpoint.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    resume = trainer(plugins=QLoRAPrecision(r=4), max_steps=4)
    for load in (
        lambda: load_from_checkpoint(Classifier, checkpoint),
        lambda: read_checkpoint(checkpoint),
        lambda: resume.fit(Classifier(), loader(), ckpt_path=checkpoint),
    ):
        with pytest.raises(ValueError, match=r"x.ckpt: its part '.*data/\d+' is damaged") as error:
            load()
        assert "\n" not in str(error.value)


def test_files_without_crc_are_read(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, checkpoint)
    finally:
        torch.serialization.set_crc32_options(True)
    assert not any(part.CRC for part in zipfile.ZipFile(checkpoint).infolist())
    load_from_checkpoint(Classifier, checkpoint)


def test_no_flipped_bit_changes_what_is_loaded(checkpoint):
    x, draw, good = torch.randn(3, 64), random.Random(0), checkpoint.read_bytes()
    expected, refused = load_from_checkpoint(Classifier, checkpoint).eval()(x), []
    for _ in range(150):
        bit = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        checkpoint.write_bytes(bad)
        try:
            module = load_from_checkpoint(Classifier, checkpoint)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert torch.equal(module.eval()(x), expected), bit
    assert len(refused) > 50
    assert not [line for line in refused if "x.ckpt" not in line or "\n" in line]


def test_a_checksum_is_that_of_the_values_whatever_their_layout():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        value = torch.randn(5, 7).mul(3).clamp(min=0).to(dtype)
        assert checksum(value) == checksum(value.T.contiguous().T) == checksum(value.clone())
        assert checksum(value) != checksum(value.T)
    assert checksum(torch.tensor(1.0, dtype=torch.float64)) != checksum(torch.tensor(1.0 + 2**-50, dtype=torch.float64))
    assert checksum(torch.empty(0)) == checksum(torch.empty(0, 3))
    saved = io.BytesIO()
    torch.save(value := torch.tensor(3), saved)
    saved.seek(0)
    assert checksum(torch.load(saved)) == checksum(value)


def test_resuming_with_other_kernels_is_a_warning(checkpoint, trainer):
    content = torch.load(checkpoint, weights_only=True)
    (state,) = (value for key, value in content.items() if "QLoRAPrecision" in key)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint was trained with")
        trainer(plugins=QLoRAPrecision(r=4), max_steps=3).fit(Classifier(), loader(), ckpt_path=checkpoint)
        del state["kernels"]  # as in older checkpoints
        torch.save(content, checkpoint)
        trainer(plugins=QLoRAPrecision(r=4), max_steps=3).fit(Classifier(), loader(), ckpt_path=checkpoint)
    state["kernels"] = "Triton kernels"
    torch.save(content, checkpoint)
    with pytest.warns(UserWarning, match="was trained with Triton kernels, and this run computes with"):
        trainer(plugins=QLoRAPrecision(r=4), max_steps=3).fit(Classifier(), loader(), ckpt_path=checkpoint)
