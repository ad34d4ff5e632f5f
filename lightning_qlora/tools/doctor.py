"""Checks of this machine: versions, devices, kernels, paging, and a self-test of two seconds."""

import math
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lightning_qlora.checks import install
from lightning_qlora.conversion.convert import convert
from lightning_qlora.kernels import backends, eager
from lightning_qlora.kernels.cpu import build, library
from lightning_qlora.kernels.cpu.matmul_16bit import products
from lightning_qlora.kernels.self_test import OPS, faults
from lightning_qlora.optim.host_memory import why_not_managed
from lightning_qlora.texts import size_text
from lightning_qlora.upstream_names import differs, missing_names

PACKAGES = {  # package -> the extra that installs it; "": it is always installed; None: this package does not need it
    "torch": "",
    "lightning": "",
    "safetensors": "",
    "triton": None,
    "transformers": "hf",
    "jsonargparse": "cli",
    "docstring-parser": "cli",
    "cuda-bindings": "paged",
    "peft": None,
    "bitsandbytes": None,
}


CPU_INSTEAD = 'use accelerator="cpu"'


def examine(check: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Yield name and result of each check, and whether the result is good; `check` compares all kernels again."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True
    for name, extra in PACKAGES.items():
        try:
            yield name, f"{version(name)} ({tested_text(name)})", True
        except PackageNotFoundError:
            hint = ""
            if extra:
                hint = f" (extra {extra}: {install(extra)})"
            if name == "triton":
                hint = " under this name; torch for CUDA and ROCm brings its own"
            yield name, f"not installed{hint}", extra != ""
    packages = ("torch", "lightning", *(["transformers"] if find_spec("transformers") else []))
    missing = ", ".join(missing_names(packages))
    yield "private names", f"missing: {missing}" if missing else "all that this package uses are there", not missing
    yield "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", True
    for dtype in (torch.bfloat16, torch.float16):
        yield f"CPU, {str(dtype).removeprefix('torch.')}", str(products(dtype)), True
    try:
        yield "C compiler", build.compiler(), True
    except build.BuildError as error:
        yield "C compiler", f"{error}; the CPU path is slower without one", True
    devices = []
    if torch.cuda.is_available():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        yield str(device), f"{properties.name}, {size_text(free)} of {size_text(total)} free", True
        yield f"{device} paging", paging(device, properties), True
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
        yield "mps", f"Apple's GPU, on which this package was never run: {CPU_INSTEAD} if a check below fails", True
    if not devices:
        yield "GPU", "none that torch supports", True
    for device in (torch.device("cpu"), *devices):
        failures = backends.failures(device, check)
        kernels = backends.describe(device)
        if kernels.endswith("one thread"):
            kernels += f". {build.remedy()}"
        yield f"{device} kernels", kernels, True
        for op, reason in failures.items():
            yield f"{device} {op}", f"in plain torch, because its kernels fail: {reason}", False
    for device in (torch.device("cpu"), *devices):
        try:
            yield from _self_test(device)
        except Exception as error:  # of torch, for an op that the device does not have
            if device.type not in backends.UNTRIED:
                raise
            yield f"self-test on {device}", f"{type(error).__name__}: {error}. {CPU_INSTEAD}", False


def tested_text(package: str) -> str:
    tested = differs(package)
    return f"the tests ran with {tested}" if tested else "as tested"


def paging(device: torch.device, properties: Any) -> str:
    if getattr(properties, "is_integrated", False):
        return "brings nothing: this GPU uses the host's memory, so there is no other one to page to"
    return why_not_managed(device) or "unified memory"


def _self_test(device: torch.device) -> Iterator[tuple[str, str, bool]]:
    """Compare the ops with the reference, unless `failures` did so, and train a layer for 20 steps."""
    start = time.perf_counter()
    name = f"self-test on {device}"
    if not backends.has_kernels(device):
        wrong = [f"{op}: {reason}" for op, reason in faults(eager, device).items() if reason]
        if wrong and device.type in backends.UNTRIED:
            wrong.append(CPU_INSTEAD)
        yield f"{name}: ops", "; ".join(wrong) or f"all {len(OPS)} compute what the reference does", not wrong
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(64, 768, dtype=torch.float32, generator=generator, device="cpu").to(device)
    target = torch.randn(64, 512, dtype=torch.float32, generator=generator, device="cpu").to(device)
    layer = nn.Sequential(nn.Linear(768, 512, dtype=torch.float32, device="cpu"))
    convert(layer, r=8, lora_dropout=0.0, compute_dtype="fp32")
    layer.to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    good = losses[-1] < losses[0] and math.isfinite(losses[-1])
    seconds = time.perf_counter() - start
    yield f"{name}: training", f"loss {losses[0]:.4g} to {losses[-1]:.4g} in 20 steps; {seconds:.1f} s in total", good


def environment() -> dict[str, str]:
    names = ["TRITON_INTERPRET", "LIGHTNING_QLORA_CACHE", library.OFF, "CC", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]
    return {name: os.environ[name] for name in names if name in os.environ}
