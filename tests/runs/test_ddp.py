"""strategy="ddp" on two CPU processes, started by Lightning's own launcher."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_qlora import convert
from tests.conftest import dataset, launch, tensors
from tests.toys import assert_equal, toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    toy("llama").bfloat16().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each rank has of every fit of the script."""
    stdout, results = launch("tests.scripts.ddp_training", folder)
    assert stdout.count("parameters train") == len(results[0]) - 1, "the report of each fit is printed once, by rank 0"
    return results


def test_ddp_trains_agrees_on_all_ranks_and_resumes_bit_equal(folder, ranks):
    straight, first, resumed, started = (
        [rank[name] for rank in ranks] for name in ("straight", "first", "resumed", "started")
    )
    assert_equal(straight[0]["state"], straight[1]["state"])
    assert any(value.abs().sum() > 0 for name, value in straight[0]["state"].items() if "lora_B" in name)
    saved = load_file(folder / "straight/adapter/adapter_model.safetensors")
    trained = [value for name, value in straight[0]["state"].items() if name.endswith("lora_B")]
    assert all(any(torch.equal(value, other) for other in saved.values()) for value in trained)
    assert straight[0]["losses"] != straight[1]["losses"], "each rank has its own share of the data"
    names = torch.load(first[0]["best"], weights_only=True)["state_dict"]
    assert "net.0.lora_A" in names and "net.0.packed" not in names
    assert "net.2.weight" not in names, "DDP's broadcast must not make frozen parameters look trained"
    for rank in range(2):
        assert_equal(straight[rank]["state"], resumed[rank]["state"])
        assert resumed[rank]["losses"] == straight[rank]["losses"][8:]
        assert_equal(resumed[rank]["optimizer"], straight[rank]["optimizer"])
    for rank in started:
        assert "the ranks hold different 4-bit weights there, and in 2 layers together" in rank["refused"]
    assert_equal(started[1]["own loop"], started[0]["own loop"])  # all ranks hold the 4-bit weights of rank 0


def test_every_rank_quantizes_what_it_loads_in_configure_model(ranks):
    first, second = (rank["loaded"] for rank in ranks)
    model = toy("llama").bfloat16()
    convert(model, r=4)
    assert_equal(first, second)
    norm = first["model.model.norm.weight"]
    assert norm.dtype is torch.float32 and (norm != 1).all()
    assert sum(name.endswith("lora_B") and value.abs().sum() > 0 for name, value in first.items()) == 14
    for name, value in tensors(model).items():
        if name.endswith((".packed", ".absmax", ".nested")):
            assert torch.equal(first[f"model.{name}"], value)


def test_ranks_whose_gradients_differ_in_size_train_alike_in_fp16(ranks):
    """Each rank has its own powers of two; fp16 alone has no number for the gradients of one, or of the other."""
    first, second = (rank["fp16"] for rank in ranks)
    assert any(name.endswith("lora_B") and value.any() for name, value in first.items())
    assert all(value.isfinite().all() for value in first.values())
    assert_equal(first, second)


@pytest.mark.parametrize(("fit", "rows"), [("calibrated", 8), ("accumulated", 16), ("called", 24), ("experts", 8)])
def test_all_ranks_get_the_same_calibrated_adapters_from_the_inputs_of_all_ranks(fit, rows, ranks):
    (state, report), (other, _) = (rank[fit] for rank in ranks)
    assert_equal(state, other)
    inputs = dataset(64).tensors[0][:rows]
    if fit == "experts":  # each had the batch of one rank
        assert {"experts.0", "experts.1"} <= set(report.calibrated)
        for place in (0, 1):
            expected = inputs[place::2].square().mean(0).sqrt()
            torch.testing.assert_close(report.input_rms[f"experts.{place}"], expected)
        return
    assert report.rows == rows
    if fit != "called":  # before the loop, on inputs of the ranks' own
        torch.testing.assert_close(report.input_rms["net.0"], inputs.square().mean(0).sqrt())


def test_calibration_is_that_of_rank_0s_weights_without_a_common_seed(ranks):
    first, second = (rank["unseeded"] for rank in ranks)
    assert_equal(second["initial"], first["initial"])
    for rank in (first, second):
        assert rank["share"] == pytest.approx(rank["reported"], rel=1e-3) and rank["share"] < 0.1


def test_a_loop_on_several_ranks_names_those_that_calibrate_together(ranks):
    first, second = (rank["unseeded"]["own loop"] for rank in ranks)
    for rank in (first, second):
        assert "call lightning_qlora.calibrate(module) between" in rank["message"]
        assert "replicas=torch.distributed.group.WORLD if several ranks train the same layers" in rank["message"]
        torch.testing.assert_close(rank["rms"], first["inputs"].square().mean(0).sqrt())
        assert "several ranks hold parts of 0. Call it on all ranks with replicas=torch" in rank["sharded"]
    assert_equal(first["adapters"], second["adapters"])
    torch.testing.assert_close(first["alone"], first["inputs"][0::2].square().mean(0).sqrt())
    (warning,) = first["warnings"]
    assert "replicas=None on one of 2 ranks" in warning
