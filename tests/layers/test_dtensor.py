"""FSDP2 on two processes: the same numbers as one process has, checkpoints, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_qlora import load_from_checkpoint
from lightning_qlora.tools.cli import main
from tests.conftest import launch
from tests.scripts.fsdp_training import Llama
from tests.toys import toy

pytest.importorskip("transformers")


def run(folder, *arguments, devices=2):
    folder.mkdir()
    return launch("tests.scripts.fsdp_training", folder, *arguments, devices=devices)[1]


def adapters_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_ranks(ranks):
    """All have the same, and a run that resumed has what one that never stopped has."""
    for name, value in ranks[0]["straight"].items():
        assert torch.equal(value, ranks[1]["straight"][name])
        assert torch.equal(value, ranks[0]["resumed"][name])


@pytest.mark.parametrize(
    ("loop", "single_file"),
    [
        ("trainer", False),
        ("fabric", True),
        pytest.param("trainer", True, marks=pytest.mark.slow),
        pytest.param("fabric", False, marks=pytest.mark.slow),
    ],
)
def test_sharded_training_is_that_of_one_device_and_resumes_exactly(loop, single_file, tmp_path):
    ranks = run(tmp_path / "two", loop, 2, single_file)
    (alone,) = run(tmp_path / "one", loop, 1, single_file, devices=1)
    check_ranks(ranks)
    torch.testing.assert_close(ranks[0]["straight"], alone["straight"], atol=1e-4, rtol=1e-4)
    assert adapters_in(tmp_path / "two/adapter0").keys() == adapters_in(tmp_path / "one/adapter0").keys()
    if loop == "trainer":
        newest = (tmp_path / "two/during/newest").read_text().strip()
        torch.testing.assert_close(
            adapters_in(tmp_path / "two/during" / newest), adapters_in(tmp_path / "two/adapter0"), atol=0, rtol=0
        )
        assert "another base" in ranks[0]["refused"]
        assert "4-bit + adapter" in ranks[0]["report"]


def test_a_transformers_model_that_is_loaded_and_sharded_in_configure_model(tmp_path, capsys):
    """With 8-bit AdamW, accumulation, clipping and recomputation; its checkpoint in shards is read without ranks."""
    toy("llama").save_pretrained(tmp_path / "llama")
    ranks = run(tmp_path / "two", "llama", 2, False, 'optimizer="PagedAdamW8bit"')
    check_ranks(ranks)
    (alone,) = run(tmp_path / "one", "llama", 1, True, 'optimizer="PagedAdamW8bit"', devices=1)
    torch.testing.assert_close(ranks[0]["losses"], alone["losses"], atol=1e-3, rtol=1e-3)

    shards, file = str(tmp_path / "two/half.ckpt"), str(tmp_path / "one/half.ckpt")
    of_shards, of_file = (load_from_checkpoint(Llama, path).state_dict() for path in (shards, file))
    assert of_shards.keys() == of_file.keys()
    for name in (name for name in of_file if name.endswith("fingerprint")):
        assert torch.equal(of_shards[name], of_file[name])
    main(["export", shards, str(tmp_path / "exported")])
    assert adapters_in(tmp_path / "exported").keys() == adapters_in(tmp_path / "two/adapter0").keys()
    main(["inspect", shards])
    assert "Lightning checkpoint of a converted module" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("single_file", [False, True], ids=["shards", "one file"])
@pytest.mark.parametrize(
    ("loop", "argument"),
    [
        ("fabric", 'init_lora_weights="pissa"'), ("fabric", 'checkpoint="full"'), ("fabric", "use_dora=true"),
        ("fabric", 'policy="bf16"'), ("trainer", "lora_dropout=0.1"), ("trainer", 'init_lora_weights="calibrated"'),
    ],
)  # fmt: skip
def test_other_arguments_resume_exactly_too(loop, argument, single_file, tmp_path):
    check_ranks(run(tmp_path / "two", loop, 2, single_file, argument))
