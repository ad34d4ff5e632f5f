"""Launches without a card: a driver that keeps what a launch would give to it."""

import itertools
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.compiler
from triton.runtime import driver

from benchmarks import host_overhead
from benchmarks.compiled import recorded, source
from benchmarks.products import lora_down, lora_gradients
from lightning_qlora.kernels import backends, eager, reference
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.half import Half, to_half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import dropout, launch, linear, lora_products
from lightning_qlora.kernels.triton.grouped import can_group
from lightning_qlora.kernels.triton.launch import Launch, Tile, number_of_shares
from lightning_qlora.kernels.triton.lora_products import (
    _down_kernel,
    _up_kernel,
    rank_tile,
)
from lightning_qlora.quantization.packed_weight import stack_bytes
from tests.kernels.triton.launches import forget_launches

X = torch.zeros(3, 64).bfloat16()
W = torch.zeros(64, 16)
OUT = torch.zeros(3, 64).bfloat16()
H = torch.zeros(3, 16).bfloat16()
ARGUMENTS = (H, W, OUT), (0, 0, 0, 0.5)


def up(device=X.device, num_warps=4):
    """A launch of `_up_kernel`, which takes ARGUMENTS."""
    tile = Tile(up_to=16, M=16, N=64, num_warps=num_warps, num_stages=2)
    return Launch(_up_kernel, device, (1, 1, 1), (3, 64, 16, 1, 16), tile, fuse=True, DROPOUT=False, R=16)


@pytest.mark.parametrize("tiles", [1, 3, 200])
def test_no_share_of_a_sum_is_empty(tiles):
    """`_down_kernel` tells the compiler so. Of 41 steps in 10 shares of 5 the last had none."""
    for steps in range(1, 300):
        shares = number_of_shares(tiles, 512, steps)
        per_share = -(-steps // shares)
        assert shares >= 1
        assert (shares - 1) * per_share < steps <= shares * per_share


def test_programs_are_shared_only_where_the_loop_is_long_enough(monkeypatch):
    for tiles, programs, steps, shares in (
        (2, 512, 100, 25),
        (100, 512, 100, 5),
        (600, 512, 100, 1),
        (1, 512, 3, 1),
        (64, 396, 64, 6),  # an H100: 8 shares would take two rounds
        (172, 324, 64, 3),  # an A100: two rounds of 22 steps end before one of 64
        (1024, 1 << 20, 100, 25),
        (1025, 1 << 20, 100, 1),  # counters
    ):
        assert number_of_shares(tiles, programs, steps) == shares
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert number_of_shares(2, 512, 100) == 1


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "threads", "card", "programs"),
    [
        (153, 24, 4, 2048, (132, 227), 132 * 3),  # H100: by registers
        (168, 36, 4, 2048, (108, 163), 108 * 3),  # A100
        (80, 36, 4, 1536, (128, 99), 128 * 2),  # RTX 4090: by shared memory
        (32, 0, 4, 1536, (128, 99), 128 * 12),  # by threads
        (255, 99, 8, 1536, (128, 99), 128),
    ],
)
def test_programs_that_run_at_the_same_time(monkeypatch, registers, shared, warps, threads, card, programs):
    properties = {"multiprocessor_count": card[0], "max_shared_mem": card[1] * 1024}
    compiled = SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(shared=shared * 1024, num_warps=warps))
    monkeypatch.setattr(Launch, "_load", lambda *_: compiled)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(utils=SimpleNamespace())))
    launch.driver.active.utils.get_device_properties = lambda index: properties
    of_torch = SimpleNamespace(max_threads_per_multi_processor=threads)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: of_torch)
    assert up(torch.device("cuda", 0)).programs_at_once((torch.float32,), ()) == programs


def test_a_product_has_as_many_programs_as_its_card_runs_at_once(driven, monkeypatch):
    """In place of 512, of which 116 would wait for the other 396 of an H100. On each card the same bits each time."""
    x = torch.zeros(4096, 4096).bfloat16()
    loaded = []

    def load(*_):
        loaded.append(1)
        return 1, 1, 150, 0, 1024  # with 150 registers

    monkeypatch.setattr(driver.active.utils, "load_binary", staticmethod(load))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    of_torch = SimpleNamespace(max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: of_torch)
    card = torch.device("cuda", 0)
    grids = []
    for device in (card, torch.device("cpu")):
        run = lora_products.lora_down(device, 4096, 4096, 64, (4096, 1), True, (x.dtype, torch.float32, x.dtype))
        memory = torch.zeros(run.sums)
        run((x, torch.zeros(64, 4096), x[:, :64].contiguous(), memory, x), (1, 2, 3, 1.0))
        grids.append(driven[-1][:3])
        assert driven[-1][:3] == run._grid
    assert grids == [(64, 1, 6), (64, 1, 8)]
    assert len(loaded) == 1  # the kernel that is asked is launched


def test_the_tile_of_ranks():
    assert [rank_tile(r) for r in (1, 16, 17, 32, 33, 64, 65, 200)] == [16, 16, 32, 32, 64, 64, 64, 64]


