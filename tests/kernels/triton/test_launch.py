"""Launches without a card: a driver that keeps what a launch would give to it."""

import itertools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton.compiler
from triton.runtime import driver

from benchmarks.compiled import recorded, source
from benchmarks.host_overhead import Driver
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.triton.launch import Launch, Tile, number_of_shares
from lightning_qlora.kernels.triton.lora_products import _down_kernel, _up_kernel, lora_down, lora_gradients

ROOT = Path(__file__).parents[3]
X = torch.zeros(3, 64).bfloat16()
W = torch.zeros(64, 16)
OUT = torch.zeros(3, 64).bfloat16()
H = torch.zeros(3, 16).bfloat16()
CONSTANTS = {"DROPOUT": False, "HALF": False, "ADD": False, "R": 16}


@pytest.mark.parametrize("tiles", [1, 3, 200])
def test_no_share_of_a_sum_is_empty(tiles):
    """`_down_kernel` tells the compiler so. Of 41 steps in 10 shares of 5 the last had none."""
    for steps in range(1, 300):
        shares = number_of_shares(tiles, 512, steps)
        per_share = -(-steps // shares)
        assert shares >= 1
        assert (shares - 1) * per_share < steps <= shares * per_share


@pytest.fixture
def driven(monkeypatch):
    """The calls of the driver: grid, stream, function, metadata of the kernel, and what follows."""
    calls = []
    handles = itertools.count(1)

    class Recorder(Driver):
        class launcher_cls:
            def __init__(self, *_):
                pass

            def __call__(self, *arguments):
                calls.append(arguments)

        class utils(Driver.utils):
            load_binary = staticmethod(lambda *_: (1, next(handles), 32, 0, 1024))

        get_current_device = staticmethod(lambda: 1000)  # a real card must not get what was compiled here

    monkeypatch.setattr(driver, "_active", Recorder())
    monkeypatch.setattr(launch, "target", lambda device: "sm_90")
    return calls


def test_launches_of_a_layer():
    """The counts in docs/kernels.md. A new process counts, because `host_overhead` does not remove its driver."""
    script = "from benchmarks import host_overhead as one; one.REPEATS = one.CALLS = 1; one.main([])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    cells = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ours")]
    launches = {cell[0].removeprefix("| ours, "): (int(cell[1]), int(cell[3])) for cell in cells}
    assert launches == {"dropout": (4, 5), "no dropout": (4, 5), "no dropout, few rows": (3, 5)}


def addresses(arguments):
    return [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]


def test_the_short_path_gives_the_driver_what_triton_gives_it(driven):
    tile = Tile(up_to=16, M=16, N=64, num_warps=4, num_stages=2)
    launch = Launch(_up_kernel, X.device, (1, 1, 1), (3, 64, 16, 1, 16), tile, fuse=True, **CONSTANTS)
    for _ in range(2):
        launch((H, W, OUT, *[OUT] * 4), (0, 0, 0, 0.5))
    by_triton, short = driven
    assert len(launch._compiled) == 1
    # Between the kernel's metadata and its arguments are three entries for the hooks of Triton's profiler.
    assert addresses(short[:6]) == addresses(by_triton[:6])
    assert short[6:9] == (None, None, None)
    assert addresses(short[9:]) == addresses(by_triton[9:])


def test_other_types_and_unaligned_tensors_get_kernels_of_their_own(driven):
    memory = torch.zeros(16 * 64 + 1)
    kinds = [torch.zeros(16, 64), torch.zeros(16, 64).bfloat16(), memory[1:].view(16, 64), memory[:-1].view(16, 64)]
    for w in [*kinds, *kinds]:
        lora_down(X, w)
    functions = [call[4] for call in driven]
    assert functions[:4] == functions[4:]
    assert len(set(functions[:3])) == 3
    assert functions[3] == functions[0]


def test_a_tensor_on_another_device_makes_that_device_current_for_its_launch(driven, monkeypatch):
    """Triton launches on the current device, on the stream that is current there."""
    current = [0]
    entered = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(driver.active, "get_current_device", lambda: 2000 + current[-1], raising=False)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda index: 70 + index % 2000, raising=False)
    tile = Tile(M=16, N=64, num_warps=4, num_stages=2)
    for index in (1, 0):
        device = torch.device("cuda", index)
        launch = Launch(_up_kernel, device, (1, 1, 1), (3, 64, 16, 1, 16), tile, fuse=True, **CONSTANTS)
        for _ in range(2):  # by Triton, and by the short path
            launch((H, W, OUT, *[OUT] * 4), (0, 0, 0, 0.5))
    assert [call[3] for call in driven] == [71, 71, 70, 70]
    assert (entered, current) == ([1, 1], [0])


def test_an_integer_scaling_does_not_become_a_part_of_the_kernel(driven):
    """`layer.scaling = 0` and 1 set by a user between steps: the kernel that is kept takes every later value."""
    grad_a = torch.zeros(16, 64)
    grad_b = torch.zeros(64, 16)
    for s in (1, 0, 0.25):
        lora_gradients(H, X, grad_a, H, X, grad_b, s)
    scalings = [arguments[-7] for arguments in driven]
    assert (scalings, [type(s) for s in scalings]) == ([1.0, 0.0, 0.25], [float] * 3)
    assert len({arguments[4] for arguments in driven}) == 1


def test_the_compile_gate_builds_what_the_jit_builds(driven, monkeypatch):
    """One key in Triton's cache (up to 3.6): `benchmarks.tiles` measures what its other processes compiled."""
    x = torch.zeros(5, 80).bfloat16()
    memory = torch.zeros(16 * 80 + 1)
    by_jit = []

    def compile_and_keep(made, *args, compile=triton.compiler.compile, **options):
        by_jit.append(made)
        return compile(made, *args, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile_and_keep)
    monkeypatch.setattr(_down_kernel, "device_caches", defaultdict(_down_kernel.create_binder))
    for w in (memory[:-1].view(16, 80), memory[1:].view(16, 80)):  # the second one is not aligned
        with recorded("sm_90") as launches:
            lora_down(x, w)
        lora_down(x, w)
        ours = source(launches[0], "sm_90")
        theirs = by_jit[-1]
        hints = {place: hint for place, hint in theirs.attrs.items() if place not in theirs.constants}  # Triton 3.9
        assert (ours.signature, ours.constants, ours.attrs) == (theirs.signature, theirs.constants, hints)
