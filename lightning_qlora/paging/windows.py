"""Walk an optimizer's parameters in windows, so that only a part of its state is on the device at a time."""

from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer

from lightning_qlora.paging.pages import pages_of


def windows(optimizer: Optimizer, params: list[Tensor], numel: int) -> Iterator[list[Tensor]]:
    """Split parameters into windows of about `numel` elements whose state is on the device while they are yielded.

    Double buffered: the next window's state is copied while this one's is used, and at most two are on the device.
    """
    parts = list(_split(params, numel))
    pages = pages_of(optimizer)
    if pages is None:
        yield from parts
        return
    pages.to_device(parts[0] if parts else [])
    for number, part in enumerate(parts):
        pages.arrive()
        if number + 1 < len(parts):
            pages.to_device(parts[number + 1])
        yield part
        pages.to_host(part)


def _split(params: list[Tensor], numel: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for param in params:
        part.append(param)
        if sum(p.numel() for p in part) >= numel:
            yield part
            part = []
    if part:
        yield part
