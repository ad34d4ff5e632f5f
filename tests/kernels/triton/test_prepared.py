"""A layer whose calls are prepared, on the Triton kernels: the same bits as one that asks everything in each call."""

import copy

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.kernels.backends import backend
from tests.layers.test_prepared_call import assert_same, count_kept_calls, outcome, plainly, recomputed


@pytest.mark.parametrize(
    ("compute_dtype", "dtype"), [("bf16", torch.bfloat16), ("bf16", torch.float32), ("fp16", torch.float32)]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_prepared_and_other_calls_have_the_same_bits(monkeypatch, compute_dtype, dtype, p):
    """Few rows, many rows, none; a memory that begins at any address; `fp16`: factors with powers of two."""
    net = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    convert(net, r=4, lora_dropout=p, compute_dtype=compute_dtype)
    nn.init.normal_(net[0].lora_B)
    kept = count_kept_calls(monkeypatch)
    for x in (torch.randn(3, 64), torch.randn(2, 40, 64), torch.randn(0, 64), torch.randn(3 * 64 + 1)[1:].view(3, 64)):
        x = x.to(dtype).requires_grad_()
        for form in (plainly, recomputed):
            expected = outcome(copy.deepcopy(net), form, x)
            for _ in range(2):
                assert_same(outcome(net, form, x), expected)
    assert len(kept) > 10 and all(kept)
    assert not backend(torch.device("cpu")).failures
