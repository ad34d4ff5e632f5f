"""Versions, the card, and its two upper limits: copy bandwidth and the rate of a large bf16 matrix product."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_cells import Row
from benchmarks.timing import seconds
from lightning_qlora.kernels.backends import Backend, backend, describe
from lightning_qlora.optim.host_memory import why_not_managed

PACKAGES = ("torch", "triton", "lightning", "transformers", "peft", "bitsandbytes", "cuda-bindings")


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Versions; GB/s of a copy (bytes read plus bytes written); TFLOP/s of an n x n x n product of random numbers.

    Raises:
        RuntimeError: If Triton's kernels do not run on the card: all other cells would measure plain torch.
    """
    yield {"versions": versions(), "kernels": describe(device), **properties(device)}
    if device.type == "cuda" and not isinstance(backend(device), Backend):
        raise RuntimeError(f"The ops run in {describe(device)} on this card; the warning above says why.")
    size = 1 << 20 if small else 4 << 30
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    took = seconds({"copy": lambda: target.copy_(source)}, device, rounds=10)["copy"]
    yield {"copy_gb_per_second": 2 * size / took / 1e9, "bytes": size}
    n = 128 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    took = seconds({"product": lambda: a @ b}, device, rounds=10)["product"]
    yield {"bf16_tflop_per_second": 2 * n**3 / took / 1e12, "n": n}


def versions() -> dict[str, str]:
    """Versions of Python and of the relevant packages, or "not installed"."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def properties(device: torch.device) -> Row:
    """Name, multiprocessors, memory and CUDA version of a GPU, and how optimizer state is paged on it."""
    if device.type != "cuda":
        return {"card": "CPU"}
    card = torch.cuda.get_device_properties(device)
    return {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gib": card.total_memory / 2**30,
        "cuda": torch.version.cuda or torch.version.hip,
        "paging": why_not_managed(device) or "unified memory",
    }
