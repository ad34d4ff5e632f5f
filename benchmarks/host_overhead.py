"""Host time and launches of a layer on a GPU, measured on a CPU.

    python -m benchmarks.host_overhead [--peers]        launches and host time of a linear layer
    python -m benchmarks.host_overhead --experts        host time of a block of Qwen3-MoE

Triton gets a driver that compiles for a card and launches nothing, and the layer is so small that torch's products take
as long on the CPU as their launch takes on a GPU (2 to 5 us). What is left is the time that Python, autograd and the
launches take, during which a fast GPU waits. Not included: `torch.cuda`'s own calls (device and stream, about 1 us per
launch). Launches are counted: kernels of Triton, and ops of torch and bitsandbytes that run a kernel.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd.profiler import profile
from triton.backends.compiler import GPUTarget

from benchmarks.experts import block as moe_block
from benchmarks.measure import table
from lightning_qlora import convert
from lightning_qlora.experts import experts as stacks
from lightning_qlora.kernels import backends, eager
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.backends import Backend
from lightning_qlora.kernels.triton import launch, linear

SIZE, RANK, LAYERS, REPEATS, CALLS = 64, 16, 8, 150, 5
HEADS = "launches forward", "us forward", "launches backward", "us backward", "us without gradients"
# Ops that run one kernel on a GPU.
KERNELS = {
    "mm", "addmm", "addmm_", "copy_", "mul", "mul_", "add", "add_", "sum", "native_dropout", "bernoulli_", "div_",
    "fill_", "dequantize_4bit", "dequantize_blockwise",
}  # fmt: skip


class Launcher:
    """Takes a launch and counts it."""

    launches = 0

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        Launcher.launches += 1


class Driver:
    """What Triton asks of a driver, for one card that is not there: an H100, or a T4."""

    launcher_cls = Launcher
    architecture = 90

    class utils:
        """Loads nothing."""

        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", Driver.architecture, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of a call: the least of several means, because other programs only add to it."""
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time() - start) / CALLS)
    return 1e6 * min(times[1:])


def launches(call: Callable[[], object]) -> int:
    """Kernels that a call would run on a GPU."""
    call()
    before = Launcher.launches
    with profile(use_kineto=False) as profiler:
        call()
    ran = Launcher.launches - before
    for event in profiler.function_events or []:
        parent, name = event.cpu_parent, event.name.split("::")[-1]
        while parent is not None and parent.name.split("::")[-1] not in KERNELS:
            parent = parent.cpu_parent
        if parent is None:  # an op inside of a counted one is that op's own kernel
            ran += name in KERNELS
    return ran


def measure(layers: nn.Module, x: Tensor, count: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Cells of the table: launches and microseconds of one of `count` layers, forward, backward, without gradients."""
    x = x.to(dtype).requires_grad_()
    trained = [x, *(parameter for parameter in layers.parameters() if parameter.requires_grad)]
    grad = torch.randn_like(x)

    def forward() -> Tensor:
        return layers(x)

    def both() -> None:
        torch.autograd.grad(forward(), trained, grad)

    def without_gradients() -> None:
        with torch.no_grad():
            layers(x)

    counted = [launches(forward), launches(both)]
    took = [microseconds(call) for call in (forward, both, without_gradients)]
    cells = counted[0], took[0], counted[1] - counted[0], took[1] - took[0], took[2]
    return [f"{cell / count:.0f}" for cell in cells]


def use(kernels: Any) -> None:
    """Let kernels compute on the CPU; Triton's without the check, in which they would have to."""
    backends._backends[torch.device("cpu")] = Backend(torch.device("cpu"), kernels)


def ours(dropout: float, few_rows: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Our layers on the Triton backend, in a module of a type."""
    layers = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).to(dtype)
    use(eager)
    convert(layers, r=RANK, lora_dropout=dropout, compute_dtype="bf16")
    use(kernels)
    tile = launch.Tile(M=16, N=64, num_warps=4, num_stages=3)
    launch.TABLE["matmul"] = {"default": [tile] if few_rows else []}
    return layers.train()


def without_bf16(dropout: float) -> nn.Module:
    """Our layers as a T4 launches them, from here on."""
    layers = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    use(eager)
    convert(layers, r=RANK, lora_dropout=dropout, compute_dtype="fp16")
    use(kernels)
    Driver.architecture = 75
    vars(launch)["target"] = lambda device: "sm_75"
    launch.TABLE["matmul"] = {"default": []}
    vars(eager)["multiply"] = vars(linear)["multiply"] = _multiply
    return layers.train()


def _multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """In place of `half.multiply`, which on a CPU casts the factors."""
    return torch.mm(_zeros(a.shape), _zeros(b.shape), out=out)


@cache
def _zeros(shape: torch.Size) -> Tensor:
    return torch.zeros(shape)


def experts(number: int) -> nn.Module:
    """A block of Qwen3-MoE, 8 experts for each token, its experts computed together as on a GPU."""
    shape = argparse.Namespace(hidden=SIZE, width=SIZE, experts=number, active=8)
    block = nn.Sequential(moe_block(shape))
    use(eager)
    convert(block, r=RANK, lora_dropout=0.0, compute_dtype="bf16")
    use(kernels)
    vars(stacks)["INTERPRETED"] = True
    return block.train()


def peft_with_bitsandbytes(dropout: float) -> nn.Module:
    """PEFT's adapters on bitsandbytes' Linear4bit, on its CPU backend."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    base = (bitsandbytes.nn.Linear4bit(SIZE, SIZE, False, torch.bfloat16, True, "nf4") for _ in range(LAYERS))  # type: ignore[attr-defined]
    model = nn.Sequential(*base).bfloat16().to("cpu")
    names = [name for name, _ in model.named_children()]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_dropout=dropout, target_modules=names), model)
    return model.train()


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also PEFT + bitsandbytes")
    parser.add_argument("--experts", action="store_true", help="only blocks of experts")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the memory that no kernel writes holds any bits
    triton.runtime.driver.set_active(Driver())
    chosen = parser.parse_args(arguments)
    if chosen.experts:
        # Not the launches: a block has more kinds of kernels than KERNELS names.
        made = {f"{number} experts": measure(experts(number), torch.randn(1, 16, SIZE), 1) for number in (8, 128)}
        print(table(["a block of", *HEADS[1::2]], [[name, *cells[1::2]] for name, cells in made.items()]))
        return
    cases = {
        "ours, dropout": lambda: ours(0.05),
        "ours, no dropout": lambda: ours(0.0),
        "ours, no dropout, few rows": lambda: ours(0.0, few_rows=True),
    }
    if chosen.peers:
        cases["PEFT + bitsandbytes, dropout"] = lambda: peft_with_bitsandbytes(0.05)
        cases["PEFT + bitsandbytes, no dropout"] = lambda: peft_with_bitsandbytes(0.0)
    rows = [[name, *measure(make(), torch.randn(1, SIZE))] for name, make in cases.items()]
    plain = linear.multiply
    vars(linear)["multiply"] = _multiply
    for name, few_rows in (("ours in fp32, dropout", False), ("ours in fp32, dropout, few rows", True)):
        rows.append([name, *measure(ours(0.05, few_rows, torch.float32), torch.randn(1, SIZE), dtype=torch.float32)])
    vars(linear)["multiply"] = plain
    cells = measure(without_bf16(0.05), torch.randn(4, SIZE), dtype=torch.float32)
    rows.append(["ours on a T4, dropout", *cells])
    print(table(["", *HEADS], rows))


if __name__ == "__main__":
    main()
