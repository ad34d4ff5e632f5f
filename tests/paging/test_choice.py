import subprocess
import sys

import pytest
import torch

from lightning_qlora.paging import choice
from lightning_qlora.paging.managed import ManagedPool
from lightning_qlora.paging.pinned import PinnedPool


@pytest.fixture
def cuda_calls(monkeypatch):
    monkeypatch.setattr(choice, "CudaUnifiedMemory", lambda device: "memory")
    monkeypatch.setattr(choice, "CudaTransfers", lambda device: "transfers")


def test_a_cpu_needs_no_pool():
    assert choice.open_pool(torch.device("cpu")) is None


def test_unified_memory_where_it_pages(cuda_calls, monkeypatch):
    monkeypatch.setattr(choice, "why_not_managed", lambda device: None)
    pool = choice.open_pool(torch.device("cuda", 0))
    assert isinstance(pool, ManagedPool)
    assert (pool.kind, pool.reason) == ("managed", "")


def test_pinned_memory_elsewhere_and_it_is_said(cuda_calls, monkeypatch, caplog):
    monkeypatch.setattr(choice, "why_not_managed", lambda device: "it is WSL")
    with caplog.at_level("INFO"):
        pool = choice.open_pool(torch.device("cuda", 0))
    assert isinstance(pool, PinnedPool)
    assert (pool.kind, pool.reason) == ("pinned", "it is WSL")


def test_importing_imports_no_cuda_bindings_and_no_triton():
    code = (
        "import sys, torch, lightning.pytorch; before = set(sys.modules); import lightning_qlora.paging;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "assert not new & {'cuda', 'triton', 'bitsandbytes', 'transformers', 'peft'}, new;"
        "assert 'cuda.bindings.runtime' not in set(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
