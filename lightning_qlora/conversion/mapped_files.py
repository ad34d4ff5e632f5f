"""Copies what is left of files that are mapped into memory (safetensors, `torch.load(mmap=True)`) after conversion.

The file of a norm of 8 kB would stay mapped as a whole, and all of its pages that were read would count as memory of
the process.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_qlora.layers.names import tensors_of
from lightning_qlora.tensors.values import is_mapped


def copy_from_files(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Copy parameters and buffers of a CPU that lie in mapped files.

    Tensors that share memory, the whole or a part of it, share that of the copy.
    """
    spans: list[tuple[int, int, Tensor]] = []
    for _, tensor in tensors_of(list(modules)):
        if not is_mapped(tensor):
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), tensor))
    spans.sort(key=lambda span: span[:2])
    while spans:
        begin, end, _ = spans[0]
        together = []
        while spans and spans[0][0] < end:
            together.append(spans.pop(0))
            end = max(end, together[-1][1])
        copy = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        for first, last, tensor in together:
            part = copy[first - begin : last - begin].view(tensor.dtype)
            part.copy_(tensor.detach().as_strided((len(part),), (1,)))
            tensor.data = part.as_strided(tensor.shape, tensor.stride())
