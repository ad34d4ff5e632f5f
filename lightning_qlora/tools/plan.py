"""`lightning-qlora plan`."""

import logging
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

from lightning_qlora.checks import check_integer, parse_memory
from lightning_qlora.config import DeviceName, OptimizerName, QLoRAConfig, StrategyName
from lightning_qlora.tools.output import print_json, say


def plan(
    model: str,
    batch_size: int = 1,
    sequence_length: int | Literal["longest"] = 512,
    optimizer: OptimizerName = "adamw",
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    devices: int = 1,
    strategy: StrategyName = "fsdp",
    device: DeviceName = "gpu",
    gpu: str | None = None,
    json: bool = False,
    **arguments: Any,
) -> None:
    """Estimate the memory of a training run without loading the model.

    Args:
        model: Folder or hub name of a transformers model; only its config.json is read.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence; "longest": find the longest that fits on the GPU, for
            gradient_checkpointing true, auto and offload, whatever that argument says.
        optimizer: Optimizer whose state is counted.
        gpu_memory: Memory of a GPU, 24GiB for a card of 24 GB (24GB is 7% less): also say whether the run fits, and
            else what to change; with gradient_checkpointing=auto also how many blocks keep their activations.
        host_memory: With "longest", free memory of the host, of which a run takes half at most; by default there is
            enough.
        devices: Number of devices: also say what each holds.
        strategy: Strategy on several devices.
        device: "gpu", or "cpu": this machine's CPU, which may hold a 16-bit model in fp32.
        gpu: A card such as T4, V100 or RTX4090: its memory, and whether it has bf16. Others are planned by gpu_memory.
        json: Print JSON.
        **arguments: The arguments of `QLoRAPrecision`.
    """
    from lightning_qlora.tools.memory_estimate import PlannedRun, both_units, bytes_on_each, fits

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs errors that we raise
    if find_spec("transformers") is not None:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its hints are about running a model, and none runs
    check_integer("devices", devices, at_least=1)
    memory = None if gpu_memory is None else parse_memory("gpu_memory", gpu_memory)
    config = planned = QLoRAConfig(**arguments)
    sharded = devices > 1 and strategy == "fsdp"
    if sharded:
        if not isinstance(config.gradient_checkpointing, bool):  # ranks that share blocks recompute all of them
            planned = replace(config, gradient_checkpointing="offload")
        config = replace(config, deferred_logits="auto")  # would save nothing, so it is not advised
    if sys.stderr.isatty():
        say(f"Running a step of {model} without weights ...", sys.stderr)
    run = PlannedRun(model, optimizer, planned, device=device, gpu=gpu, sharded=sharded)
    run.gpu_memory = memory or run.gpu_memory
    if isinstance(sequence_length, str):
        if host_memory is not None:
            run.host_memory = parse_memory("host_memory", host_memory) / 2 / devices
        _plan_longest(run, batch_size, devices, strategy, json)
        return
    estimate = run.estimate(batch_size, sequence_length)
    needed = bytes_on_each(run, estimate, devices, strategy)
    answer = None
    if run.gpu_memory is not None:
        answer = "It is not known whether it fits: the activations could not be counted."
        if estimate.counted_activations:
            answer = fits(needed, run.gpu_memory, config)
    if json:
        totals = {"total": estimate.total, "device": estimate.device, "on_each_device": needed, "fits": answer}
        print_json({**vars(estimate), **totals})
        return
    print(estimate)
    if devices > 1:
        print(f"Each of {devices} devices ({strategy}) needs {both_units(needed)}.")
    if answer is not None:
        print(answer)


def _plan_longest(run: Any, batch_size: int, devices: int, strategy: StrategyName, json: bool) -> None:
    from lightning_qlora.tools.longest_sequence import longest_sequences
    from lightning_qlora.tools.memory_estimate import both_units, usable_bytes

    if run.gpu_memory is None and run.device == "gpu":
        raise ValueError("sequence_length='longest': on which card? Pass gpu=RTX4090 or gpu_memory=24GiB.")
    available = run.available() if run.gpu_memory is None else usable_bytes(run.gpu_memory)
    rows = longest_sequences(run, batch_size, available, devices, strategy)
    if json:
        print_json({"available": available, "longest": [row._asdict() for row in rows]})
        return
    print(f"The longest sequence for {both_units(available)}, batch_size={batch_size}:")
    for row in rows:
        print(row)
