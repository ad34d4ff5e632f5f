"""How much of a small change arrives in the output of a layer, and in dX: 1 is all, 0 is none.

    share = <y(B) - y(0), d> / |d|^2        d = s xa B^T in fp64, B = +-2e-4: as after a first step of AdamW

A layer that rounds x W^T before the adapter's part is in has 0.40 in bf16, and 0.00 with a bias of 8.
"""

import torch
from torch import Tensor

from lightning_qlora.kernels import reference
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.quantization.packed_weight import stack_bytes

SCALING = 0.5


def share(change: Tensor, expected: Tensor) -> float:
    """<change, expected> / |expected|^2."""
    change = change.double().flatten()
    expected = expected.double().flatten()
    return float(change @ expected / (expected @ expected))


def experts(backend, ends):
    """The layer of several experts of a backend, for `shares`; each has the same weight, and rows end at `ends`."""

    def layer(x, weight, _, a, b, scaling, grad):
        stops = torch.tensor(ends, dtype=torch.int32)
        stack = stack_bytes([weight] * len(ends))
        lora = LoRA(torch.stack([a] * len(ends)), torch.stack([b] * len(ends)), scaling)
        y, xa = backend.grouped_linear(x, stops, stack, lora)
        return y, backend.grouped_linear_backward(grad, x, xa, stops, stack, lora)[0]

    return layer


def shares(layer, rows, inputs, outputs, dtype, bias=None, repeats=1):
    """The shares in y and dX of `layer(x, weight, bias, a, b, scaling, grad) -> y, dX`, over all repeats together."""
    changes = ([], [])
    expected = ([], [])
    weight = 0.02 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(repeats))
    weight = reference.quantize(weight, "nf4", 64, True)
    for seed in range(repeats):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape, draw=draw):
            return torch.randn(shape, generator=draw)

        x = normal(rows, inputs).to(dtype)
        grad = normal(rows, outputs).to(dtype)
        values = None if bias is None else (bias + 0.1 * normal(outputs)).to(dtype)
        a = normal(8, inputs) / inputs**0.5
        b = 2e-4 * normal(outputs, 8).sign()
        before, after = (layer(x, weight, values, a, part, SCALING, grad) for part in (torch.zeros_like(b), b))
        for found, new, old in zip(changes, after, before, strict=True):
            found.append(new.double() - old.double())
        a, b = (matrix.to(dtype).double() for matrix in (a, b))
        expected[0].append(SCALING * x.double() @ a.T @ b.T)
        expected[1].append(SCALING * grad.double() @ b @ a)
    return [share(torch.cat(found), torch.cat(wanted)) for found, wanted in zip(changes, expected, strict=True)]