def test_the_tile_of_a_size_and_a_card(monkeypatch):
    monkeypatch.setattr(launch, "target", launch.target.__wrapped__)
    card = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 NVL")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+")
    )
    targets = [launch.target(device) for device in (card, torch.device("cpu"))]
    assert targets == ["sm_91 NVIDIA H100 NVL", "interpreter"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.target(card) == "gfx942"
    for target, sizes in {"sm_80": (16, 32, 64), "sm_90": (16, 32, 64), "sm_100": (16, 32, 64), "sm_75": ()}.items():
        monkeypatch.setattr(launch, "target", lambda device, target=target: target)
        tiles = [launch.find_tile("matmul", card, size).get("M", 0) for size in (0, 16, 17, 32, 33, 64, 65, 129)]
        last = 64 if target == "sm_80" else 0
        assert tiles == ([16, 16, 32, 32, 64, 64, last, 0] if sizes else [0] * 8)
    assert launch.find_tile("nest", card)["BLOCKS"] == 4 and launch.find_tile("quantize", card, 4096)["WEIGHTS"] == 4096


def layer(rows, columns, *experts):
    """x in bf16, a weight, or those of several experts, and its adapter."""
    weight = reference.quantize(torch.randn(rows, columns), "nf4", 64, True)
    if experts:
        weight = stack_bytes([weight] * experts[0])
    return (
        torch.zeros(4, columns).bfloat16(),
        weight,
        LoRA(torch.zeros(*experts, 4, columns), torch.zeros(*experts, rows, 4)),
    )


def test_what_the_kernels_leave_to_torch(monkeypatch):
    x, small, _ = layer(32, 128)
    experts, stack, lora = layer(64, 128, 2)

    def few_rows(x, weight=small):
        n, k = weight.shape
        adapter = LoRA(torch.zeros(4, k), torch.zeros(n, 4), in_fp16=isinstance(x, Half))
        return kernels.plan(x, adapter, weight).few_rows

    assert few_rows(x) and can_group(experts, stack, lora)
    assert few_rows(x.half()) and few_rows(to_half(x))
    assert not few_rows(x.float())
    assert few_rows(x.new_zeros(64, 128)) and not few_rows(x.new_zeros(65, 128))
    assert not few_rows(x[:0])
    assert not few_rows(*layer(32, 100)[:2])
    assert not can_group(experts, stack, lora._replace(b=lora.b.mT.contiguous().mT))
    assert not can_group(experts, stack, lora._replace(a=torch.zeros(lora.a.numel() + 1)[1:].view(lora.a.shape)))
    assert not can_group(*layer(64, 100, 2))
    monkeypatch.setattr(Launch, "__call__", lambda *_: pytest.fail("a kernel ran"))

    def by_torch(x, grad, r, p=0.0):
        """drop(x) A^T, and the gradients of A and B, with the adapter."""
        adapter = LoRA(torch.randn(r, x.shape[1]), torch.randn(grad.shape[1], r), 0.5)
        plan = kernels.plan(x, adapter)
        xa = plan.lora_project(x, adapter)
        return xa, *plan.linear_backward(grad, x, xa, None, adapter, False)[1:], adapter

    for rows, r in ((0, 8), (3, 0)):
        xa, grad_a, grad_b, _ = by_torch(X[:rows], X[:rows], r)
        assert (xa.shape, grad_a.shape, grad_b.shape) == ((rows, r), (r, 64), (64, r))
        assert not grad_a.any() and not grad_b.any()
    none = (torch.zeros(2, dtype=torch.int32), stack, lora)
    y, xa = kernels.grouped_linear(experts[:0], *none)
    gradients = kernels.grouped_linear_backward(y, experts[:0], xa, *none)
    assert [each.shape for each in (y, xa, *gradients)] == [(0, 64), (0, 4), (0, 128), lora.a.shape, lora.b.shape]
    assert not any(gradient.any() for gradient in gradients)
    for target, has_tiles in {"sm_70": False, "sm_75": False, "sm_80": True, "sm_121": True}.items():
        monkeypatch.setattr(launch, "target", lambda device, target=target: target)
        assert few_rows(x) == can_group(experts, stack, lora) == has_tiles
        if not has_tiles:
            h, grad = torch.randn(2, 5, 64).half()
            xa, grad_a, grad_b, adapter = by_torch(h, grad, 8)
            a, b = adapter.a.half(), adapter.b.half()
            torch.testing.assert_close(xa, h @ a.T)
            torch.testing.assert_close(grad_a, ((0.5 * grad @ b).T @ h).float(), rtol=1e-2, atol=1e-1)
            torch.testing.assert_close(grad_b, (0.5 * grad.T @ xa).float(), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("kernel", launch.TABLE)
def test_a_card_has_the_tiles_of_its_family(kernel):
    table = launch.TABLE[kernel]
    families = {"sm_103": "sm_100", "sm_121": "sm_120", "sm_86": "sm_86", "gfx942": "gfx942", "sm_103 B300": "sm_100"}
    for name, family in families.items():
        assert launch.tiles_of(kernel, name) is table.get(family, table["default"])


def test_a_card_that_was_measured_has_tiles_of_its_own(monkeypatch):
    """An L4 has a third of the bandwidth of an RTX 4090, and the same instructions."""
    tiles = {"sm_89 NVIDIA L4": [], "sm_89": [], "default": []}
    monkeypatch.setitem(launch.TABLE, "matmul", tiles)
    names = {"sm_89 NVIDIA L4": "sm_89 NVIDIA L4", "sm_89 NVIDIA GeForce RTX 4090": "sm_89", "sm_90 H100": "default"}
    for name, expected in names.items():
        assert launch.tiles_of("matmul", name) is tiles[expected]


@pytest.fixture
def driven(monkeypatch):
    """The calls of the driver: grid, stream, function, metadata of the kernel, and what follows."""
    calls = []
    handles = itertools.count(1)

    class Recorder(host_overhead.Driver):
        class launcher_cls:
            def __init__(self, *_):
                pass

            def __call__(self, *arguments):
                calls.append(arguments)

        class utils(host_overhead.Driver.utils):
            load_binary = staticmethod(lambda *_: (1, next(handles), 32, 0, 1024))

        get_current_device = staticmethod(lambda: 1000)  # a real card must not get what was compiled here

    monkeypatch.setattr(driver, "_active", Recorder())
    monkeypatch.setattr(launch, "target", lambda device: "sm_90")
    forget_launches()
    yield calls
    forget_launches()


def test_launches_of_a_layer(driven, monkeypatch, capsys, set_threads):
    """The counts in docs/kernels.md."""

    class Counter(host_overhead.Driver):
        get_current_device = staticmethod(lambda: 1001)

    monkeypatch.setattr(host_overhead, "Driver", Counter)
    monkeypatch.setattr(host_overhead, "REPEATS", 1)
    monkeypatch.setattr(host_overhead, "CALLS", 1)
    monkeypatch.setattr(backends, "_backends", {})
    monkeypatch.setitem(launch.TABLE, "matmul", launch.TABLE["matmul"])
    for module, name in ((launch, "target"), (eager, "multiply"), (linear, "multiply"), (Counter, "architecture")):
        monkeypatch.setattr(module, name, getattr(module, name))  # the benchmark changes them
    try:
        host_overhead.main([])
    finally:
        torch.set_flush_denormal(False)
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    launches = {cell[0].removeprefix("| ours").removeprefix(", "): (int(cell[1]), int(cell[3])) for cell in cells}
    ours = {"dropout": (4, 5), "no dropout": (4, 5), "no dropout, few rows": (3, 5)}
    in_fp32 = {" in fp32, dropout": (4, 5), " in fp32, dropout, few rows": (3, 5)}
    assert launches == {**ours, **in_fp32, " on a T4, dropout": (8, 14)}


def addresses(arguments):
    return [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]


def test_the_short_path_gives_the_driver_what_triton_gives_it(driven):
    launch = up()
    for _ in range(2):
        launch(*ARGUMENTS)
    by_triton, short = driven
    # Between the kernel's metadata and its arguments are three entries for the hooks of Triton's profiler.
    assert addresses(short[:6]) == addresses(by_triton[:6])
    assert short[6:9] == (None, None, None)
    assert addresses(short[9:]) == addresses(by_triton[9:])


def test_a_trial_launch_that_does_nothing_is_an_error(driven):
    with pytest.raises(RuntimeError, match="a kernel ran without an error and did nothing"):
        launch.check_launch(torch.device("cpu"))
    assert len(driven) == 1


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

    @contextmanager
    def guard(index):
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(driver.active, "get_current_device", lambda: 2000 + current[-1], raising=False)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda index: 70 + index % 2000, raising=False)
    for index in (1, 0):
        launch = up(torch.device("cuda", index))
        for _ in range(2):  # by Triton, and by the short path
            launch(*ARGUMENTS)
    assert [call[3] for call in driven] == [71, 71, 70, 70]
    assert (entered, current) == ([1, 1], [0])


def test_an_integer_scaling_does_not_become_a_part_of_the_kernel(driven):
    """`layer.scaling = 0` and 1 set by a user between steps: the kernel that is kept takes every later value."""
    grad_a = torch.zeros(16, 64)
    grad_b = torch.zeros(64, 16)
    for s in (1, 0, 0.25):
        lora_gradients(H, X, grad_a, H, X, grad_b, s)
    scalings = [arguments[-6] for arguments in driven]
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


def test_dropout_is_not_captured_in_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(dropout, "is_capturing", lambda device: True)
    assert dropout.dropout_arguments(0.1, None, torch.device("cpu")) == (0, 0, 0, 1.0)
    with pytest.raises(RuntimeError, match="lora_dropout cannot be captured in a CUDA graph"):
        dropout.dropout_arguments(0.1, torch.tensor([3]), torch.device("cpu"))
