"""Zeros that take no memory before they are written."""

import copy
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.layers.initialization import unwritten
from tests.conftest import elsewhere


def resident_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_they_take_memory_only_when_written():
    before = resident_mb()
    tensors = [unwritten.zeros(768, 64) for _ in range(500)]  # 94 MB
    assert not any(tensor.any() for tensor in tensors)
    assert resident_mb() - before < 10
    for tensor in tensors:
        tensor.add_(1)
    assert resident_mb() - before > 80


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (768, 64), (5_000_000,)])
def test_each_is_an_ordinary_tensor_with_a_storage_of_its_own(shape):
    first, second = unwritten.zeros(*shape), unwritten.zeros(*shape)
    assert first.shape == torch.Size(shape)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    assert first.data_ptr() % 64 == 0
    assert first.untyped_storage().nbytes() == first.nbytes
    first += 1
    assert not second.any()
    assert (copy.deepcopy(first) == 1).all()
    file = io.BytesIO()
    torch.save(first, file)
    assert len(file.getvalue()) < first.nbytes + 4096
    file.seek(0)
    assert torch.equal(torch.load(file), first)


def test_threads_get_different_ones():
    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda number: unwritten.zeros(1 + number % 97).fill_(number), range(2000)))
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()


def test_an_adapter_of_the_default_start_is_not_written():
    net = nn.Linear(2048, 2048)
    convert(net, r=QLoRAPrecision().config.r)
    assert not net.lora_B.any()
    net.lora_B.data.fill_(1)
    net(torch.ones(1, 2048)).sum().backward()
    assert net.lora_B.grad.shape == (2048, 64)


def test_under_fake_tensor_mode_they_are_fake_and_another_default_device_has_no_effect():
    with FakeTensorMode():
        assert isinstance(unwritten.zeros(768, 64), FakeTensor)
    with elsewhere():
        zeros = unwritten.zeros(768, 64)
    assert zeros.device.type == "cpu"
    assert not zeros.any()
