"""What needs a GPU: `pytest -m gpu tests/optim`.

A fixture limits every test to 1 GiB of unified memory and to what is free on the GPU: a request for more can hang the
GPU for all its users.
"""

import gc

import pytest
import torch

from lightning_qlora.optim.adamw import PagedAdamW
from lightning_qlora.optim.host_memory import ManagedPool, PinnedPool, why_not_managed
from lightning_qlora.optim.optimizer_pages import open_pool
from lightning_qlora.optim.pager import Pager
from lightning_qlora.optim.pool import MIB, SEGMENT_BYTES
from tests.optim.test_8bit import KINDS
from tests.optim.test_optimizer_pages import assert_equal_parameters, model, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
needs_managed = pytest.mark.skipif(
    torch.cuda.is_available() and why_not_managed(torch.device("cuda", 0)) is not None,
    reason="unified memory does not page on this device",
)
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def little_managed_memory(monkeypatch):
    allocate = ManagedPool._allocate

    def limited(pool, nbytes):
        assert pool.nbytes + nbytes <= min(1024 * MIB, torch.cuda.mem_get_info(DEVICE)[0])
        return allocate(pool, nbytes)

    monkeypatch.setattr(ManagedPool, "_allocate", limited)


@pytest.fixture(params=[pytest.param("managed", marks=needs_managed), "pinned"])
def pool(request, monkeypatch):
    pool = ManagedPool(DEVICE) if request.param == "managed" else PinnedPool(DEVICE, "a test")
    monkeypatch.setattr(
        "lightning_qlora.optim.optimizer_pages.open_pool", lambda device: pool if device.type == "cuda" else None
    )
    return pool


def on_gpu():
    return model().to(DEVICE)


@needs_managed
def test_a_managed_tensor_is_a_cuda_tensor():
    pool = ManagedPool(DEVICE)
    tensor = torch.arange(10_000, device=DEVICE, dtype=torch.float32)
    pool.move_in(tensor)
    assert tensor.device == DEVICE
    assert pool.owns(tensor)
    tensor.mul_(2)
    assert torch.equal(tensor.cpu(), torch.arange(10_000.0) * 2)
    pool.prefetch([tensor])
    assert (tensor @ tensor).item() > 0


@needs_managed
def test_managed_bytes_are_not_torchs_bytes_and_are_really_freed():
    pool = ManagedPool(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    tensor = pool.new_tensor(torch.zeros(64 * MIB // 4), torch.float32)
    assert torch.cuda.memory_allocated() == before
    pool.prefetch([tensor])
    torch.cuda.synchronize()
    free_with, _ = torch.cuda.mem_get_info()
    del tensor
    gc.collect()
    free_without, _ = torch.cuda.mem_get_info()
    assert pool.nbytes == 0
    assert free_without - free_with >= 60 * MIB, "the pages that were on the device are free again"


@needs_managed
def test_triton_kernels_take_managed_tensors():
    double = pytest.importorskip("tests.scripts.doubling_kernel").double
    pool = ManagedPool(DEVICE)
    tensor = pool.new_tensor(torch.ones(10_000), torch.float32)
    double[(10,)](tensor, tensor.numel(), BLOCK=1024)
    assert torch.equal(tensor.cpu(), torch.full((10_000,), 2.0))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
def test_paged_equals_unpaged(pool, options):
    plain, paged = on_gpu(), on_gpu()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, **options) for net in (plain, paged)]
    pager = Pager()
    pager.attach(optimizers[1])
    for net, optimizer in zip((plain, paged), optimizers, strict=True):
        train(net, optimizer, 20)
    assert_equal_parameters(plain, paged)
    assert pager.report().tensors == 4
    pager.close()
    assert pool.nbytes == 0
    assert all(
        t.device.type == "cpu" for state in optimizers[1].state.values() for k, t in state.items() if t.numel() > 4095
    )


@KINDS
def test_8bit_optimizers_page_and_train_as_without_pages(pool, kind):
    plain, paged = on_gpu(), on_gpu()
    optimizers = [kind(net.parameters()) for net in (plain, paged)]
    pager = Pager()
    pager.attach(optimizers[1])
    for net, optimizer in zip((plain, paged), optimizers, strict=True):
        train(net, optimizer, 5)
    assert_equal_parameters(plain, paged)
    assert pager.report().tensors == 4
    pager.close()


def test_state_moves_between_cpu_and_gpu_exactly(pool):
    net = on_gpu()
    optimizer = PagedAdamW(net.parameters())
    train(net, optimizer, 2)
    on_cpu = PagedAdamW(model().parameters())
    on_cpu.load_state_dict(optimizer.state_dict())
    back = PagedAdamW(on_gpu().parameters())
    back.load_state_dict(on_cpu.state_dict())
    for left, right in zip(optimizer.state.values(), back.state.values(), strict=True):
        assert all(torch.equal(left[key].cpu(), right[key].cpu()) for key in left)


@needs_managed
def test_a_step_that_would_not_fit_unpaged():
    """160 MiB of parameters and gradients; AdamW's state takes 160 MiB more, and torch may use 240 MiB."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()

    def run(paged):
        param = torch.nn.Parameter(torch.ones(20 * MIB, device=DEVICE))
        param.grad = torch.ones_like(param)
        optimizer = torch.optim.AdamW([param], foreach=False, fused=True)
        pager = Pager()
        if paged:
            pager.attach(optimizer)
        optimizer.step()
        optimizer.step()
        torch.cuda.synchronize()
        pager.close()

    allowed = torch.cuda.memory_reserved() + 250 * MIB  # 160, and one state tensor of 80 while it is being paged
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(paged=False)
        gc.collect()
        torch.cuda.empty_cache()
        run(paged=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@needs_managed
def test_after_a_refusal_the_gpu_is_usable(monkeypatch):
    """The driver's refusal is simulated; what follows it is real."""
    pool = ManagedPool(DEVICE)
    refusal = pool._runtime.cudaError_t.cudaErrorMemoryAllocation
    with monkeypatch.context() as refusing:
        refusing.setattr(pool._runtime, "cudaMallocManaged", lambda nbytes, flags: (refusal, 0))
        with pytest.raises(MemoryError, match="refused"):
            pool.new_tensor(torch.ones(1000), torch.float32)
    tensor = pool.new_tensor(torch.ones(1000), torch.float32)
    assert tensor.sum().item() == 1000
    assert pool.nbytes == SEGMENT_BYTES


def test_pinned_parts_of_a_segment_are_page_locked():
    pool = PinnedPool(DEVICE, "a test")
    first, second = (pool.new_tensor(torch.full((5000,), value), torch.float32) for value in (1.0, 2.0))
    assert first.is_pinned()
    assert second.is_pinned()
    assert pool.nbytes == SEGMENT_BYTES
    pool.prefetch([first, second])
    pool.wait_prefetch()
    assert first.device == second.device == DEVICE
    second += first
    pool.evict([first, second])
    pool.synchronize()
    assert torch.equal(second, torch.full((5000,), 3.0))


def test_state_takes_no_device_memory_after_a_step(pool):
    """Pinned: the memory is free in the order of the stream, before the CPU has waited for the copy."""
    param = torch.nn.Parameter(torch.ones(4 * MIB, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.AdamW([param], foreach=False)
    pager = Pager()
    pager.attach(optimizer)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        optimizer.step()
        assert torch.cuda.memory_allocated() == before
    pager.close()


def test_the_pool_chosen_for_this_device_says_why():
    pool = open_pool(DEVICE)
    assert pool is not None
    assert (pool.reason == "") == (pool.kind == "managed")
