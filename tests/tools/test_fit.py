"""`plan --gpu-memory`: the sizes that it names fit, and the next larger ones do not."""

import re

import pytest

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools.devices import what_devices_do
from lightning_qlora.tools.fit import DRIVER, FRAGMENTATION, largest, needed, parse_memory, what_fits
from lightning_qlora.tools.memory_estimate import PlannedRun
from tests.toys import toy

R = {"r": 4, "lora_dropout": 0.0}


def test_units():
    known = {"24GB": 24 * 10**9, "24 GiB": 24 * 2**30, "1.5gb": 15 * 10**8, "80000000000": 8 * 10**10}
    assert {text: parse_memory(text) for text in known} == known
    for wrong in ("", "GB", "24TB", "0GB"):
        with pytest.raises(ValueError, match="must be a number of bytes with a unit"):
            parse_memory(wrong)
    with pytest.raises(ValueError, match=r"gpu_memory='24': are 24 bytes\. Give a unit, such as 24GB"):
        parse_memory("24")


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("budget", [1000, 5000, 10**6, 10**9])
def test_the_largest_number_that_fits(budget, step):
    calls = []

    def memory(n):
        calls.append(n)
        return 10 * n + n * n // 50 + max(0, 100 - n)

    found = largest(memory, budget, 8, step, 8008)
    assert memory(found) <= budget and (found == 8008 or memory(found + step) > budget)
    assert (found - 8) % step == 0 and len(calls) < 30


def test_what_fits():
    pytest.importorskip("transformers")
    model = toy("llama", max_position_embeddings=512, num_hidden_layers=4)
    config = QLoRAConfig(**R)
    run, smaller = (
        PlannedRun(model, "adamw", config),
        PlannedRun(model, "adamw", QLoRAConfig(**R, gradient_checkpointing=True)),
    )
    between = (needed(run.estimate(2, 128)) + needed(smaller.estimate(2, 128))) // 2
    memory = int((between + DRIVER) / (1 - FRAGMENTATION)) + 1
    before = list(what_devices_do(run, "2", "ddp", None, 2, 128))
    lines = list(what_fits(run, str(memory), 2, 128))
    assert list(what_devices_do(run, "2", "ddp", None, 2, 128)) == before  # the run is as it was
    assert lines[1].startswith("2 x 128, as asked") and lines[1].endswith("does not fit")
    assert lines[2].startswith("2 x 128, gradient_checkpointing=True") and lines[2].endswith("fits")
    batch = int(re.search(r"largest batch of 128 tokens +(\d+)", lines[3])[1])
    assert needed(smaller.estimate(batch, 128)) <= between + 1 < needed(smaller.estimate(batch + 1, 128))
    assert "tokens" in lines[4] and "GPUs with FSDP2" in lines[5]
