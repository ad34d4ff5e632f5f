"""`plan --gpu-memory` and `--devices`: whether a run fits, what to change, and what each device holds."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_qlora import convert, to_parameters
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_estimate import (
    DRIVER,
    FRAGMENTATION,
    PlannedRun,
    bytes_on_each,
    fits,
    parse_memory,
)
from tests.toys import toy

pytest.importorskip("transformers")
R = {"r": 8, "lora_dropout": 0.0}


def test_units():
    sizes = {"24GB": 24 * 10**9, "24 GiB": 24 * 2**30, "1.5gb": 15 * 10**8, "80000000000": 8 * 10**10}
    assert {text: parse_memory(text) for text in sizes} == sizes
    for wrong in ("", "GB", "24TB", "0GB"):
        with pytest.raises(ValueError, match="must be a number with a unit"):
            parse_memory(wrong)


def test_a_unit_is_asked_for_before_anything_is_counted(tmp_path, capsys):
    toy("llama").config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--gpu-memory", "24"])
    printed = capsys.readouterr()
    assert "gpu_memory='24' is 24 bytes. Give a unit, such as 24GiB" in printed.err and not printed.out


def test_whether_it_fits_and_what_to_change():
    config = QLoRAConfig(**R)
    needed = 10 * 10**9
    just = int((needed + DRIVER) / (1 - FRAGMENTATION)) + 1
    assert fits(needed, just, config).startswith("It fits")
    too_little = fits(needed, just - 10**7, config)
    assert too_little.startswith("It does not fit: it needs 10 GB") and "gradient_checkpointing=True" in too_little
    assert "gradient_checkpointing" not in fits(needed, 10**9, QLoRAConfig(gradient_checkpointing=True))


def test_what_each_device_holds():
    """FSDP2's part of the parameters is that of torch; the rest is the same on any number of devices."""
    run = PlannedRun(toy("llama"), "adamw", QLoRAConfig(**R, deferred_logits=False, paged_optimizer=False))
    estimate = run.estimate(1, 16)
    assert bytes_on_each(run, estimate, 8, "ddp") == bytes_on_each(run, estimate)
    few, many = (bytes_on_each(run, estimate, devices, "fsdp") for devices in (2, 8))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        parts = {}
        for devices in (2, 8):
            model = toy("llama")
            convert(model, **R)
            to_parameters(model)
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (devices,)))
            parameters = list(model.parameters())
            parts[devices] = sum(p.to_local().nbytes * (4 if p.requires_grad else 1) for p in parameters)
    finally:
        torch.distributed.destroy_process_group()
    assert few - many == pytest.approx(parts[2] - parts[8], rel=0.01)


def test_the_lines_of_the_command(tmp_path, capsys):
    toy("llama").config.save_pretrained(tmp_path)
    main(["plan", str(tmp_path), "--r", "4", "--sequence_length", "16", "--devices", "8", "--gpu-memory", "24GiB"])
    device, answer = capsys.readouterr().out.splitlines()[-2:]
    assert device.startswith("Each of 8 devices (fsdp) needs ") and answer.startswith("It fits: it needs ")
