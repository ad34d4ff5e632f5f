"""FSDP2 on two processes: the same numbers as one process has, checkpoints, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_qlora import load_from_checkpoint
from lightning_qlora.tools.cli import main
from tests.conftest import fingerprints, launch
from tests.scripts.fsdp_training import Llama, train
from tests.toys import toy

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
    for name, value in ranks[0]["straight"].items():
        assert torch.equal(value, ranks[1]["straight"][name])
        assert torch.equal(value, ranks[0]["resumed"][name])


@pytest.mark.parametrize("of_trainer", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sharded_training_is_that_of_one_device_and_resumes_exactly(of_trainer, tmp_path):
    """Checkpoints in shards and in one file: one of them by the Trainer, the other one by Fabric."""
    cases = [("trainer", of_trainer, {}), ("fabric", not of_trainer, {})]
    for (loop, single_file, _), ranks in zip(cases, run(tmp_path / "two", *cases), strict=True):
        one, two = tmp_path / "one" / loop, tmp_path / "two" / loop
        _, alone = train(one, 1, loop, single_file)
        check_ranks(ranks)
        torch.testing.assert_close(ranks[0]["straight"], alone["straight"], atol=1e-4, rtol=1e-4)
        assert adapters_in(two / "adapter0").keys() == adapters_in(one / "adapter0").keys()
        if loop == "trainer":
            assert "another base" in ranks[0]["refused"]
            assert "4-bit + adapter" in ranks[0]["report"]


def test_a_transformers_model_that_is_loaded_and_sharded_in_configure_model(tmp_path, capsys):
    """With 8-bit AdamW, accumulation, clipping, recomputation, and parts that train in full in fp32.

    Its checkpoint in shards is read without ranks.
    """
    toy("llama").bfloat16().save_pretrained(tmp_path / "base")
    arguments = {
        "optimizer": "PagedAdamW8bit",
        "folder": str(tmp_path / "base"),
        "modules_to_save": ["input_layernorm", "lm_head"],
    }
    (ranks,) = run(tmp_path / "two", ("llama", False, arguments))
    check_ranks(ranks)
    assert {value.dtype for value in ranks[0]["straight"].values()} == {torch.float32}
    _, alone = train(tmp_path / "one/llama", 1, "llama", True, **arguments)
    torch.testing.assert_close(ranks[0]["losses"], alone["losses"], atol=1e-3, rtol=1e-3)

    shards, file = str(tmp_path / "two/llama/half.ckpt"), str(tmp_path / "one/llama/half.ckpt")
    of_shards, of_file = (load_from_checkpoint(Llama, path).state_dict() for path in (shards, file))
    assert of_shards.keys() == of_file.keys()
    assert fingerprints(of_shards) == fingerprints(of_file) != {}
    main(["export", shards, str(tmp_path / "exported")])
    assert adapters_in(tmp_path / "exported").keys() == adapters_in(tmp_path / "two/llama/adapter0").keys()
    main(["inspect", shards])
    assert "Lightning checkpoint of a converted module" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("single_file", [False, True], ids=["shards", "one file"])
@pytest.mark.parametrize(
    ("loop", "arguments"),
    [
        ("fabric", {"init_lora_weights": "pissa"}), ("fabric", {"checkpoint": "full"}), ("fabric", {"use_dora": True}),
        ("fabric", {"policy": "bf16"}), ("trainer", {"lora_dropout": 0.1}),
        ("trainer", {"init_lora_weights": "calibrated"}),
    ],
)  # fmt: skip
def test_other_arguments_resume_exactly_too(loop, arguments, single_file, tmp_path):
    (ranks,) = run(tmp_path / "two", (loop, single_file, arguments))
    check_ranks(ranks)
