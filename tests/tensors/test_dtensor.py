"""FSDP2 on two processes: the same numbers as one process has, checkpoints, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_qlora import load_from_checkpoint
from lightning_qlora.tools.cli import main
from tests.conftest import fingerprints, launch
from tests.scripts.fsdp_training import Llama, train
from tests.toys import assert_equal, toy

pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("one_rank")


def run(folder, *cases):
    """What each rank has of each case: a loop, if checkpoints are single files, and arguments."""
    folder.mkdir()
    return zip(*launch("tests.scripts.fsdp_training", folder, *map(json.dumps, cases))[1], strict=True)


def adapters_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_ranks(ranks):
    """All have the same, and a run that resumed has what one that never stopped has."""
    for values in (ranks[1]["straight"], ranks[0]["resumed"]):
        assert_equal(values, ranks[0]["straight"])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of three loops on two ranks, the arguments of the last one, and what each rank has of each."""
    folder = tmp_path_factory.mktemp("fsdp")
    toy("llama", num_hidden_layers=1).bfloat16().save_pretrained(folder / "base")
    of_llama = {
        "folder": str(folder / "base"),
        "modules_to_save": ["input_layernorm", "lm_head"],
    }
    trainer, fabric, llama = run(
        folder / "two", ("trainer", False, {}), ("fabric", True, {}), ("llama", False, of_llama)
    )
    return folder / "two", of_llama, {"trainer": trainer, "fabric": fabric, "llama": llama}


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
def test_sharded_training_is_that_of_one_device_and_resumes_exactly(loop, two, tmp_path):
    """The Trainer's checkpoints are in shards, and Fabric's in one file."""
    folder, _, ranks_of = two
    ranks = ranks_of[loop]
    _, alone = train(tmp_path, 1, loop, loop == "fabric")
    check_ranks(ranks)
    torch.testing.assert_close(ranks[0]["straight"], alone["straight"], atol=1e-4, rtol=1e-4)
    assert adapters_in(folder / loop / "adapter0").keys() == adapters_in(tmp_path / "adapter0").keys()
    if loop == "trainer":
        assert "another base" in ranks[0]["refused"]
        assert "4-bit + adapter" in ranks[0]["report"]


def test_a_transformers_model_that_is_loaded_and_sharded_in_configure_model(two, tmp_path, capsys):
    """With accumulation, clipping, recomputation, and parts that train in full in fp32.

    Its checkpoint in shards is read without ranks.
    """
    folder, arguments, ranks_of = two
    ranks = ranks_of["llama"]
    check_ranks(ranks)
    assert {value.dtype for value in ranks[0]["straight"].values()} == {torch.float32}
    _, alone = train(tmp_path, 1, "llama", True, **arguments)
    torch.testing.assert_close(ranks[0]["losses"], alone["losses"], atol=1e-3, rtol=1e-3)

    shards = str(folder / "llama/half.ckpt")
    of_shards = load_from_checkpoint(Llama, shards).state_dict()
    of_file = load_from_checkpoint(Llama, str(tmp_path / "half.ckpt")).state_dict()
    assert of_shards.keys() == of_file.keys()
    assert fingerprints(of_shards) == fingerprints(of_file) != {}
    main(["export", shards, str(tmp_path / "exported")])
    assert adapters_in(tmp_path / "exported").keys() == adapters_in(folder / "llama/adapter0").keys()
    main(["inspect", shards])
    assert "trained on" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("single_file", [False, True], ids=["shards", "one file"])
@pytest.mark.parametrize(
    ("loop", "arguments"),
    [
        ("fabric", {}),
        ("fabric", {"checkpoint": "full"}),
        ("fabric", {"use_dora": True}),
        ("fabric", {"policy": "bf16"}),
        ("trainer", {}),
        ("trainer", {"lora_dropout": 0.1}),
        ("trainer", {"init_lora_weights": "calibrated"}),
    ],
)
def test_other_arguments_resume_exactly_too(loop, arguments, single_file, tmp_path):
    (ranks,) = run(tmp_path / "two", (loop, single_file, arguments))
    check_ranks(ranks)
