"""Calibration under strategy="ddp": the same adapters on all ranks, from the batches of all ranks."""

import torch

from tests.conftest import dataset, launch


def test_all_ranks_get_the_same_adapters_from_the_inputs_of_all_ranks(tmp_path):
    _, (first, second) = launch("tests.scripts.ddp_calibration", tmp_path)
    for accumulate in (1, 2):
        (state, rows), (other, _) = first[accumulate], second[accumulate]
        assert rows == 2 * 4 * accumulate
        assert all(torch.equal(value, other[name]) for name, value in state.items())
        inputs = dataset(64).tensors[0][:rows]
        torch.testing.assert_close(state["net.0.input_rms"], inputs.square().mean(0).sqrt())
    (state, calibrated), (other, _) = first["experts"], second["experts"]
    assert {"experts.0", "experts.1"} <= set(calibrated)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    for place in (0, 1):  # each had the batch of one rank
        inputs = dataset(64).tensors[0][place:8:2]
        torch.testing.assert_close(state[f"experts.{place}.input_rms"], inputs.square().mean(0).sqrt())
    (state, rows), (other, _) = first["called"], second["called"]  # before the loop, on inputs of the ranks' own
    assert rows == 2 * (8 + 4)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
