"""A 63-bit fingerprint of tensors: files store it to recognize the base model, and to detect damaged values."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_qlora.layers.dtensor import gather, own_rows
from lightning_qlora.quantization.packed_weight import PackedWeight, stack_bytes

_PIECE = 1 << 17  # words at a time, so that a large tensor needs no large temporary
_ODD_1 = 0x1E3779B97F4A7C15
_ODD_2 = 0x3F58476D1CE4E5B9


def fingerprint(*tensors: Tensor) -> int:
    """A number that changes with any bit and with the order of the tensors; the same on every device.

    Floats count by their fp32 value, so a copy cast from bf16 to fp32 has the fingerprint of the original.
    0 for tensors without values (see `has_values`).
    Formula: the sum over all words w of mix(w xor i * odd) mod 2^64, i the position of w. Sums that wrap need no order.
    """
    total = 0
    for tensor in tensors:
        if not has_values(tensor):
            return 0
        for piece in _sums_of_pieces(tensor.detach()):
            total = _mix(total + piece)
        total = _mix(total + tensor.numel())
    return total


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: those on the meta device and those of FakeTensorMode have none."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _sums_of_pieces(tensor: Tensor) -> list[int]:
    """The sum of each `_PIECE` words. Of a sharded tensor every rank adds up its rows, and the sums are added."""
    if tensor.is_floating_point():
        dtype = torch.float32
        per_word = 2
    else:
        dtype = tensor.dtype
        per_word = 8 // tensor.element_size()
    size = _PIECE * per_word
    group = None
    if (rows := own_rows(tensor)) is not None and tensor.stride(0) % per_word == 0:
        part, first, group = rows
        flat = part.reshape(-1)
    else:
        first = 0
        flat = gather(tensor).reshape(-1)
    sums = [0] * -(-tensor.numel() // size)
    for number in range(first // size, -(-(first + flat.numel()) // size)):
        begin = max(number * size, first)
        end = min((number + 1) * size, first + flat.numel())
        piece = flat[begin - first : end - first]
        if piece.numel() % per_word:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % per_word))
        words = piece.to(dtype, copy=True).view(torch.int64)
        place = 1 + begin // per_word
        words ^= torch.arange(place, place + words.numel(), device=words.device).mul_(_ODD_1)
        words ^= words >> 29
        words *= _ODD_2
        words ^= words >> 32
        sums[number] = int(words.sum())
    if group is not None and sums:
        of_all = torch.tensor(sums, device=flat.device)
        dist.all_reduce(of_all, group=group)
        sums = of_all.tolist()
    return sums


def fingerprint_of_weights(weights: Sequence[PackedWeight]) -> int:
    """The fingerprint of a layer whose matrices are these 4-bit weights."""
    return fingerprint(*stack_bytes([weight.to_bytes() for weight in weights])[:3])


def checksum(tensor: Tensor) -> str:
    """The fingerprint of a tensor's bytes, in hexadecimal: for values that must come back bit for bit."""
    return f"{fingerprint(tensor.detach().contiguous().view(-1).view(torch.uint8)):016x}"


def _mix(number: int) -> int:
    number &= (1 << 64) - 1
    number ^= number >> 31
    return (number * _ODD_2 + _ODD_1) & ((1 << 63) - 1)
