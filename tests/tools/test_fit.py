"""`plan --gpu-memory` and `--devices`: whether a run fits, what to change, and what each device holds."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_qlora import MemoryEstimate, convert, estimate_memory, to_parameters
from lightning_qlora.checks import parse_memory
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.memory_estimate import (
    DRIVER,
    FRAGMENTATION,
    PlannedRun,
    both_units,
    bytes_on_each,
    fits,
)
from tests.toys import toy

pytest.importorskip("transformers")
R = {"r": 8, "lora_dropout": 0.0}


def test_units(tmp_path, capsys):
    sizes = {"24GB": 24 * 10**9, " 24 GiB ": 24 * 2**30, "1.5gb": 15 * 10**8, "80000000000": 8 * 10**10}
    sizes |= {"1MB": 10**6, "2MiB": 2 * 2**20, "3000kb": 3 * 10**6, "4096KiB": 2**22}
    assert {text: parse_memory("gpu_memory", text) for text in sizes} == sizes
    for wrong in ("", "GB", "24TB", "0GB", "x24GB"):
        with pytest.raises(ValueError, match="must be a number with a unit"):
            parse_memory("gpu_memory", wrong)
    with pytest.raises(ValueError, match=r"gpu_memory='999999' is 999999 bytes\. Give a unit, such as 24GiB\."):
        parse_memory("gpu_memory", "999999")
    toy("llama").config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--gpu-memory", "24"])
    printed = capsys.readouterr()  # before anything is counted
    assert "gpu_memory='24' is 24 bytes. Give a unit, such as 24GiB" in printed.err and not printed.out


def test_whether_it_fits_and_what_to_change():
    config = QLoRAConfig(**R)
    needed = 10 * 10**9
    just = int((needed + DRIVER) / (1 - FRAGMENTATION)) + 1
    assert fits(needed, just, config) == (
        "It fits: it needs 10 GB (9.313 GiB), and there are 10 GB (9.313 GiB) of 11.25 GB (10.48 GiB) (the driver "
        "takes up to 800 MB, fragmentation 4%)."
    )
    too_little = fits(needed, just - 10, config)
    assert too_little.startswith("It does not fit: it needs 10 GB (9.313 GiB), and there are 10 GB (9.313 GiB) of ")
    other = "a smaller batch_size, sequence_length or r, more devices with FSDP2 (--devices)."
    assert too_little.endswith(f". Try gradient_checkpointing=True, {other}")
    config = QLoRAConfig(gradient_checkpointing=True, paged_optimizer=False, deferred_logits=False)
    assert fits(needed, 10**9, config).endswith(f". Try paged_optimizer=auto, deferred_logits=auto, {other}")


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
            blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in model.model.layers]
            whole = sum(parameter.nbytes for parameter in model.parameters())
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (devices,)))
            parameters = list(model.parameters())
            parts[devices] = sum(p.to_local().nbytes * (4 if p.requires_grad else 1) for p in parameters)
    finally:
        torch.distributed.destroy_process_group()
    assert few - many == pytest.approx(parts[2] - parts[8], rel=0.01)
    sharded = whole + estimate.parts["gradients"] + estimate.parts["optimizer state"]
    gathered = whole - sum(blocks) + 2 * max(blocks)
    buffers = estimate.parts["activations"] + estimate.parts["decode buffer"]
    assert many == gathered + buffers + sharded // 8
    paged = replace(estimate, paged=True)
    assert bytes_on_each(run, paged, 2, "fsdp") == few - estimate.parts["optimizer state"] // 2
    assert bytes_on_each(run, paged, 1, "fsdp") == paged.device


def test_the_lines_of_the_command(tmp_path, capsys, monkeypatch):
    toy("llama", vocab_size=512, num_hidden_layers=1).config.save_pretrained(tmp_path)
    plan = ["plan", str(tmp_path), "--r", "4", "--sequence_length", "16"]
    main([*plan, "--devices", "8", "--gpu-memory", "24GiB", "--gradient_checkpointing", "true"])
    run = PlannedRun(str(tmp_path), "adamw", QLoRAConfig(r=4, deferred_logits=False, gradient_checkpointing=True))
    estimate = run.estimate(1, 16)
    needed = bytes_on_each(run, estimate, 8, "fsdp")
    answer = fits(needed, 24 * 2**30, run.config)
    assert capsys.readouterr() == (f"{estimate}\nEach of 8 devices (fsdp) needs {both_units(needed)}.\n{answer}\n", "")
    main([*plan, "--devices", "8", "--gpu-memory", "810MB", "--deferred_logits", "false", "--paged_optimizer", "false"])
    advised = capsys.readouterr().out.rpartition(" Try ")[2]  # an embedding in shards returns its logits in any case
    assert advised.startswith("paged_optimizer=auto, gradient_checkpointing=True, a smaller batch_size")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main([*plan, "--devices", "2", "--strategy", "ddp", "--batch-size", "2", "--optimizer", "sgd", "--device", "cpu"])
    whole = estimate_memory(str(tmp_path), 2, 16, "sgd", device="cpu", r=4)
    needed = both_units(whole.device)
    progress = f"Running a step of {tmp_path} without weights ...\n"
    assert capsys.readouterr() == (f"{whole}\nEach of 2 devices (ddp) needs {needed}.\n", progress)


def test_the_numbers_of_an_estimate():
    """A layer of 128 inputs and 64 outputs, then one of 64 and 128, on four rows in bf16."""
    module = nn.Sequential(nn.Linear(128, 64, bias=False), nn.ReLU(), nn.Linear(64, 128, bias=False)).bfloat16()
    example = torch.zeros(4, 128, dtype=torch.bfloat16)
    packed = 128 * 64 // 2 + 128 + 4 * (1 + 1)  # codes, scales, second-level scales with the mean
    trained = 4 * 4 * (128 + 64)  # lora_A and lora_B in fp32
    expected = {
        "parts": {
            "4-bit weights": 2 * packed,
            "other frozen weights": 0,
            "trained weights": 2 * trained,
            "gradients": 2 * trained,
            "optimizer state": 4 * trained,
            "decode buffer": 2 * 128 * 64,
            "activations": trained + 2624,  # with gradients of the first layer that are not stored yet
        },
        "gradients_at_peak": trained,  # those of the second layer
        "paged": True,
        "trainable_parameters": 2 * trained // 4,
        "total_parameters": 2 * (trained // 4 + 128 * 64),
        "dense_bytes": 2 * 2 * 128 * 64,
        "counted_activations": True,
        "layers": [("0", "4-bit + adapter, 64x128", "1"), ("2", "4-bit + adapter, 128x64", "1")],
        **dict.fromkeys(("blocks", "kept_blocks", "kept_bytes", "host_bytes"), 0),
    }
    for given in (example, (example,), {"input": example}):
        assert vars(estimate_memory(module, example=given, r=4, lora_dropout=0.0)) == expected
    run = PlannedRun(module, "adamw", QLoRAConfig(r=4, lora_dropout=0.0), example)
    assert vars(run.estimate(1, 1)) == vars(run.estimate(2, 2)) == expected
    for device, dropped in (("gpu", 0), ("cpu", example.nbytes)):  # Triton's kernels drop inside of the products
        activations = {"activations": trained + 2624 + 8 + dropped}
        with_dropout = {**expected, "parts": {**expected["parts"], **activations}}
        assert vars(estimate_memory(module, example=example, device=device, r=4, lora_dropout=0.1)) == with_dropout
    without = {**expected, "parts": {**expected["parts"], "activations": 0}, "gradients_at_peak": 2 * trained}
    assert vars(estimate_memory(module, r=4, lora_dropout=0.0)) == {**without, "counted_activations": False}


def test_the_whole_text_of_an_estimate():
    parts = [4 * 10**9, 3 * 10**8, 10**7, 2 * 10**7, 4 * 10**7, 5 * 10**6, 6 * 10**8]
    names = ["4-bit weights", "other frozen weights", "trained weights", "gradients", "optimizer state"]
    parts = dict(zip([*names, "decode buffer", "activations"], parts, strict=True))
    rows = [("layers.*.q", "4-bit", "2")]
    assert f"{MemoryEstimate(parts, 5 * 10**6, True, 2500, 8 * 10**9, 16 * 10**9, True, rows)}\n" == TEXT
    parts |= {"activations": 0}
    lines = str(MemoryEstimate(parts, 2 * 10**7, False, 1, 1, 1, False, rows)).splitlines()
    assert lines[3:5] == [
        "gradients                    20 MB   19.07 MiB",
        "optimizer state              40 MB   38.15 MiB",
    ]
    assert lines[6].startswith("activations                unknown  (pass example=; ")
    assert lines[7] == "total at the peak         4.375 GB   4.075 GiB" and lines[8].startswith("1 of 1 weights")


TEXT = """\
4-bit weights                 4 GB   3.725 GiB
other frozen weights        300 MB   286.1 MiB
trained weights              10 MB   9.537 MiB
gradients                    20 MB   19.07 MiB  (5 MB of it at the peak of all parts)
optimizer state              40 MB   38.15 MiB  (may move to host memory)
decode buffer                 5 MB   4.768 MiB
activations                 600 MB   572.2 MiB
total at the peak          4.96 GB   4.619 GiB
  on the device            4.92 GB   4.582 GiB  (the optimizer state in host memory)
2,500 of 8,000,000,000 weights are trained. Before quantization the weights alone take 16 GB. Not counted: \
the driver's own memory (0.3 to 0.8 GB on CUDA), on a CPU the imported libraries (about 0.3 GB), and \
fragmentation (a few percent).
layers.*.q  x2  4-bit
"""
